"""The same things from a shell: ``grains-tl demo | find | audit | build | steer | sweep | export | attribute``, and more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grains_tl.cli.audit import add_audit_options, audit_checkpoint, run_audit
from grains_tl.cli.export import add_export, run_export
from grains_tl.cli.find import add_find_options, find_checkpoint, run_find
from grains_tl.cli.options import (
    add_attribution_options,
    add_model_options,
    add_pair_options,
    autocast,
    chosen_method,
    columns,
    file_path,
    layer_list,
    load,
    load_records,
    number_list,
    one_number,
    positive,
)
from grains_tl.cli.sweep import add_sweep_options, sweep_checkpoint

EXAMPLES = """examples:
  grains-tl demo --quick
  grains-tl demo --model tiny-vlm
  grains-tl find --pairs pairs.jsonl --out refusal
  grains-tl audit happy.gguf --model smollm2 --pairs pairs.jsonl --out audit
  grains-tl build --pairs pairs.jsonl --model smollm2 --out vectors.safetensors
  grains-tl steer --vectors vectors.safetensors --prompt "The film was" --layer 18 --alpha 0.3

csv with other column names:
  grains-tl build --pairs truthfulqa.csv --out v.safetensors --column 'prompt=Question: {Question}\\nAnswer:' \\
      --column 'chosen= {Best Answer}' --column 'rejected= {Incorrect Answers[0]}' --limit 50
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``grains-tl``; returns the exit status.

    0; 2 for input that was refused, 130 for an interruption; with ``audit`` 1 for a vector that is not shown to steer.
    """
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with autocast(args):
            status: int | None = args.run(args)
    except (ValueError, KeyError, FileNotFoundError, ImportError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"grains-tl {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = _finished(args)
        said = f"; what was finished is in {kept}, and the same command goes on from it" if kept else ""
        print(f"\ngrains-tl {args.command}: interrupted{said}", file=sys.stderr)
        return 130
    return status or 0


def _finished(args: argparse.Namespace) -> Path | None:
    """The file or folder that holds finished results, if there is one yet."""
    place: Path | None = None
    if args.command == "build":
        place = _partial(args)
    elif args.command == "sweep":
        place = sweep_checkpoint(args)
    elif args.command == "find":
        place = find_checkpoint(args)
    elif args.command == "audit":
        place = audit_checkpoint(args)
    elif args.command in ("demo", "compare-attributions"):
        place = Path(args.out)
    return place if place is not None and place.exists() else None


def _partial(args: argparse.Namespace) -> Path:
    """Where ``build`` keeps finished attributions until the vectors are there."""
    return Path(f"{args.out}.partial.jsonl")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grains-tl",
        description="Attribute a preference to input tokens, build steering vectors from it, steer, and measure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_demo(commands)
    _add_find(commands)
    _add_audit(commands)
    _add_build(commands)
    _add_steer(commands)
    _add_sweep(commands)
    _add_export(commands)
    _add_attribute(commands)
    from grains_tl.cli.compare import add_parser

    add_parser(commands, add_model_options).set_defaults(run=_compare)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="the main job on the bundled model and data; writes report.html")
    demo.add_argument("--quick", action="store_true", help="fewer records and layers: two minutes instead of fifteen")
    demo.add_argument("--out", default="grains-tl-demo", help="folder for report.html and results.json")
    demo.add_argument(
        "--set", action="append", choices=["sentiment", "misconceptions"], help="only this set (repeatable)"
    )
    add_model_options(demo)
    demo.set_defaults(run=_demo)


def _add_find(commands: Any) -> None:
    find = commands.add_parser("find", help="from your own pairs to a vector that steers, with the evidence")
    add_find_options(find, layer_list, number_list)
    add_pair_options(find)
    add_model_options(find)
    find.set_defaults(run=lambda args: run_find(args, load_records(args), lambda: load(args)))


def _add_audit(commands: Any) -> None:
    audit = commands.add_parser(
        "audit", help="what a vector from anywhere does; exit status 0 if it steers, 1 if that is not shown"
    )
    add_audit_options(audit, layer_list, number_list)
    add_pair_options(audit)
    add_model_options(audit)
    audit.set_defaults(run=lambda args: run_audit(args, load_records(args)))


def _add_build(commands: Any) -> None:
    build = commands.add_parser("build", help="steering vectors from preference pairs")
    build.add_argument("--out", required=True, type=file_path, help="file to write, e.g. vectors.safetensors")
    build.add_argument("--top-k", type=positive, default=2, help="tokens masked on each side (default 2)")
    build.add_argument("--reduce", default="mean", choices=["mean", "svd", "pca"])
    build.add_argument("--readout", default="prompt_end", choices=["prompt_end", "response_end", "response_mean"])
    build.add_argument("--layers", type=layer_list, help="e.g. 12,18 or 10-20; default all")
    build.add_argument("--group-by", choices=["word", "sentence"], help="choose words or sentences instead of tokens")
    add_pair_options(build)
    add_attribution_options(build)
    add_model_options(build)
    build.set_defaults(run=_build)


def _add_steer(commands: Any) -> None:
    steer = commands.add_parser("steer", help="base and steered continuation side by side")
    steer.add_argument("--vectors", required=True, help="file written by build")
    steer.add_argument("--prompt", required=True, action="append", help="text to continue (repeatable)")
    steer.add_argument("--layer", type=layer_list, help="layer or layers to steer; default the middle one stored")
    steer.add_argument("--alpha", type=one_number, default=0.3, help="fraction of the residual norm (default 0.3)")
    steer.add_argument("--operator", default="add_renorm", choices=["add_renorm", "add", "ablate", "clamp"])
    steer.add_argument("--positions", default="all", choices=["all", "prompt", "generated", "last"])
    steer.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    steer.add_argument("--max-new-tokens", type=positive, default=40)
    add_model_options(steer, default=None)
    steer.set_defaults(run=_steer)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="effect and cost over layers and alphas, a choice, and its report")
    add_sweep_options(sweep, layer_list, number_list)
    add_pair_options(sweep)
    add_model_options(sweep, default=None)
    sweep.set_defaults(run=_sweep)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="vectors for llama.cpp, Hugging Face or vLLM")
    add_export(export, layer_list)
    add_model_options(export, default=None)
    export.set_defaults(run=lambda args: run_export(args, load))


def _add_attribute(commands: Any) -> None:
    attribute = commands.add_parser("attribute", help="which tokens of each prompt push towards chosen or rejected")
    add_pair_options(attribute)
    add_attribution_options(attribute)
    add_model_options(attribute)
    attribute.set_defaults(run=_attribute)


def _demo(args: argparse.Namespace) -> None:
    if args.model == "tiny-vlm":
        _vision_demo(args)
        return
    from dataclasses import replace

    from grains_tl.demo.one_set import DemoSettings
    from grains_tl.demo.text import QUICK, run_demo, summary

    settings = QUICK if args.quick else DemoSettings()
    if args.set:
        settings = replace(settings, sets=tuple(args.set))
    results = run_demo(load(args), args.out, settings)
    print(summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")


def _vision_demo(args: argparse.Namespace) -> None:
    from grains_tl.demo.vision import VISION_QUICK, VisionDemoSettings, run_vision_demo, vision_summary

    if args.set:
        raise ValueError("--set cannot be used with tiny-vlm, whose demo makes its own scenes; leave it out")
    results = run_vision_demo(load(args), args.out, VISION_QUICK if args.quick else VisionDemoSettings())
    print(vision_summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")


def _build(args: argparse.Namespace) -> None:
    from grains_tl._util.processes import files, finish, launched
    from grains_tl.vectors.build import build_vectors

    pairs = load_records(args)
    processes = launched()
    checkpoint = _partial(args)
    vectors = build_vectors(
        load(args),
        pairs,
        top_k=args.top_k,
        method=chosen_method(args),
        reduce=args.reduce,
        layers=args.layers,
        objective=args.objective,
        mask=args.masker,
        readout=args.readout,
        group_by=args.group_by,
        checkpoint=checkpoint,
        processes=processes,
        progress=processes.rank == 0,
    )
    finish()
    if processes.rank > 0:
        return
    path = vectors.save(args.out)
    for file in files(checkpoint):
        file.unlink()
    print(f"{path}: {len(vectors.layers)} layers x d_model {vectors.directions.shape[1]} from {len(pairs)} records")
    print(f"tokens: {vectors.info['token_rules']}")
    if vectors.info["moved_borders"]:
        print(f"{vectors.info['moved_borders']} records have a token across prompt and response; scored from before it")
    gap = vectors.info["median_relative_gap"]
    if gap is not None:
        share = vectors.info["converged_share"]
        print(
            f"median completeness gap {100 * gap:.0f} % of |f(x) - f(x')|; under 5 % in {100 * share:.0f} % of records"
        )


def _steer(args: argparse.Namespace) -> None:
    from grains_tl.inference.generation import generate
    from grains_tl.vectors.files import load_vectors

    vectors = load_vectors(args.vectors)
    layers = args.layer or [vectors.layers[len(vectors.layers) // 2]]
    # refuses bad options now, not after the model is loaded and has written the base text
    steering = vectors.steering(args.alpha, layers, operator=args.operator, positions=args.positions)
    if not all(prompt.strip() for prompt in args.prompt):
        raise ValueError("--prompt is empty; expected some text")
    model = load(args, vectors.info.get("model", {}).get("name"))
    vectors.require_match(model)
    prompts = [[{"role": "user", "content": p}] if args.chat else p for p in args.prompt]

    base = generate(model, prompts, max_new_tokens=args.max_new_tokens)
    steered = generate(model, prompts, steering, max_new_tokens=args.max_new_tokens)
    what = f"steered: alpha {args.alpha:+g}, layer {', '.join(map(str, layers))}"
    what += "" if args.operator == "add_renorm" else f", {args.operator}"
    what += "" if args.positions == "all" else f", {args.positions}"
    for prompt, before, after in zip(args.prompt, base, steered, strict=True):
        print(f"prompt: {prompt}")
        print(side_by_side(before, after, ("base", what)))


def side_by_side(left: str, right: str, titles: tuple[str, str], width: int = 56) -> str:
    """Two texts as two columns.

    Examples:
        >>> print(side_by_side("a b", "c", ("one", "two"), width=4))
        one  | two
        ---- | ----
        a b  | c
    """
    import itertools
    import textwrap

    columns = [
        [t[:width], "-" * width, *(textwrap.wrap(x, width) or [""])] for t, x in zip(titles, (left, right), strict=True)
    ]
    return "\n".join(f"{a:<{width}} | {b}" for a, b in itertools.zip_longest(*columns, fillvalue=""))


def _sweep(args: argparse.Namespace) -> None:
    from grains_tl.cli.sweep import run_sweep

    test = load_records(argparse.Namespace(pairs=args.test, column=args.column, limit=None)) if args.test else []
    run_sweep(args, load_records(args), test, lambda name: load(args, name))


def _attribute(args: argparse.Namespace) -> None:
    from grains_tl.attribution.store import attribute_records
    from grains_tl.tokens.pairs import tokenize_pairs

    pairs = load_records(args)
    model = load(args)
    found = attribute_records(
        model, tokenize_pairs(model, pairs), chosen_method(args), objective=args.objective, mask=args.masker
    )
    for number, a in enumerate(found, start=1):
        print(f"record {number}: {a}")


def _compare(args: argparse.Namespace) -> None:
    from grains_tl.cli.compare import run
    from grains_tl.records.loading import load_pairs

    run(args, load, lambda path, limit: load_pairs(path, columns(args), limit=limit))


if __name__ == "__main__":
    sys.exit(main())
