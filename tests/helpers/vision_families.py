"""Tiny random vision-language models of every supported family, each with the processor that transformers makes for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from grains_tl.models import building as gr_models

hf: Any = transformers  # its configurations are typed by their generated signatures, which lack aliases
SPECIAL = (
    "<pad> <bos> <eos> <unk> <image> <|vision_start|> <|image_pad|> <|vision_end|> <|video_pad|> <start_of_image> "
    "<image_soft_token> <end_of_image> <fake_token_around_image> <end_of_utterance> <global-img>"
).split() + [f"<row_{r}_col_{c}>" for r in (1, 2, 3, 4) for c in (1, 2, 3, 4)]
WORDS = [*SPECIAL, *"question answer : what is this a cat dog yes no . ? red blue big and there it".split()]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' : ' }}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ IMAGE }}{% else %}{{ ' ' + p['text'] }}{% endif %}"
    "{% endfor %}{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
D, LAYERS = 32, 3
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": ID["<bos>"],
    "eos_token_id": ID["<eos>"],
    "pad_token_id": ID["<pad>"],
    "tie_word_embeddings": False,
}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]


@dataclass(frozen=True)
class Family:
    """How to make one: model class, configuration, processor; and how many tokens an image of 40 x 24 pixels takes."""

    name: str
    model: str
    config: Callable[[], Any]
    processor: Callable[[], Any]
    n_patches: int


def tokenizer(**named: str) -> Any:
    core = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_tokens([AddedToken(w, normalized=False) for w in SPECIAL])  # found inside words, as real tokenizers do
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=[w for w in SPECIAL[4:] if w not in named.values()],
        extra_special_tokens=dict(named),
    )


def picture(seed: int, width: int = 40, height: int = 24) -> Any:
    """A random picture with large coloured areas."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def build(family: Family) -> Any:
    """The plain Hugging Face model; every call gives the same weights."""
    config = family.config()
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(hf, family.model)(config)
        with torch.no_grad():
            for name, weights in model.named_parameters():  # these start near zero: image and words must matter
                if weights.ndim > 1 and any(part in name for part in ("vis", "projector", "connector", "lm_head")):
                    weights.normal_(std=0.25)
    model.generation_config.pad_token_id = ID["<pad>"]
    model.generation_config.eos_token_id = ID["<eos>"]
    return model.eval().requires_grad_(False)


def bridge(family: Family) -> Any:
    """The same as a ``TransformerBridge`` with its processor, as ``load_model`` would return it."""
    processor = family.processor()
    gr_models.keep_tokenizer_as_is(processor.tokenizer, family.name)
    model = gr_models.bridge_of(build(family), processor.tokenizer, family.name).eval().requires_grad_(False)
    model.processor = processor
    return model


def _image_class(name: str) -> Any:
    found = getattr(hf, f"{name}ImageProcessorPil", None) or getattr(hf, f"{name}ImageProcessor")
    if missing := getattr(found, "_backends", None):  # a placeholder of transformers that names what it needs
        pytest.skip(f"transformers {transformers.__version__} has no {found.__name__} without {', '.join(missing)}")
    return found


def _template(image: str) -> str:
    return CHAT_TEMPLATE.replace("{{ IMAGE }}", f"{{{{ ' {image} ' }}}}")


def _llava_text() -> Any:
    return hf.LlamaConfig(**TEXT)


def _llava() -> Any:
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=_llava_text(),
        image_token_id=ID["<image>"],
        image_seq_length=16,
        vision_feature_layer=-1,
    )


def _llava_processor() -> Any:
    return hf.LlavaProcessor(
        image_processor=_image_class("CLIP")(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )


def _llava_next() -> Any:
    return hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**TOWER, projection_dim=16),
        text_config=_llava_text(),
        image_token_id=ID["<image>"],
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )


