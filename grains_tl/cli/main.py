"""The same things from a shell: ``grains-tl demo | find | build | steer | sweep | export | attribute``, and more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from grains_tl._util.checks import finite
from grains_tl.cli.export import add_export, run_export
from grains_tl.cli.find import add_find_options, find_checkpoint, run_find
from grains_tl.cli.sweep import add_sweep_options, sweep_checkpoint

EXAMPLES = """examples:
  grains-tl demo --quick
  grains-tl demo --model tiny-vlm
  grains-tl find --pairs pairs.jsonl --out refusal
  grains-tl build --pairs pairs.jsonl --model smollm2 --out vectors.safetensors
  grains-tl steer --vectors vectors.safetensors --prompt "The film was" --layer 18 --alpha 0.3

csv with other column names:
  grains-tl build --pairs truthfulqa.csv --out v.safetensors --column 'prompt=Question: {Question}\\nAnswer:' \\
      --column 'chosen= {Best Answer}' --column 'rejected= {Incorrect Answers[0]}' --limit 50
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``grains-tl``; returns the exit status (2 for input that was refused)."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with _autocast(args):
            args.run(args)
    except (ValueError, KeyError, FileNotFoundError, ImportError, OSError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"grains-tl {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = _finished(args)
        said = f"; what was finished is in {kept}, and the same command goes on from it" if kept else ""
        print(f"\ngrains-tl {args.command}: interrupted{said}", file=sys.stderr)
        return 130
    return 0


def _finished(args: argparse.Namespace) -> Path | None:
    """The file or folder that holds finished results, if there is one yet."""
    place: Path | None = None
    if args.command == "build":
        place = _partial(args)
    elif args.command == "sweep":
        place = sweep_checkpoint(args)
    elif args.command == "find":
        place = find_checkpoint(args)
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

    demo = commands.add_parser("demo", help="the main job on the bundled model and data; writes report.html")
    demo.add_argument("--quick", action="store_true", help="fewer records and layers: two minutes instead of fifteen")
    demo.add_argument("--out", default="grains-tl-demo", help="folder for report.html and results.json")
    demo.add_argument(
        "--set", action="append", choices=["sentiment", "misconceptions"], help="only this set (repeatable)"
    )
    _model_options(demo)
    demo.set_defaults(run=_demo)

    find = commands.add_parser("find", help="from your own pairs to a vector that steers, with the evidence")
    add_find_options(find, _layers, _numbers)
    _pair_options(find)
    _model_options(find)
    find.set_defaults(run=lambda args: run_find(args, _pairs(args), lambda: _load(args)))

    build = commands.add_parser("build", help="steering vectors from preference pairs")
    build.add_argument("--out", required=True, type=_file, help="file to write, e.g. vectors.safetensors")
    build.add_argument("--top-k", type=_positive, default=2, help="tokens masked on each side (default 2)")
    build.add_argument("--reduce", default="mean", choices=["mean", "svd", "pca"])
    build.add_argument("--readout", default="prompt_end", choices=["prompt_end", "response_end", "response_mean"])
    build.add_argument("--layers", type=_layers, help="e.g. 12,18 or 10-20; default all")
    build.add_argument("--group-by", choices=["word", "sentence"], help="choose words or sentences instead of tokens")
    _pair_options(build)
    _attribution_options(build)
    _model_options(build)
    build.set_defaults(run=_build)

    steer = commands.add_parser("steer", help="base and steered continuation side by side")
    steer.add_argument("--vectors", required=True, help="file written by build")
    steer.add_argument("--prompt", required=True, action="append", help="text to continue (repeatable)")
    steer.add_argument("--layer", type=_layers, help="layer or layers to steer; default the middle one stored")
    steer.add_argument("--alpha", type=_number, default=0.3, help="fraction of the residual norm (default 0.3)")
    steer.add_argument("--operator", default="add_renorm", choices=["add_renorm", "add", "ablate", "clamp"])
    steer.add_argument("--positions", default="all", choices=["all", "prompt", "generated", "last"])
    steer.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    steer.add_argument("--max-new-tokens", type=_positive, default=40)
    _model_options(steer, default=None)
    steer.set_defaults(run=_steer)

    sweep = commands.add_parser("sweep", help="effect and cost over layers and alphas, a choice, and its report")
    add_sweep_options(sweep, _layers, _numbers)
    _pair_options(sweep)
    _model_options(sweep, default=None)
    sweep.set_defaults(run=_sweep)

    export = commands.add_parser("export", help="vectors for llama.cpp, Hugging Face or vLLM")
    add_export(export, _layers)
    _model_options(export, default=None)
    export.set_defaults(run=lambda args: run_export(args, _load))

    attribute = commands.add_parser("attribute", help="which tokens of each prompt push towards chosen or rejected")
    _pair_options(attribute)
    _attribution_options(attribute)
    _model_options(attribute)
    attribute.set_defaults(run=_attribute)

    from grains_tl.cli.compare import add_parser

    add_parser(commands, _model_options).set_defaults(run=_compare)
    return parser


def _model_options(parser: argparse.ArgumentParser, default: str | None = "smollm2") -> None:
    said = default or "the one named in the vectors"
    parser.add_argument(
        "--model", default=default, help=f"smollm2, tiny-vlm, or a Hugging Face name or folder (default {said})"
    )
    parser.add_argument("--path", help="weights: a .gguf file or a folder")
    parser.add_argument("--kind", default="bridge", choices=["bridge", "hooked"], help="TransformerLens class")
    parser.add_argument("--device", help="default cpu, or what the launcher gives to each of several processes")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="the blocks' matrix products in bfloat16, all else in --dtype: faster where the processor has them",
    )
    parser.add_argument("--threads", type=_positive, help="torch threads (default: torch's own choice)")


