"""The main job from end to end on the bundled data: attribute, build, choose on one split, measure on another, report."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from grains_tl._util.files import write_atomically
from grains_tl.demo.one_set import DemoSettings, run_set
from grains_tl.demo.text_report import write_report
from grains_tl.plotting.effects import plot_controls, plot_layers
from grains_tl.plotting.style import figure_png
from grains_tl.tokens.rules import token_rules
from grains_tl.types import HookedModel
from grains_tl.vectors.manifest import package_versions

QUICK = DemoSettings(
    sets=("sentiment",),
    n_build=12,
    n_choose=8,
    n_test=16,
    n_test_draws=8,
    n_draws=20,
    controls=("random direction",),
    n_cost=0,
    methods=(("leave_one_out", 1), ("gradient_x_input", 1)),
    layers=(9, 12, 15, 18, 21, 24, 27),
)


def run_demo(
    model: HookedModel,
    out: str | Path,
    settings: DemoSettings | None = None,
) -> dict[str, Any]:
    """Run the whole story and write ``results.json``, ``report.html`` and its figures as PNGs into a folder.

    Attributions that are finished are kept in ``attributions.partial.jsonl`` there until the end, so that an interrupted
    run does not start from nothing.

    Args:
        model: a ``TransformerBridge`` or ``HookedTransformer``.
        out: the folder.
        settings: sizes; ``QUICK`` for two minutes.

    Returns:
        The results, as in ``results.json``.
    """
    settings = settings or DemoSettings()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    checkpoint = folder / "attributions.partial.jsonl"
    results: dict[str, Any] = {
        "settings": {
            "model": str(getattr(model.cfg, "model_name", "?")),
            "class": type(model).__name__,
            "tokens": token_rules(model).describe(),
            "threads": torch.get_num_threads(),
            **{k: str(v) if isinstance(v, (tuple, list)) else v for k, v in asdict(settings).items()},
        },
        "versions": package_versions(),
        "seconds": 0.0,
        "sets": [],
    }
    for name in settings.sets:
        found = run_set(model, name, settings, checkpoint)
        results["sets"].append(found)
        results["seconds"] = round(time.perf_counter() - started, 1)
        # after every set, so that a finished one is never lost
        write_atomically(folder / "results.json", json.dumps(results, indent=1, allow_nan=False).encode())
        write_report(results, folder)
        layers = plot_layers(pd.DataFrame(found["sweep"]), found["chosen"]["layer"])
        controls = plot_controls(pd.DataFrame(found["table"]), found["draws"])
        write_atomically(folder / f"{name}-layers.png", figure_png(layers))
        write_atomically(folder / f"{name}-controls.png", figure_png(controls))
    checkpoint.unlink(missing_ok=True)
    return results


def summary(results: dict[str, Any]) -> str:
    """The compact tables and verdicts as text."""
    lines = []
    for found in results["sets"]:
        n, base = found["n"], found["base"]
        lines += [
            f"\n{found['name']}: {n['build']} records to build, {n['choose']} to choose, {n['test']} to test "
            f"({n['test_for_draws']} for draws)",
            f"unsteered: margin {base['margin']:+.2f} +- {base['margin_se']:.2f} nats, accuracy {base['accuracy']:.2f}",
            f"chosen on the choosing split: {found['chosen']['method']}, layer {found['chosen']['layer']}; "
            f"alpha {found['chosen']['alpha']}",
            "effect = half the change of the margin between +alpha and -alpha, nats",
        ]
        table = pd.DataFrame(found["table"])[["vector", "effect", "se", "low", "high", "interval", "n_draws", "n"]]
        lines.append(table.to_string(index=False, float_format=lambda x: f"{x:+.2f}", na_rep="-"))
        for row in found["attribution"]:
            if row["median_relative_gap"] is not None:
                lines.append(
                    f"{row['method']}: median completeness gap {100 * row['median_relative_gap']:.0f} % of "
                    f"|f(x) - f(x')| over {row['n']} records"
                    + (": these scores have not converged" if row["median_relative_gap"] > 0.05 else "")
                )
        for row in found["continuations"]:
            prompt = row["prompt"] if len(row["prompt"]) <= 40 else f"...{row['prompt'][-37:]}"
            lines.append(f"alpha {row['alpha']:+.1f}  {prompt!r} -> {row['text']!r}")
        lines.append(f"VERDICT {found['headline']}\n{found['verdict']}")
    return "\n".join(lines)
