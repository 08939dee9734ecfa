"""``grains-tl steer``."""

from __future__ import annotations

import argparse
from typing import Any

from grains_tl.cli.options import add_model_options, layer_list, load, one_number, positive


def add_steer_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--vectors", required=True, help="file written by build or find")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue (repeatable)")
    parser.add_argument(
        "--layer",
        type=layer_list,
        help="layer or layers to steer (default what the file was saved with, else the middle one that is stored)",
    )
    parser.add_argument(
        "--alpha",
        type=one_number,
        help="step size, a fraction of the residual norm (default what the file was saved with, else 0.3)",
    )
    parser.add_argument(
        "--operator",
        choices=["add_renorm", "add", "rotate", "clip", "ablate", "match", "clamp"],
        help="how the step is applied (default what the file was saved with, else add_renorm)",
    )
    parser.add_argument(
        "--positions",
        choices=["all", "prompt", "generated", "last"],
        help="which positions are steered (default what the file was saved with, else all)",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=40, help="tokens to generate (default 40)")
    add_model_options(parser, default=None)


def run_steer(args: argparse.Namespace) -> None:
    """Continue every prompt without and with the step."""
    from grains_tl.inference.generation import generate
    from grains_tl.vectors.files import load_vectors

    vectors = load_vectors(args.vectors)
    steering = _steering(args, vectors)  # refuses bad options now, not after the model is loaded
    if not all(prompt.strip() for prompt in args.prompt):
        raise ValueError("--prompt is empty; expected some text")
    model = load(args, vectors.info.get("model", {}).get("name"))
    vectors.require_match(model)
    prompts = [[{"role": "user", "content": p}] if args.chat else p for p in args.prompt]

    base = generate(model, prompts, max_new_tokens=args.max_new_tokens)
    steered = generate(model, prompts, steering, max_new_tokens=args.max_new_tokens)
    what = f"steered: {steering.label.partition(', ')[2]}"
    for prompt, before, after in zip(args.prompt, base, steered, strict=True):
        print(f"prompt: {prompt}")
        print(side_by_side(before, after, ("base", what)))


def _steering(args: argparse.Namespace, vectors: Any) -> Any:
    """What the options name; what they leave out is taken from the file's own choice, where it was saved with one."""
    given = {
        "alpha": args.alpha,
        "layers": args.layer,
        "operator": args.operator,
        "positions": args.positions,
    }
    given = {name: value for name, value in given.items() if value is not None}
    chosen = vectors.chosen
    if chosen is None:
        middle = [vectors.layers[len(vectors.layers) // 2]]
        return vectors.steering(**{"alpha": 0.3, "layers": middle, **given})
    kept = {name: getattr(chosen, name) for name in ("alpha", "layers", "operator", "positions", "scale", "gate")}
    return vectors.steering(**{**kept, **given})


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
