"""How far half precision moves attributions, vectors and effects from float32's, per model and dtype.

    python -m studies.precision --model smollm2 --model gemma=gemma3-270m.Q4_K_M.gguf --out studies/results/precision

A model is a name of ``gr.load_model`` or ``NAME=PATH`` of a GGUF file or folder. Finished pairs of model and dtype are kept
as JSON files, and the same command goes on from them; the table is written at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

import grains_tl as gr

METHODS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "gradient_x_input": {},
    "integrated_gradients": {"n_steps": 8, "nodes": "riemann"},
}
DTYPES = ("bfloat16", "float16")
ALPHA = 0.2


def load(spec: str, dtype: torch.dtype) -> Any:
    """The model of ``NAME`` or ``NAME=PATH``."""
    name, equals, path = spec.partition("=")
    return gr.load_model(path=path, dtype=dtype) if equals else gr.load_model(name, dtype=dtype)


def measured(model: Any, n_records: int, methods: list[str], given: gr.SteeringVectors | None) -> dict[str, Any]:
    """Scores, vectors and effects of a model; effects are those of ``given`` vectors, or of its own."""
    pairs = gr.load_bundled("sentiment", "build")[:n_records]
    held_out = gr.load_bundled("sentiment", "test")[: 2 * n_records]
    layers = [int(model.cfg.n_layers) * part // 4 for part in (1, 2, 3)]
    scores = {}
    for method in methods:
        found = [gr.attribute(model, pair, method=method, **METHODS[method]) for pair in pairs]
        scores[method] = [a.scores[a.content].tolist() for a in found]
    vectors = {
        method: gr.build_vectors(model, pairs, method=method, top_k=3, layers=layers, progress=False)
        for method in methods
        if method != "integrated_gradients"
    }
    vectors["caa"] = gr.build_vectors(model, pairs, recipe="caa", layers=layers, progress=False)
    steer = vectors["caa"] if given is None else given
    base = gr.score_pairs(model, held_out, progress=False)
    effects = {}
    for layer in steer.layers:
        moved = gr.score_pairs(model, held_out, steer.hooks(ALPHA, [layer]), progress=False)
        effects[layer] = ((moved - base)[:, 0] - (moved - base)[:, 1]).tolist()
    return {"scores": scores, "vectors": vectors, "effects": effects, "margins": (base[:, 0] - base[:, 1]).tolist()}


def compared(full: dict[str, Any], half: dict[str, Any]) -> dict[str, Any]:
    """What changed from one precision to the other."""
    out: dict[str, Any] = {"rank_correlation": {}, "cosine": {}}
    for method in full["scores"]:
        pairs = zip(full["scores"][method], half["scores"][method], strict=True)
        ranks = [float(spearmanr(a, b).statistic) for a, b in pairs]
        out["rank_correlation"][method] = {"median": sorted(ranks)[len(ranks) // 2], "least": min(ranks)}
    for method, vectors in full["vectors"].items():
        out["cosine"][method] = [round(x, 5) for x in vectors.cosine(half["vectors"][method]).tolist()]
    margins = torch.tensor(full["margins"]) - torch.tensor(half["margins"])
    out["margin_change"] = {"rms": float(margins.square().mean().sqrt()), "largest": float(margins.abs().max())}
    out["effects"] = {}
    for layer, wanted in full["effects"].items():
        a, b = torch.tensor(wanted), torch.tensor(half["effects"][layer])
        out["effects"][str(layer)] = {
            "float32": float(a.mean()),
            "here": float(b.mean()),
            "rms_difference_of_a_record": float((a - b).square().mean().sqrt()),
        }
    return out


def run(spec: str, out: Path, n_records: int, methods: list[str]) -> None:
    """Measure what is missing of one model."""
    name = spec.partition("=")[0]
    todo = [dtype for dtype in DTYPES if not (out / f"{name}-{dtype}.json").exists()]
    if not todo:
        return
    full = measured(load(spec, torch.float32), n_records, methods, None)
    for dtype in todo:
        gc.collect()
        started = time.process_time()
        model = load(spec, getattr(torch, dtype))
        checks = gr.check_model(model)
        found: dict[str, Any] = {"model": name, "dtype": dtype, "records": n_records, "alpha": ALPHA}
        found["checks_that_fail"] = checks.query("not ok")[["check", "detail"]].to_dict("records")
        try:
            found |= compared(full, measured(model, n_records, methods, full["vectors"]["caa"]))
        except ValueError as error:
            found["refused"] = str(error)
        found["cpu_seconds"] = round(time.process_time() - started, 1)
        (out / f"{name}-{dtype}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(out: Path) -> str:
    """All results so far, as markdown."""
    lines = [
        "| model | dtype | ranks: leave-one-out | gradient x input | integrated gradients | least cosine of vectors: "
        "leave-one-out | gradient x input | CAA | effect at mid-depth, float32 and here, nats | margin off by (rms), nats |",
        "|---" * 10 + "|",
    ]
    for file in sorted(out.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        cells = [found["model"], found["dtype"]]
        if "refused" in found:
            lines.append(f"| {' | '.join(cells)} | refused: {found['refused']} |" + " |" * 7)
            continue
        ranks = found["rank_correlation"]
        cells += [f"{ranks[m]['median']:.3f} ({ranks[m]['least']:.2f})" if m in ranks else "" for m in METHODS]
        cosines = found["cosine"]
        cells += [
            f"{min(cosines[m]):.4f}" if m in cosines else "" for m in ("leave_one_out", "gradient_x_input", "caa")
        ]
        middle = list(found["effects"].values())[1]
        cells += [f"{middle['float32']:+.2f}, {middle['here']:+.2f}", f"{found['margin_change']['rms']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="NAME or NAME=PATH (repeatable)")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this attribution method (repeatable)")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "precision")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for spec in args.model:
        run(spec, args.out, args.records, args.method or list(METHODS))
        (args.out / "table.md").write_text(table(args.out), encoding="utf-8")
    print(table(args.out))


if __name__ == "__main__":
    main()
