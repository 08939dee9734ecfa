"""How far half precision moves attributions, vectors and effects from float32's, per model and dtype.

    python -m studies.precision --model smollm2 --model Gemma-3-270M=gemma3-270m.Q4_K_M.gguf --device cuda --records 24

A model is a name of ``gr.load_model`` or ``LABEL=PATH`` of a GGUF file or folder. What was measured of a model in a dtype
(scores, vectors, effects, margins) is one JSON file; a file that is there is not measured again. The table compares them
with float32's: ``--page`` writes it into a page, between ``<!-- precision -->`` and ``<!-- /precision -->``.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr

import grains_tl as gr
from studies import pieces

METHODS: dict[str, dict[str, Any]] = {
    "leave_one_out": {},
    "integrated_gradients": {"n_steps": 16, "nodes": "gauss_legendre"},
    "gradient_x_input": {},
}
NAMES = {"leave_one_out": "leave-one-out", "integrated_gradients": "integrated gradients", "caa": "CAA"}
NAMES |= {"gradient_x_input": "gradient x input"}
DTYPES = ("float32", "bfloat16", "float16")
ALPHA = 0.2
RESULTS = Path(__file__).parent / "results" / "precision"
START, END = "<!-- precision -->\n", "<!-- /precision -->\n"


def load(spec: str, dtype: str, device: str) -> Any:
    """The model of ``NAME`` or ``LABEL=PATH``."""
    return pieces.load(spec, device, dtype=getattr(torch, dtype))[1]


def measured(model: Any, n_records: int, methods: list[str], steer: dict[str, Any] | None) -> dict[str, Any]:
    """Scores, vectors, margins, and effects of float32's CAA vectors (``steer``, from its file), or of its own.

    What the model refuses, because of NaN for instance, is kept in words.
    """
    pairs = gr.load_bundled("sentiment", "build")[:n_records]
    held_out = gr.load_bundled("sentiment", "test")[: 2 * n_records]
    layers = [int(model.cfg.n_layers) * part // 4 for part in (1, 2, 3)]
    found: dict[str, Any] = {"layers": layers, "scores": {}, "vectors": {}, "refused": {}}

    def keep(what: str, name: str, job: Callable[[], Any]) -> None:
        try:
            found[what][name] = job()
        except ValueError as error:
            found["refused"][f"{what}: {name}"] = str(error)

    def scores(method: str) -> Any:
        each = [gr.attribute(model, pair, method=method, **METHODS[method]) for pair in pairs]
        return [[float(f"{x:.6g}") for x in a.scores[a.content].tolist()] for a in each]

    def vectors(**options: Any) -> Any:
        made = gr.build_vectors(model, pairs, layers=layers, progress=False, **options)
        rows = [[float(f"{x:.5g}") for x in row] for row in made.raw.tolist()]
        return {"raw": rows, "resid_norms": made.resid_norms.tolist()}

    for method in methods:
        keep("scores", method, partial(scores, method))
        keep("vectors", method, partial(vectors, method=method, top_k=3, **METHODS[method]))
    keep("vectors", "caa", lambda: vectors(recipe="caa"))
    given = steer or found["vectors"].get("caa")

    def effects() -> Any:
        raw, norms = torch.tensor(given["raw"]), torch.tensor(given["resid_norms"])
        ours = gr.SteeringVectors.from_raw(raw, layers, norms)
        base = gr.score_pairs(model, held_out, progress=False)
        found["margins"] = (base[:, 0] - base[:, 1]).tolist()
        moved = [gr.score_pairs(model, held_out, ours.hooks(ALPHA, [layer]), progress=False) for layer in layers]
        return [((m - base)[:, 0] - (m - base)[:, 1]).tolist() for m in moved]

    found["effects"] = {}
    if given is not None:
        keep("effects", "caa of float32", effects)
    return found


def run(spec: str, args: argparse.Namespace) -> None:
    """Measure what is missing of one model."""
    name = spec.partition("=")[0]
    for dtype in args.dtype or DTYPES:
        file = args.out / f"{name}-{dtype}.json"
        if file.exists():
            continue
        full = args.out / f"{name}-float32.json"
        steer = json.loads(full.read_text(encoding="utf-8"))["vectors"].get("caa") if full.exists() else None
        gc.collect()
        started, cpu = time.perf_counter(), time.process_time()
        model = load(spec, dtype, args.device)
        found: dict[str, Any] = {"model": name, "dtype": dtype, "device": args.device, "records": args.records}
        checks = gr.check_model(model)
        found["checks_that_fail"] = checks.query("not ok")[["check", "detail"]].to_dict("records")
        found |= measured(model, args.records, args.method or list(METHODS), steer)
        found |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")


def row(full: dict[str, Any], half: dict[str, Any]) -> list[str]:
    """Cells of one model and dtype beside float32."""
    cells = [half["model"], half["dtype"], str(half["records"])]
    for method in METHODS:
        if method not in full["scores"] or method not in half["scores"]:
            cells.append("refused" if f"scores: {method}" in half["refused"] else "")
            continue
        pairs = zip(full["scores"][method], half["scores"][method], strict=True)
        ranks = [float(spearmanr(a, b).statistic) for a, b in pairs]
        cells.append(f"{median(ranks):.3f} ({min(ranks):.2f})")
    cosines = []
    for method in (*METHODS, "caa"):
        if method in full["vectors"] and method in half["vectors"]:
            a, b = (torch.tensor(x["vectors"][method]["raw"]) for x in (full, half))
            cosines.append(f"{torch.cosine_similarity(a, b, dim=-1).min():.4f}")
        else:
            cosines.append("refused" if f"vectors: {method}" in half["refused"] else "")
    cells += cosines
    if full["effects"] and half["effects"]:
        a, b = (torch.tensor(x["effects"]["caa of float32"][1]) for x in (full, half))
        off = (torch.tensor(full["margins"]) - torch.tensor(half["margins"])).square().mean().sqrt()
        return [*cells, f"{a.mean():+.2f}, {b.mean():+.2f}", f"{off:.3f}"]
    return [*cells, "refused", "refused"]


def table(out: Path) -> str:
    """All results so far beside those of float32, as markdown."""
    heads = ["model", "dtype", "records", *(f"ranks: {NAMES[m]}" for m in METHODS)]
    heads += [f"cosine: {NAMES[m]}" for m in (*METHODS, "caa")] + ["effect: float32, here", "margin off by"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for file in sorted(out.glob("*.json")):
        half = json.loads(file.read_text(encoding="utf-8"))
        full = out / f"{half['model']}-float32.json"
        if half["dtype"] != "float32" and full.exists():
            lines.append(f"| {' | '.join(row(json.loads(full.read_text(encoding='utf-8')), half))} |")
    return "\n".join(lines) + "\n"


def write_page(page: Path, text: str) -> None:
    """Put the table between its marks."""
    old = page.read_text(encoding="utf-8")
    page.write_text(re.sub(f"{START}.*?{END}", lambda _: START + text + END, old, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="NAME or LABEL=PATH (repeatable)")
    parser.add_argument("--method", action="append", choices=METHODS, help="only this attribution method (repeatable)")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="only this dtype, float32 first (repeatable)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="write the table into this page, too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for spec in args.model:
        run(spec, args)
    text = table(args.out)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    if args.page:
        write_page(args.page, text)
    print(text)


if __name__ == "__main__":
    main()
