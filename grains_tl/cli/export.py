"""``grains-tl export``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def add_export(parser: argparse.ArgumentParser, layers: Callable[[str], list[int]]) -> None:
    """Options of the command; ``layers`` reads a list such as 12,18."""
    parser.add_argument("--vectors", required=True, help="file written by build")
    parser.add_argument(
        "--format",
        required=True,
        choices=["gguf", "hf", "vllm"],
        help="gguf: a control vector for llama.cpp; hf: a checkpoint with the step as a bias; vllm: intervene= as JSON",
    )
    parser.add_argument("--out", required=True, help="file to write, or (hf) a new folder")
    parser.add_argument("--layer", type=layers, help="layer or layers to steer; may be left out if one is stored")
    parser.add_argument(
        "--alpha", type=float, help="fraction of the residual norm; gguf: what SCALE 1 stands for (default 1)"
    )
    parser.add_argument(
        "--operator", default="add", choices=["add", "add_renorm", "ablate", "clamp"], help="only add can be exported"
    )
    parser.add_argument("--model-hint", default="llama", help="gguf: the architecture's name in llama.cpp")


def run_export(args: argparse.Namespace, load: Callable[[argparse.Namespace, str | None], Any]) -> None:
    """Write the export; ``load`` gives the model, which only a checkpoint needs."""
    from grains_tl._util.files import write_atomically
    from grains_tl.vectors.export import export_gguf, export_hf, vllm_interventions
    from grains_tl.vectors.files import load_vectors

    vectors = load_vectors(args.vectors)
    common: dict[str, Any] = {"layers": args.layer, "operator": args.operator}
    if args.format == "gguf":
        alpha = 1.0 if args.alpha is None else args.alpha
        path = export_gguf(vectors, args.out, alpha=alpha, model_hint=args.model_hint, **common)
        print(f"{path}: llama-cli -m MODEL.gguf --control-vector-scaled {path} SCALE; SCALE 1 is alpha {alpha:g}")
        return
    if args.alpha is None:
        raise ValueError(f"--format {args.format} needs --alpha, because the size of the step is written into the file")
    if args.format == "vllm":
        spec = vllm_interventions(vectors, alpha=args.alpha, **common)
        path = write_atomically(args.out, (json.dumps(spec) + "\n").encode())
        print(f"{path}: intervene=json.load(file) for TransformerLens' RemoteBridge.boot_vllm(...)")
        return
    model = load(args, vectors.info.get("model", {}).get("name"))
    path = export_hf(model, vectors, args.out, alpha=args.alpha, **common)
    print(f"{path}: AutoModelForCausalLM.from_pretrained({str(path)!r}); logits equal to the hook's on a short run")
