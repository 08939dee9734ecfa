"""``grains-tl steer``."""

from __future__ import annotations

import argparse

from grains_tl.cli.options import add_model_options, layer_list, load, one_number, positive


def add_steer_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--vectors", required=True, help="file written by build")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue (repeatable)")
    parser.add_argument(
        "--layer", type=layer_list, help="layer or layers to steer (default the middle one that is stored)"
    )
    parser.add_argument(
        "--alpha", type=one_number, default=0.3, help="step size, a fraction of the residual norm (default 0.3)"
    )
    parser.add_argument(
        "--operator",
        default="add_renorm",
        choices=["add_renorm", "add", "rotate", "clip", "ablate", "match", "clamp"],
        help="how the step is applied (default add_renorm)",
    )
    parser.add_argument(
        "--positions",
        default="all",
        choices=["all", "prompt", "generated", "last"],
        help="which positions are steered (default all)",
    )
    parser.add_argument("--chat", action="store_true", help="send the prompt through the chat template")
    parser.add_argument("--max-new-tokens", type=positive, default=40, help="tokens to generate (default 40)")
    add_model_options(parser, default=None)


def run_steer(args: argparse.Namespace) -> None:
    """Continue every prompt without and with the step."""
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
    what += "" if vectors.site == "resid_post" else f", {vectors.site}"
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
