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
        choices=["gguf", "hf", "vllm", "steered", "easysteer", "vllm-lens"],
        help="gguf: a control vector for llama.cpp; hf: a checkpoint with the step as a bias; vllm: intervene= as JSON; "
        "steered: the .pt file of lm-evaluation-harness; easysteer: its GGUF; vllm-lens: its SteeringVector as JSON",
    )
    parser.add_argument("--out", required=True, help="file to write, or (hf) a new folder")
    parser.add_argument("--layer", type=layers, help="layer or layers to steer; may be left out if one is stored")
    parser.add_argument(
        "--alpha", type=float, help="fraction of the residual norm; gguf: what SCALE 1 stands for (default 1)"
    )
    parser.add_argument(
        "--operator",
        choices=["add", "add_renorm", "ablate", "clamp"],
        help="default add, or what the file was saved with; most engines can only add",
    )
    parser.add_argument("--model-hint", default="llama", help="gguf: the architecture's name in llama.cpp")


#: Formats that hold a whole steering: alpha, layers and operator.
STEERINGS = ("steered", "easysteer", "vllm-lens")


def _take_choice(args: argparse.Namespace, vectors: Any) -> None:
    """What the command line leaves out is taken from the file's own choice, where it was saved with one.

    Not for GGUF, where SCALE 1 is alpha 1 unless something else is asked for.
    """
    chosen = vectors.chosen
    named = args.alpha is not None or args.layer is not None or args.operator is not None
    if chosen is not None and not named and args.format != "gguf":
        if chosen.positions != "all" or chosen.scale != "residual":
            raise ValueError(
                f"the file's choice is {chosen.label}, scale {chosen.scale}; --format {args.format} steers every "
                "position by a share of the residual norm. Name --alpha and --layer"
            )
        args.alpha, args.layer, args.operator = chosen.alpha, list(chosen.layers), chosen.operator
    args.operator = args.operator or "add"


def _steering(args: argparse.Namespace, vectors: Any) -> Any:
    if vectors.chosen is not None and args.alpha is None and args.layer is None and args.operator is None:
        return vectors.chosen
    if args.alpha is None:
        raise ValueError(f"--format {args.format} needs --alpha, because the size of the step is written into the file")
    return vectors.steering(args.alpha, args.layer, operator=args.operator or "add")


def _export_steering(args: argparse.Namespace, steering: Any) -> None:
    from grains_tl._util.files import write_atomically
    from grains_tl.vectors.engines import export_easysteer, export_steered, vllm_lens_vector

    if args.format == "steered":
        path = export_steered(steering, args.out)
        print(f"{path}: {steering.label}; lm_eval run --model steered --model_args pretrained=NAME,steer_path={path}")
    elif args.format == "easysteer":
        spec = export_easysteer(steering, args.out, model_hint=args.model_hint)
        print(f"{args.out}: {steering.label}; VectorSpec fields {json.dumps(spec)}")
    else:
        path = write_atomically(args.out, (json.dumps(vllm_lens_vector(steering)) + "\n").encode())
        print(f"{path}: {steering.label}; SteeringVector.model_validate(json.load(file)) of vllm-lens")


def run_export(args: argparse.Namespace, load: Callable[[argparse.Namespace, str | None], Any]) -> None:
    """Write the export; ``load`` gives the model, which only a checkpoint needs."""
    from grains_tl._util.files import write_atomically
    from grains_tl.vectors.export import export_gguf, export_hf, vllm_interventions
    from grains_tl.vectors.files import load_vectors

    vectors = load_vectors(args.vectors)
    if args.format in STEERINGS:
        _export_steering(args, _steering(args, vectors))
        return
    _take_choice(args, vectors)
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
