"""The same things from a shell: ``grains-tl demo | find | audit | build | steer | sweep | export | attribute``, and more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grains_tl import __version__
from grains_tl.cli.audit import add_audit_options, run_audit
from grains_tl.cli.build import add_build_options, build_checkpoint, run_build
from grains_tl.cli.demo import add_demo_options, run_demo_command
from grains_tl.cli.export import add_export, run_export
from grains_tl.cli.find import add_find_options, run_find, search_checkpoint
from grains_tl.cli.harness import run_lm_eval
from grains_tl.cli.options import (
    add_attribution_options,
    add_command,
    add_model_options,
    add_pair_options,
    autocast,
    chosen_method,
    columns,
    layer_list,
    load,
    load_records,
    number_list,
)
from grains_tl.cli.plan import add_plan_options, run_plan
from grains_tl.cli.push import add_push, run_push
from grains_tl.cli.steer import add_steer_options, run_steer
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
    words = list(sys.argv[1:] if argv is None else argv)
    # lm-eval reads its own options, --help among them
    args = _parser().parse_args(words[:1] if words[:1] == ["lm-eval"] else words)
    args.arguments = words[1:]
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
        place = build_checkpoint(args)
    elif args.command == "sweep":
        place = sweep_checkpoint(args)
    elif args.command in ("find", "audit"):
        place = search_checkpoint(args)
    elif args.command in ("demo", "compare-attributions"):
        place = Path(args.out)
    return place if place is not None and place.exists() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="grains-tl",
        description="Attribute a preference to input tokens, build steering vectors from it, steer, and measure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"grains-tl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_demo(commands)
    _add_find(commands)
    _add_audit(commands)
    _add_build(commands)
    _add_steer(commands)
    _add_sweep(commands)
    _add_export(commands)
    _add_push(commands)
    _add_lm_eval(commands)
    _add_attribute(commands)
    _add_plan(commands)
    from grains_tl.cli.compare import add_parser

    add_parser(commands, add_model_options).set_defaults(run=_compare)
    return parser


def _add_demo(commands: Any) -> None:
    said = "run the main job on the bundled model and data, and write report.html"
    demo = add_command(commands, "demo", said, "demo --quick", "demo --model tiny-vlm")
    add_demo_options(demo)
    demo.set_defaults(run=run_demo_command)


def _add_build(commands: Any) -> None:
    build = add_command(
        commands,
        "build",
        "build steering vectors from preference pairs, one for each layer",
        "build --pairs pairs.jsonl --model smollm2 --layers 12-24 --out vectors.safetensors",
        "build --pairs pairs.jsonl --recipe caa --out caa.safetensors",
    )
    add_build_options(build)
    build.set_defaults(run=run_build)


def _add_steer(commands: Any) -> None:
    steer = add_command(
        commands,
        "steer",
        "show how prompts continue with and without steering",
        'steer --vectors vectors.safetensors --prompt "The film was" --layer 18 --alpha 0.2',
        'steer --vectors refusal/vectors.safetensors --prompt "Write a fake receipt." --chat',
    )
    add_steer_options(steer)
    steer.set_defaults(run=run_steer)


def _add_find(commands: Any) -> None:
    find = add_command(
        commands,
        "find",
        "search for a vector that steers, from your own pairs, and show the evidence",
        "find --pairs pairs.jsonl --out refusal",
        "find --pairs pairs.csv --recipes caa,margin_gradient,random_direction --layers 10-20 --out refusal",
    )
    add_find_options(find)
    add_pair_options(find)
    add_model_options(find)
    find.set_defaults(run=lambda args: run_find(args, load_records(args), lambda: load(args)))


def _add_audit(commands: Any) -> None:
    audit = add_command(
        commands,
        "audit",
        "measure what a given vector does; exit status 0 if it steers, 1 if that is not shown",
        "audit happy.gguf --model smollm2 --pairs pairs.jsonl --out audit",
    )
    add_audit_options(audit)
    add_pair_options(audit)
    add_model_options(audit)
    audit.set_defaults(run=lambda args: run_audit(args, load_records(args), lambda: load(args)))


def _add_sweep(commands: Any) -> None:
    sweep = add_command(
        commands,
        "sweep",
        "measure effect and cost over layers and alphas, choose one setting, and report it on other records",
        "sweep --vectors vectors.safetensors --pairs held_out.jsonl --max-kl 0.1 --out sweep.csv",
        "sweep --vectors grains.safetensors --vectors caa.safetensors --pairs held_out.jsonl --layers 12,18",
    )
    add_sweep_options(sweep, layer_list, number_list)
    add_pair_options(sweep)
    add_model_options(sweep, default=None)
    sweep.set_defaults(run=_sweep)


def _add_export(commands: Any) -> None:
    export = add_command(
        commands,
        "export",
        "write vectors for llama.cpp, Hugging Face, vLLM and other engines",
        "export --vectors vectors.safetensors --format gguf --layer 21 --out vector.gguf",
        "export --vectors vectors.safetensors --format hf --layer 21 --alpha 0.2 --out steered",
    )
    add_export(export, layer_list)
    add_model_options(export, default=None)
    export.set_defaults(run=lambda args: run_export(args, load))


def _add_push(commands: Any) -> None:
    push = add_command(
        commands,
        "push",
        "upload vectors to a Hugging Face hub, with a card that says what they do",
        "push vectors.safetensors --repo owner/name --evidence audit/evidence.json --licence mit",
    )
    add_push(push)
    push.set_defaults(run=run_push, autocast=None)


def _add_lm_eval(commands: Any) -> None:
    said = "run lm-evaluation-harness, with --model grains_tl for a steered model (extra evals)"
    harness = add_command(commands, "lm-eval", said, "lm-eval run --help", add_help=False)
    harness.set_defaults(run=lambda args: run_lm_eval(args.arguments), autocast=None)


def _add_attribute(commands: Any) -> None:
    attribute = add_command(
        commands,
        "attribute",
        "show which tokens of each prompt push towards chosen or rejected",
        "attribute --pairs pairs.jsonl --limit 3",
        "attribute --pairs pairs.jsonl --method integrated_gradients --n-steps 64",
    )
    add_pair_options(attribute)
    add_attribution_options(attribute)
    add_model_options(attribute)
    attribute.set_defaults(run=_attribute)


def _add_plan(commands: Any) -> None:
    plan = add_command(
        commands,
        "plan",
        "estimate tokens, operations and memory of builds and a sweep on a model, without its weights",
        "plan --model llama-3.1-8b --records 100 --prompt-tokens 200",
    )
    add_plan_options(plan)
    plan.set_defaults(run=run_plan, autocast=False)


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
