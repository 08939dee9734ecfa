"""The table, the plots and the page, from the raw results.

python -m studies.recipes.report --results studies/results/recipes --page docs/recipes-study.md
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from grains_tl.plotting.style import COLOURS, GREY, MARKERS, STYLE
from studies.recipes import tables
from studies.recipes.directions import ATTRIBUTED, VARIANTS
from studies.recipes.intervals import effects_of, estimate, read_cells
from studies.recipes.tables import LABELS, MODELS
from studies.recipes.words_tables import letters_table, without_words_table

SHOWN = ("grains", "grains_weighted", "caa", "margin_gradient", "kl_optimal")


def plot_curves(folder: Path, file: Path) -> bool:
    """Effect against KL, every recipe a line, first-order prediction dashed; ``False`` if no curve was measured."""
    with plt.rc_context(STYLE):
        for about, rows in read_cells(folder):
            curves = [r for r in rows if r["stage"] == "curve"]
            if not curves:
                continue
            fig, ax = plt.subplots(figsize=(6.4, 4.2))
            for row in curves:
                _curve(ax, row)
            layer = str(about["layers"]["kl_optimal"])
            kls = np.linspace(0, 0.4, 100)
            gain = about["first_order"][layer]["predicted"]["0.05"] / 0.1**0.5
            ax.plot(
                kls,
                gain * (2 * kls) ** 0.5,
                "--",
                color="black",
                lw=1,
                label="first-order prediction for the best vector",
            )
            ax.set_ylim(-1, 12)
            ax.set_xlabel("price: KL on neutral text, nats per token")
            ax.set_ylabel("effect on the margin, nats")
            ax.set_title(
                f"{MODELS[about['model']]}, {about['set']}, {len(curves[0]['effects']['test'][0]['change'])} test records"
            )
            ax.axhline(0, color=GREY, lw=0.8)
            ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
            fig.savefig(file, dpi=144, bbox_inches="tight")
            plt.close(fig)
            return True
    return False


def _curve(ax: Any, row: dict[str, Any]) -> None:
    points = [p for p in row["effects"]["test"] if p["change"]]
    kls, means = [0.0, *(p["kl"] for p in points)], [0.0, *(float(np.mean(p["change"])) for p in points)]
    control = row["recipe"].startswith("random")
    index = SHOWN.index(row["recipe"]) if row["recipe"] in SHOWN else 0
    style: dict[str, Any] = (
        {"color": GREY, "ls": ":" if "tokens" in row["recipe"] else "-.", "lw": 1.2}
        if control
        else {"color": COLOURS[index], "marker": MARKERS[index], "ms": 4, "lw": 1.6}
    )
    ax.plot(kls, means, label=f"{LABELS[row['recipe']]}, layer {row['layer']}", **style)


def plot_scale(folder: Path, file: Path, sets: tuple[str, ...] = ("reviews", "truthfulqa"), kl: float = 0.05) -> bool:
    """Attribution, random tokens and CAA over model size; ``False`` with fewer than two models."""
    cells = {(a["model"], a["set"]): (a, rows) for a, rows in read_cells(folder)}
    sizes = {"smollm2": 135, "gemma3-270m": 270, "qwen2.5-coder-0.5b": 494}
    models = [m for m in MODELS if any((m, s) in cells for s in sets)]
    sets = tuple(s for s in sets if sum((m, s) in cells for m in models) > 1)
    if not sets:
        return False
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, len(sets), figsize=(4.2 * len(sets), 3.6), squeeze=False)
        for ax, name in zip(axes[0], sets, strict=True):
            for i, recipe in enumerate(("grains", "random_tokens", "caa")):
                xs, found = [], []
                for model in models:
                    about, rows = cells.get((model, name), ({}, []))
                    effects = effects_of(rows, recipe, kl)
                    if effects is not None:
                        xs.append(sizes[model] * 1.04 ** (i - 1))
                        found.append(estimate(effects, about["per_question"]))
                mean = np.array([e.mean for e in found])
                spread = [mean - [e.low for e in found], [e.high for e in found] - mean]
                colour = GREY if recipe == "random_tokens" else COLOURS[2 * (i // 2)]
                ax.errorbar(
                    xs, mean, yerr=np.abs(spread), fmt=MARKERS[i], color=colour, ms=5, capsize=2, label=LABELS[recipe]
                )
            ax.set_xscale("log")
            ax.set_xticks([sizes[m] for m in models], [f"{sizes[m]}M" for m in models])
            ax.minorticks_off()
            ax.set_xlim(100, 700)
            low, high = ax.get_ylim()
            ax.set_ylim(min(low, -0.5), max(high, 0.5))
            ax.axhline(0, color=GREY, lw=0.8)
            ax.set_title(f"{name}, {kl} nats KL")
            ax.set_xlabel("parameters")
        axes[0][0].set_ylabel("effect on the margin, nats")
        axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        fig.tight_layout()
        fig.savefig(file, dpi=144, bbox_inches="tight")
        plt.close(fig)
    return True


def parts_of(folder: Path) -> dict[str, str]:
    """The generated parts of the page by the name of their markers."""
    table = tables.table_of(folder)
    other = tables.table_of(folder, stage="wordings")
    parts = {
        "effects at 0.05": tables.effects_table(table, 0.05, SHOWN),
        "effects at 0.2": tables.effects_table(table, 0.2, SHOWN),
        "minus caa at 0.05": tables.differences_table(table, 0.05, [r for r in SHOWN if r != "caa"]),
        "minus caa at 0.2": tables.differences_table(table, 0.2, [r for r in SHOWN if r != "caa"]),
        "controls at 0.05": tables.effects_table(table, 0.05, ("grains", "random_tokens", "random_direction")),
        "variants at 0.05": tables.effects_table(table, 0.05, VARIANTS),
        "attribution at 0.05": tables.differences_table(table, 0.05, tuple(ATTRIBUTED), "minus_control"),
        "attribution at 0.2": tables.differences_table(table, 0.2, tuple(ATTRIBUTED), "minus_control"),
        "trained": tables.trained_table(table),
        "texts": tables.texts_table(folder) if any(folder.glob("*/reviews-texts.jsonl")) else "",
        "without words": without_words_table(folder),
        "letters": letters_table(folder),
        "seconds": tables.seconds_table(folder),
        "numbers": tables.numbers_table(folder),
        "transfer": tables.transfer_table(folder),
        "wordings": "" if other.empty else tables.wordings_table(table, other, 0.05),
    }
    return {name: content for name, content in parts.items() if content}


def main() -> None:
    """Write the table, the plots, and the generated parts of the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("studies/results/recipes"))
    parser.add_argument("--page", type=Path, default=Path("docs/recipes-study.md"))
    args = parser.parse_args()
    tables.table_of(args.results).round(4).to_csv(args.results / "table.csv", index=False)
    plot_curves(args.results, args.page.parent / "recipes-curves.png")
    plot_scale(args.results, args.page.parent / "recipes-scale.png")
    parts = parts_of(args.results)
    if args.page.exists():
        page = args.page.read_text(encoding="utf-8")
        for name, content in parts.items():
            page = tables.replaced(page, name, content)
        args.page.write_text(page, encoding="utf-8")
    else:
        print("\n\n".join(f"<!-- {name} -->\n{content}\n<!-- end -->" for name, content in parts.items()))


if __name__ == "__main__":
    main()
