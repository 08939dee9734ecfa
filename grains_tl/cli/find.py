"""``grains-tl find``: from a file of pairs to a vector, a table and a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grains_tl.cli.options import add_search_options


def add_find_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``find`` alone."""
    parser.add_argument("--out", required=True, help="folder for report.html, table.csv and vectors.safetensors")
    add_search_options(
        parser,
        "grains,kl_optimal,caa,random_direction",
        "recipes to compare, controls included",
        "eight over the depth",
        (0.03, 0.1, 0.3),
    )
    parser.add_argument(
        "--split",
        metavar="COLUMN",
        help="column that says build, choose or report for each record (default: a random split)",
    )


def search_checkpoint(args: argparse.Namespace) -> Path:
    """Where ``find`` and ``audit`` keep finished measurements."""
    return Path(args.out) / "results.jsonl"


def search_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What ``find`` and ``audit`` pass on to ``find_vector``; refuses an ``--out`` that is a file."""
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out} is a file; name a folder")
    return {
        "recipes": [name.strip() for name in args.recipes.split(",")],
        "kl": args.kl,
        "layers": args.layers,
        "alphas": args.alphas,
        "seed": args.seed,
        "n_draws": args.draws,
        "checkpoint": search_checkpoint(args),
    }


def run_find(args: argparse.Namespace, pairs: Any, load: Callable[[], Any]) -> None:
    """Search, print what came out, and write the files."""
    from grains_tl.finding.api import find_vector

    folder, given = Path(args.out), search_arguments(args)
    records = pairs if args.split is None else _parts(pairs, args.split)
    folder.mkdir(parents=True, exist_ok=True)
    found = find_vector(load(), records, **given)
    print(found.verdict)
    for path in write_report(found, folder):
        print(path)


def _parts(pairs: Any, column: str) -> dict[str, list[Any]]:
    """The records by what a column says."""
    parts: dict[str, list[Any]] = {}
    for number, pair in enumerate(pairs, start=1):
        if column not in pair.meta:
            raise ValueError(
                f"--split {column}: record {number} does not have this column; its columns are {sorted(pair.meta)}"
            )
        parts.setdefault(str(pair.meta[column]), []).append(pair)
    return parts


def write_report(found: Any, folder: Path) -> list[Path]:
    """``report.html``, ``table.csv`` and ``vectors.safetensors``, each complete or not there."""
    from grains_tl._util.files import write_atomically
    from grains_tl.plotting.html import page

    return [
        write_atomically(folder / "report.html", page("Search for a steering vector", _body(found)).encode()),
        write_atomically(folder / "table.csv", found.table.to_csv(index=False).encode()),
        found.save(folder / "vectors.safetensors"),
    ]


def _body(found: Any) -> str:
    """The verdict, then the evidence: effects beside controls, where they were looked for, and texts."""
    from grains_tl._util.html import text
    from grains_tl.plotting.effects import plot_layers
    from grains_tl.plotting.html import image, nothing, settings_table

    sentences = "".join(f"<p>{text(sentence)}</p>" for sentence in found.verdict.splitlines())
    # of the two steps that were tried at a layer, the better one
    tried = found.search.sort_values("effect").drop_duplicates(["recipe", "layer"], keep="last").sort_values("layer")
    tried = tried.assign(vector=tried["recipe"])[["layer", "vector", "effect", "se", "n"]]
    layers = plot_layers(tried, int(found.best.layers[0]), label="effect on the choosing records, nats")
    texts = found.examples_html() if found.examples else nothing("No continuations were asked for.")
    return f"""<h1>Search for a steering vector</h1>
<div class="verdicts">{sentences}</div>
<h2>On records that neither built nor chose it</h2>
{found.table_html()}
<figure>{image(found.plot(), "Effect of each recipe beside the draws of the controls")}</figure>
<h2>Where it was looked for</h2>
<figure>{image(layers, "Effect over layers on the choosing records")}
<figcaption>The better of the two steps that were tried at a layer, within the budget of KL.</figcaption></figure>
<h2>Continuations</h2>
<p class="note">Prompts of the report records; tinted words differ from the unsteered text.</p>
{texts}
<h2>Settings</h2>
{settings_table(found.about)}"""
