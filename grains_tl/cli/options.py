"""Option groups that the commands share, and what is made of them: the model, the records, the attribution method."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from grains_tl._util.checks import finite


def add_command(commands: Any, name: str, said: str, *examples: str, **options: Any) -> argparse.ArgumentParser:
    """A command with its sentence in both helps, and with examples at the end of its own."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=said,
        description=textwrap.fill(f"{said[0].upper()}{said[1:]}."),
        epilog="\n".join(["examples:" if len(examples) > 1 else "example:", *(f"  grains-tl {e}" for e in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    return parser


def add_model_options(parser: argparse.ArgumentParser, default: str | None = "smollm2") -> None:
    """Which model, and how it is loaded."""
    said = default or "the one named in the vectors"
    parser.add_argument(
        "--model", default=default, help=f"smollm2, tiny-vlm, or a Hugging Face name or folder (default {said})"
    )
    parser.add_argument("--path", help="read the weights from a .gguf file or a folder")
    parser.add_argument(
        "--kind",
        default="bridge",
        choices=["bridge", "hooked"],
        help="TransformerLens class: TransformerBridge or HookedTransformer (default bridge)",
    )
    parser.add_argument(
        "--device", help="torch device (default cpu, or what the launcher gives to each of several processes)"
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float16"],
        help="dtype of the weights (default float32)",
    )
    parser.add_argument(
        "--autocast",
        action="store_true",
        help="run the blocks' matrix products in bfloat16 and all else in --dtype: faster where the processor has them",
    )
    parser.add_argument("--threads", type=positive, help="number of torch threads (default: torch's own choice)")


def add_search_options(
    parser: argparse.ArgumentParser, recipes: str, recipes_said: str, layers_said: str, alphas: Sequence[float]
) -> None:
    """What a search tries and may spend; recipes and alphas as they are by default, and where layers come from."""
    parser.add_argument("--recipes", default=recipes, help=f"{recipes_said} (default %(default)s)")
    parser.add_argument(
        "--kl", type=float, default=0.05, help="KL that may be spent, nats per token of neutral text (default 0.05)"
    )
    parser.add_argument("--layers", type=layer_list, help=f"layers to try, e.g. 12,18 or 10-20 (default {layers_said})")
    parser.add_argument(
        "--alphas",
        type=number_list,
        default=list(alphas),
        help="step sizes at which the KL is measured, fractions of the residual norm "
        f"(default {','.join(map(str, alphas))})",
    )
    parser.add_argument("--draws", type=int, default=8, help="draws of each control (default 8)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and of the draws (default 0)")


def add_pair_options(parser: argparse.ArgumentParser) -> None:
    """The records."""
    parser.add_argument("--pairs", required=True, help="preference records: .jsonl, .json or .csv")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="FIELD=COLUMN",
        help="which column holds prompt, chosen, rejected or image: a column name, or a template such as "
        "'prompt=Q: {Question}\\nA:'",
    )
    parser.add_argument("--limit", type=positive, help="use the first N records")


def add_attribution_options(parser: argparse.ArgumentParser) -> None:
    """The attribution method and its settings."""
    from typing import get_args

    from grains_tl.attribution.gradient_methods import Nodes
    from grains_tl.attribution.methods import METHODS
    from grains_tl.attribution.reference import REFERENCES
    from grains_tl.hooks.mask import Masker
    from grains_tl.inference.objectives import Objective

    parser.add_argument(
        "--method", default="leave_one_out", choices=list(METHODS), help="attribution method (default leave_one_out)"
    )
    parser.add_argument("--n-steps", type=positive, default=32, help="gradients or draws per record (default 32)")
    parser.add_argument(
        "--reference",
        "--baseline",
        choices=[*REFERENCES, "neutral"],
        help="where the path of a gradient method begins (default function_words; the paper: zero)",
    )
    parser.add_argument(
        "--nodes", choices=get_args(Nodes), help="how integrated gradients place their steps (default adaptive)"
    )
    parser.add_argument(
        "--objective",
        default="sum",
        choices=get_args(Objective),
        help="how the response's tokens are combined (default sum)",
    )
    parser.add_argument(
        "--masker",
        default="mean_embedding",
        choices=get_args(Masker),
        help="what replaces a masked token (default mean_embedding)",
    )


def layer_list(text: str) -> list[int]:
    """``12,18`` or ``10-20`` as numbers."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            layers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 12,18 or 10-20") from None
    if not layers:
        raise argparse.ArgumentTypeError(f"{text!r} contains no layer; write the lower one first, as in 10-20")
    return layers


def number_list(text: str) -> list[float]:
    """``-0.2,0.2`` as finite numbers."""
    try:
        return [finite("number", float(part)) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of finite numbers such as -0.2,0.2") from None


def one_number(text: str) -> float:
    """One finite number."""
    try:
        return finite("number", float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not one finite number such as 0.3") from None


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def file_path(text: str) -> str:
    """A path that is not a folder."""
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name a file in it")
    return text


def load(args: argparse.Namespace, name: str | None = None) -> Any:
    """The model that the options name, by default the one named in the vectors."""
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


def autocast(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """bfloat16 products where ``--autocast`` asks for them."""
    if not args.autocast:
        return nullcontext()
    import torch

    from grains_tl._util.processes import launched_device

    return torch.autocast(torch.device(args.device or launched_device()).type, dtype=torch.bfloat16)


def load_records(args: argparse.Namespace) -> Any:
    """The preference records of ``--pairs``."""
    from grains_tl.records.loading import load_pairs

    return load_pairs(args.pairs, columns(args), limit=args.limit)


def columns(args: argparse.Namespace) -> dict[str, str]:
    """``--column FIELD=COLUMN`` as a mapping."""
    columns = {}
    for item in args.column:
        field, equals, column = item.partition("=")
        if not equals:
            raise ValueError(f"--column {item!r}: write FIELD=COLUMN, e.g. chosen=best_answer")
        columns[field] = column.replace("\\n", "\n")
    return columns


def chosen_method(args: argparse.Namespace) -> Any:
    """The attribution method; options of paths go to the methods that have them."""
    from grains_tl.attribution.methods import method_of

    return method_of(args.method, shared={"n_steps": args.n_steps, "reference": args.reference, "nodes": args.nodes})
