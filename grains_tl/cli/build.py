"""``grains-tl build``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from grains_tl.cli.options import (
    add_attribution_options,
    add_model_options,
    add_pair_options,
    chosen_method,
    file_path,
    layer_list,
    load,
    load_records,
    positive,
)


def add_build_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from typing import get_args

    from grains_tl.hooks.sites import Site
    from grains_tl.vectors.recipes import RECIPES

    parser.add_argument(
        "--recipe",
        default="grains",
        choices=list(RECIPES),
        help="how records become vectors (default grains, the paper's, to which the options on attribution belong)",
    )
    parser.add_argument("--out", required=True, type=file_path, help="file to write, e.g. vectors.safetensors")
    parser.add_argument("--top-k", type=positive, help="tokens to mask on each side (default 2)")
    parser.add_argument(
        "--reduce",
        choices=["mean", "svd", "pca"],
        help="how records become one direction (default mean)",
    )
    parser.add_argument(
        "--readout",
        choices=["prompt_end", "response_end", "response_mean"],
        help="where the residual is read (default prompt_end)",
    )
    parser.add_argument(
        "--layers", type=layer_list, help="layers to build vectors for, e.g. 12,18 or 10-20 (default all)"
    )
    parser.add_argument(
        "--site",
        default="resid_post",
        choices=get_args(Site),
        help="the activation of each block that is read and later steered; the file keeps it, and steer and sweep "
        "follow it (default resid_post, the residual stream after the block)",
    )
    parser.add_argument("--group-by", choices=["word", "sentence"], help="choose words or sentences instead of tokens")
    add_pair_options(parser)
    add_attribution_options(parser)
    add_model_options(parser)
    # None: not given, so that another recipe refuses only what was asked for
    parser.set_defaults(method=None, n_steps=None, objective=None, masker=None)


def _recipe_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the recipe by the names that ``build_vectors`` has for them, and only those that were given."""
    names = {"method": "method", "n_steps": "n_steps", "reference": "reference", "nodes": "nodes", "top_k": "top_k"}
    names |= {"reduce": "reduce", "masker": "mask", "readout": "readout", "objective": "objective"}
    names |= {"group_by": "group_by"}
    given = {field: getattr(args, name) for name, field in names.items() if getattr(args, name) is not None}
    if args.recipe == "grains":
        for field in ("method", "n_steps", "reference", "nodes"):
            given.pop(field, None)
        args.method, args.n_steps = args.method or "leave_one_out", args.n_steps or 32
        given["method"] = chosen_method(args)
    return given


def build_checkpoint(args: argparse.Namespace) -> Path:
    """Where ``build`` keeps finished attributions until the vectors are there."""
    return Path(f"{args.out}.partial.jsonl")


def run_build(args: argparse.Namespace) -> None:
    """Build, write the file, and say how well the attributions converged."""
    from grains_tl._util.processes import files, finish, launched
    from grains_tl.vectors.build import build_vectors

    pairs = load_records(args)
    processes = launched()
    checkpoint = build_checkpoint(args)
    vectors = build_vectors(
        load(args),
        pairs,
        recipe=args.recipe,
        layers=args.layers,
        site=args.site,
        **_recipe_options(args),
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
    width = "heads side by side" if args.site == "z" else "d_model"
    where = "" if args.site == "resid_post" else f", site {args.site}"
    print(
        f"{path}: {len(vectors.layers)} layers x {width} {vectors.directions.shape[1]} from {len(pairs)} records{where}"
    )
    print(f"tokens: {vectors.info['token_rules']}")
    if vectors.info.get("moved_borders"):
        print(f"{vectors.info['moved_borders']} records have a token across prompt and response; scored from before it")
    gap = vectors.info.get("median_relative_gap")
    if gap is not None:
        share = vectors.info["converged_share"]
        print(
            f"median completeness gap {100 * gap:.0f} % of |f(x) - f(x')|; under 5 % in {100 * share:.0f} % of records"
        )