def _pair_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", required=True, help="preference records: .jsonl, .json or .csv")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="where prompt, chosen, rejected, image stand: a column name or a template such as 'prompt=Q: {Question}\\nA:'",
    )
    parser.add_argument("--limit", type=_positive, help="use the first N records")


def _attribution_options(parser: argparse.ArgumentParser) -> None:
    from typing import get_args

    from grains_tl.attribution.methods import METHODS, Nodes
    from grains_tl.attribution.reference import REFERENCES
    from grains_tl.hooks.mask import Masker
    from grains_tl.inference.objectives import Objective

    parser.add_argument("--method", default="leave_one_out", choices=list(METHODS))
    parser.add_argument("--n-steps", type=_positive, default=32, help="gradients or draws per record (default 32)")
    parser.add_argument(
        "--reference",
        "--baseline",
        choices=[*REFERENCES, "neutral"],
        help="where a path begins (default function_words; the paper: zero)",
    )
    parser.add_argument("--nodes", choices=get_args(Nodes), help="of integrated gradients (default adaptive)")
    parser.add_argument("--objective", default="sum", choices=get_args(Objective))
    parser.add_argument("--masker", default="mean_embedding", choices=get_args(Masker))


def _layers(text: str) -> list[int]:
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            layers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 12,18 or 10-20") from None
    if not layers:
        raise argparse.ArgumentTypeError(f"{text!r} has no layer in it; write the lower one first, as in 10-20")
    return layers


def _numbers(text: str) -> list[float]:
    try:
        return [finite("number", float(part)) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of finite numbers such as -0.2,0.2") from None


def _number(text: str) -> float:
    try:
        return finite("number", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one finite number such as 0.3") from None


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _file(text: str) -> str:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    return text


def _load(args: argparse.Namespace, name: str | None = None) -> Any:
    import torch

    from grains_tl._util.processes import launched_device
    from grains_tl.models.loading import load_model

    if args.threads:
        torch.set_num_threads(args.threads)
    return load_model(
        args.model or name or "smollm2",
        kind=args.kind,
        path=args.path,
        device=args.device or launched_device(),
        dtype=getattr(torch, args.dtype),
    )


def _autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    if not args.autocast:
        return nullcontext()
    import torch

    from grains_tl._util.processes import launched_device

    return torch.autocast(torch.device(args.device or launched_device()).type, dtype=torch.bfloat16)


def _pairs(args: argparse.Namespace) -> Any:
    from grains_tl.records.loading import load_pairs

    return load_pairs(args.pairs, _columns(args), limit=args.limit)


def _columns(args: argparse.Namespace) -> dict[str, str]:
    columns = {}
    for item in args.column:
        field, equals, column = item.partition("=")
        if not equals:
            raise ValueError(f"--column {item!r}: write FIELD=COLUMN, e.g. chosen=best_answer")
        columns[field] = column.replace("\\n", "\n")
    return columns


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
    results = run_demo(_load(args), args.out, settings)
    print(summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")


def _vision_demo(args: argparse.Namespace) -> None:
    from grains_tl.demo.vision import VISION_QUICK, VisionDemoSettings, run_vision_demo, vision_summary

    if args.set:
        raise ValueError("--set is for text models; the tiny-vlm demo makes its own scenes")
    results = run_vision_demo(_load(args), args.out, VISION_QUICK if args.quick else VisionDemoSettings())
    print(vision_summary(results))
    print(f"\n{results['seconds']:.0f} s; open {Path(args.out) / 'report.html'} (numbers in results.json beside it)")


def _method(args: argparse.Namespace) -> Any:
    """The attribution method; path options go to the methods that have them."""
    from dataclasses import fields

    from grains_tl.attribution.methods import METHODS, method_of

    known = {f.name for f in fields(METHODS[args.method])}
    given = {"n_steps": args.n_steps, "reference": args.reference, "nodes": args.nodes}
    return method_of(args.method, **{name: value for name, value in given.items() if name in known})


def _build(args: argparse.Namespace) -> None:
    from grains_tl._util.processes import files, finish, launched
    from grains_tl.vectors.build import build_vectors

    pairs = _pairs(args)
    processes = launched()
    checkpoint = _partial(args)
    vectors = build_vectors(
        _load(args),
        pairs,
        top_k=args.top_k,
        method=_method(args),
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
        raise ValueError("--prompt is empty; some text is needed")
    model = _load(args, vectors.info.get("model", {}).get("name"))
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

    test = _pairs(argparse.Namespace(pairs=args.test, column=args.column, limit=None)) if args.test else []
    run_sweep(args, _pairs(args), test, lambda name: _load(args, name))


def _attribute(args: argparse.Namespace) -> None:
    from grains_tl.attribution.store import attribute_records
    from grains_tl.tokens.pairs import tokenize_pairs

    pairs = _pairs(args)
    model = _load(args)
    found = attribute_records(
        model, tokenize_pairs(model, pairs), _method(args), objective=args.objective, mask=args.masker
    )
    for number, a in enumerate(found, start=1):
        print(f"record {number}: {a}")


def _compare(args: argparse.Namespace) -> None:
    from grains_tl.cli.compare import run
    from grains_tl.records.loading import load_pairs

    run(args, _load, lambda path, limit: load_pairs(path, _columns(args), limit=limit))


if __name__ == "__main__":
    sys.exit(main())