def _llava_next_processor() -> Any:
    return hf.LlavaNextProcessor(
        image_processor=_image_class("LlavaNext")(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer(image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>"),
    )


def _onevision() -> Any:
    return hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(
            **{k: v for k, v in TOWER.items() if k != "initializer_range"}, vision_use_head=False
        ),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_id=ID["<image>"],
        video_token_id=ID["<|video_pad|>"],
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_1",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _onevision_processor() -> Any:
    return _without_video(
        hf.LlavaOnevisionProcessor,
        image_processor=_image_class("LlavaOnevision")(
            size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=tokenizer(image_token="<image>", video_token="<|video_pad|>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        image_token="<image>",
        video_token="<|video_pad|>",
        image_token_id=ID["<image>"],
        video_token_id=ID["<|video_pad|>"],
        chat_template=_template("<image>"),
    )


def _qwen(version: str) -> Any:
    tower: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": D,
    }
    tower |= (
        {"window_size": 16, "fullatt_block_indexes": [1]}
        if version == "2_5"
        else {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    )
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    if version == "3":
        text |= {"head_dim": 8}
    return getattr(hf, f"Qwen{version}{'_' if version == '2_5' else ''}VLConfig")(
        vision_config=tower,
        text_config=text,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def _qwen_processor(version: str) -> Any:
    made = _without_video(
        getattr(hf, f"Qwen{version}{'_' if version == '2_5' else ''}VLProcessor"),
        image_processor=_image_class("Qwen2VL")(
            patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=8 * 8, max_pixels=48 * 48
        ),
        tokenizer=tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    made.vision_start_token, made.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    return made


def _without_video(kind: Any, **attributes: Any) -> Any:
    """A processor without its video part, which would need torchvision; images take the same way as ever."""
    made = kind.__new__(kind)
    listed = {f"{part}_ids": [attributes.get(f"{part}_token_id")] for part in ("image", "video", "audio")}
    for name, value in {**attributes, **listed}.items():  # the lists are for transformers 5.9
        setattr(made, name, value)
    return made


def _gemma3() -> Any:
    tower = {k: v for k, v in TOWER.items() if k != "initializer_range"}
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**tower, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=12,
            layer_types=["sliding_attention"] * 2 + ["full_attention"],
        ),
        mm_tokens_per_image=4,
        image_token_index=ID["<image_soft_token>"],
        boi_token_index=ID["<start_of_image>"],
        eoi_token_index=ID["<end_of_image>"],
        tie_word_embeddings=False,
    )


def _gemma3_processor() -> Any:
    return hf.Gemma3Processor(
        image_processor=_image_class("Gemma3")(size={"height": 16, "width": 16}),
        tokenizer=tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"),
        image_seq_length=4,
        chat_template=_template("<start_of_image>"),
    )


def _idefics3() -> Any:
    return hf.Idefics3Config(
        vision_config={**TOWER},
        text_config=_llava_text(),
        image_token_id=ID["<image>"],
        scale_factor=2,
    )


def _idefics3_processor() -> Any:
    return hf.Idefics3Processor(
        image_processor=_image_class("Idefics3")(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
        ),
        tokenizer=tokenizer(image_token="<image>"),
        image_seq_len=4,
        chat_template=_template("<image>"),
    )


FAMILIES = [
    Family("LLaVA", "LlavaForConditionalGeneration", _llava, _llava_processor, 16),
    Family("LLaVA-NeXT", "LlavaNextForConditionalGeneration", _llava_next, _llava_next_processor, 16 + 4 * 8),
    Family("LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", _onevision, _onevision_processor, 16 + 2 * 5),
    Family(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", lambda: _qwen("2_5"), lambda: _qwen_processor("2_5"), 15
    ),
    Family("Qwen3-VL", "Qwen3VLForConditionalGeneration", lambda: _qwen("3"), lambda: _qwen_processor("3"), 15),
    Family("Gemma 3", "Gemma3ForConditionalGeneration", _gemma3, _gemma3_processor, 4),
    Family("Idefics3", "Idefics3ForConditionalGeneration", _idefics3, _idefics3_processor, 4 * 5),
]
