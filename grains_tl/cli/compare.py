"""``grains-tl compare-attributions``: methods on several sets of records, as a table and a page with the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from grains_tl.cli.options import add_command

BUNDLED = ("sentiment", "misconceptions")

#: Columns of the printed table and of the page, with their headings.
SHOWN = {
    "method": "method",
    "relative_gap": "median gap / |f(x) - f(x')|",
    "converged": "converged",
    "steps": "runs",
    "relative_seconds": "time (gradient x input = 1)",
    "deletion_area": "deletion area",
    "insertion_area": "insertion area",
    "removed_chosen": "f falls without I+",
    "removed_rejected": "f rises without I-",
    "effect": "effect of the vector",
    "kl": "its KL",
}

#: sequential integrated gradients cost as many gradients for every token, and end at leave-one-out
DEFAULT_METHODS = (
    *("leave_one_out", "leave_k_out", "attention_aware", "integrated_gradients", "expected_gradients"),
    *("discretized_ig", "smoothgrad", "gradient_x_input"),
)

#: The table has eleven columns: wider than the text of other pages, and no number on two lines.
STYLE = "body { max-width: 1320px; } td { white-space: nowrap; } th { min-width: 4.2rem; }"


NOTE = (
    "Nats. Each value with its 95 % interval over records (1.96 standard errors). Larger is better for areas, falls, rises "
    "and effects. random_tokens: as many content tokens drawn by chance, mean over draws. Leave-one-out is favoured where "
    "tokens are taken out: it is built from that."
)


def add_parser(commands: Any, model_options: Callable[..., None]) -> argparse.ArgumentParser:
    """Add the command to the parser of ``grains-tl``."""
    from grains_tl.attribution.methods import METHODS
    from grains_tl.hooks.mask import Masker

    parser = add_command(
        commands,
        "compare-attributions",
        "compare attribution methods: completeness gap, time, faithfulness, effect of their vectors",
        "compare-attributions --pairs pairs.jsonl --methods leave_one_out,integrated_gradients --out compared",
    )
    parser.add_argument(
        "--pairs", action="append", default=[], help="preference records (repeatable): .jsonl, .json, .csv"
    )
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="which column of the --pairs files holds prompt, chosen or rejected: a column name or a template",
    )
    parser.add_argument(
        "--set", action="append", default=[], choices=BUNDLED, help="a bundled set (repeatable; default both)"
    )
    parser.add_argument("--limit", type=int, default=20, help="records of each set (default 20)")
    parser.add_argument("--eval-limit", type=int, default=20, help="further records to steer on (default 20, 0: none)")
    parser.add_argument(
        "--methods", default=",".join(DEFAULT_METHODS), help=f"comma-separated, of {', '.join(METHODS)}"
    )
    parser.add_argument("--n-steps", type=int, default=16, help="gradients per record of the path methods (default 16)")
    parser.add_argument("--top-k", type=int, default=2, help="tokens to take out on each side (default 2)")
    parser.add_argument(
        "--masker",
        default="mean_embedding",
        choices=get_args(Masker),
        help="what replaces a masked token (default mean_embedding)",
    )
    parser.add_argument("--layer", type=int, help="layer to steer (default two thirds of the way up)")
    parser.add_argument(
        "--alpha", type=float, default=0.2, help="step size, a fraction of the residual norm (default 0.2)"
    )
    parser.add_argument("--draws", type=int, default=5, help="draws of the random choice of tokens (default 5)")
    parser.add_argument("--out", default="grains-tl-comparison", help="folder for comparison.csv and comparison.html")
    model_options(parser)
    return parser


def run(args: argparse.Namespace, load: Callable[[argparse.Namespace], Any], read: Callable[[str, int], Any]) -> Path:
    """Compare on every set, print and write what is there after each of them.

    Args:
        args: of the command.
        load: makes the model from the arguments.
        read: reads so many records of a file.

    Returns:
        Path of the page.
    """
    import pandas as pd

    from grains_tl.attribution.methods import method_of
    from grains_tl.faithfulness.compare import compare_attributions
    from grains_tl.faithfulness.judging import Judging
    from grains_tl.models.identity import model_identity

    names = [name.strip() for name in args.methods.split(",") if name.strip()]
    methods = [method_of(name, shared={"n_steps": args.n_steps}) for name in names]
    if args.limit < 1 or args.eval_limit < 0:
        raise ValueError(f"--limit {args.limit} --eval-limit {args.eval_limit}: expected at least one record")
    files = [*args.pairs, *(args.set or ([] if args.pairs else BUNDLED))]
    stems = [Path(name).stem for name in files]  # what the table and the page call them
    if len(set(stems)) < len(stems):
        raise ValueError(f"--pairs, --set: several files share a name ({', '.join(stems)}); rename a file")
    sets = {name: _records(args, name, read) for name in files}
    model = load(args)
    folder = Path(args.out)
    checkpoint = folder / "attributions.partial.jsonl"  # an interrupted run goes on from it
    frames: list[Any] = []
    for name, (build, held_out) in sets.items():
        frame = compare_attributions(
            model,
            build,
            methods=methods,
            top_k=args.top_k,
            mask=args.masker,
            eval_pairs=held_out or None,
            judging=Judging(n_draws=args.draws, layer=args.layer, alpha=args.alpha),
            checkpoint=checkpoint,
        )
        frames.append(frame.assign(set=Path(name).stem))
        print(f"\n{name}: {len(build)} records, steered on {len(held_out)} others")
        print(pretty(frame).to_string(index=False))
        table = pd.concat(frames, ignore_index=True)
        about = {
            "model": model_identity(model)["name"],
            **{k: getattr(args, k) for k in ("top_k", "n_steps", "masker")},
        }
        page = write_page(table, folder, about)
    checkpoint.unlink(missing_ok=True)
    print(f"\nopen {page} (numbers in comparison.csv beside it)")
    return page


def pretty(frame: Any) -> Any:
    """The table for people: fewer columns, intervals in place of standard errors."""
    import pandas as pd

    columns = {}
    for name, heading in SHOWN.items():
        if name in frame.columns:
            errors = frame[f"{name}_se"] if f"{name}_se" in frame.columns else [None] * len(frame)
            columns[heading] = [_cell(name, v, e) for v, e in zip(frame[name], errors, strict=True)]
    return pd.DataFrame(columns)


def _cell(name: str, value: Any, se: float | None) -> str:
    if isinstance(value, str):
        return value
    if value != value:
        return "-"
    if name in ("relative_gap", "converged"):
        return f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"
    if name in ("steps", "relative_seconds"):
        return f"{value:.0f}" if name == "steps" else f"{value:.1f}"
    return f"{value:+.2f}" if se is None or se != se else f"{value:+.2f} \u00b1 {1.96 * se:.2f}"


def write_page(table: Any, folder: Path, about: dict[str, Any]) -> Path:
    """``comparison.csv`` and ``comparison.html`` (one file, no network) of a table with a column ``set``."""
    from grains_tl._util.files import write_atomically
    from grains_tl._util.html import text
    from grains_tl.plotting.attribution import plot_comparison
    from grains_tl.plotting.html import image, page

    sections = []
    for name, frame in table.groupby("set", sort=False):
        picture = image(plot_comparison(frame), f"methods compared on {name}")
        sections.append(
            f"<h2>{text(name)}</h2><p>{int(frame['n'].iloc[0])} records</p><figure>{picture}</figure>"
            f'<div class="wide">{pretty(frame).to_html(index=False, border=0, escape=True)}</div>'
        )
    said = "; ".join(f"{key} {value}" for key, value in about.items())
    body = (
        f'<h1>Attribution methods compared</h1><p class="note">{text(said)}</p><p>{text(NOTE)}</p>{"".join(sections)}'
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "comparison.csv", table.to_csv(index=False).encode())
    whole = page("Attribution methods compared", body, style=STYLE)
    return write_atomically(folder / "comparison.html", whole.encode("utf-8", "backslashreplace"))


def _records(args: argparse.Namespace, name: str, read: Callable[[str, int], Any]) -> tuple[list[Any], list[Any]]:
    """Records to attribute, and others to steer on: the choosing split of a bundled set, the next rows of a file."""
    if name in BUNDLED and name not in args.pairs:
        from grains_tl.records.loading import load_bundled

        return load_bundled(name, "build")[: args.limit], load_bundled(name, "choose")[: args.eval_limit]
    found = read(name, args.limit + args.eval_limit)
    return found[: args.limit], found[args.limit :]
