"""``grains-tl plan``: what a build and a sweep will take on a model of which no weights are needed."""

from __future__ import annotations

import argparse
from dataclasses import asdict


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``plan`` alone."""
    from grains_tl.cli.options import positive
    from grains_tl.finding.workload import ALL_JOBS, USUAL_JOBS, Workload
    from grains_tl.models.shapes import SHAPES

    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--model", choices=list(SHAPES), help="a known shape (default llama-3.1-8b)")
    shape.add_argument("--config", metavar="FILE", help="a config.json of any model, or the folder it is in")
    said = {
        "records": "building records, which the sweep measures too",
        "prompt_tokens": "text tokens of a prompt",
        "response_tokens": "tokens of either response",
        "image_tokens": "tokens of a picture in front of the text, a square number (qwen2.5-vl-7b)",
        "steps": "gradients per record, for methods that take steps",
        "alphas": "step sizes of the sweep, which goes over all layers",
    }
    for name, default in asdict(Workload()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=default, help=f"{said[name]} (default {default})"
        )
    parser.add_argument("--max-tokens", type=positive, default=4096, help="token budget of one pass (default 4096)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights (default bfloat16)",
    )
    parser.add_argument(
        "--job",
        action="append",
        choices=ALL_JOBS,
        help=f"a build by its method or recipe, or the sweep (repeatable; default {', '.join(USUAL_JOBS)})",
    )


def run_plan(args: argparse.Namespace) -> None:
    """Print the plan."""
    import torch

    from grains_tl.finding.planning import plan_run
    from grains_tl.finding.workload import USUAL_JOBS, Workload

    workload = Workload(**{name: getattr(args, name) for name in asdict(Workload())})
    print(
        plan_run(
            args.config or args.model or "llama-3.1-8b",
            workload,
            jobs=args.job or USUAL_JOBS,
            dtype=getattr(torch, args.dtype),
            max_tokens=args.max_tokens,
        )
    )
