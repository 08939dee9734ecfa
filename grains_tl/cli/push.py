"""``grains-tl push``: vectors onto a Hugging Face hub, with their evidence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_push(parser: argparse.ArgumentParser) -> None:
    """Options of the command; a token is never one of them, as other users of a machine see command lines."""
    parser.add_argument("vectors", help="file of vectors")
    parser.add_argument("--repo", required=True, help="owner/name; created if it does not exist")
    parser.add_argument("--evidence", help="evidence.json written by grains-tl audit")
    parser.add_argument("--licence", help="licence of the vectors, such as mit")
    parser.add_argument("--prompts-licence", help="licence of the records they were built from")
    parser.add_argument("--intended-use", help="what the vectors are meant for, and what not")
    parser.add_argument(
        "--private", action="store_true", default=None, help="if the repository is new, create it as private"
    )


def run_push(args: argparse.Namespace) -> None:
    """Push, and print where the vectors are; the token is that of HF_TOKEN or of a login."""
    from grains_tl.vectors.files import load_vectors

    given: Any = None
    if args.evidence is not None:
        try:
            given = json.loads(Path(args.evidence).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{args.evidence} is not JSON ({error}); expected evidence.json written by grains-tl audit"
            ) from None
    names = ("licence", "prompts_licence", "intended_use", "private")
    options = {name: getattr(args, name) for name in names}
    vectors = load_vectors(args.vectors)
    url = vectors.push_to_hub(args.repo, evidence=given, **options)
    print(f'{url}: gr.load_vectors("hf://{args.repo}", model)')
