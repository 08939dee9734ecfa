"""The tiny LLaVA: its configuration, its processor, and its weights on disk."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch

from grains_tl._util.files import sha256_of, write_atomically
from grains_tl.models._scenes import PATCH, SIZE, SPECIAL, vocabulary

N_IMAGE = (SIZE // PATCH) ** 2


WEIGHTS = "model.safetensors"


CHECKSUM = "sha256.txt"


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %} answer : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{{ m['content'][0]['text'] }}{% endif %}{{ eos_token }}"
    "{% elif m['content'] is string %} question : {{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %} <image>{% endif %}{% endfor %} question :"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} answer :{% endif %}"
)


def question_text(question: str) -> str:
    """A question as the model was trained to read it; the processor turns ``<image>`` into 16 image tokens.

    Examples:
        >>> question_text("is there a 3 ?")
        '<image> question : is there a 3 ? answer :'
    """
    return f"<image> question : {question} answer :"


def tiny_config() -> Any:
    """``LlavaConfig`` of the model: a CLIP tower of 3 layers, a Llama of 4 layers, 0.95 million parameters."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    ids = {word: i for i, word in enumerate(SPECIAL)}
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=96,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=ids["<pad>"],
        bos_token_id=ids["<bos>"],
        eos_token_id=ids["<eos>"],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids["<image>"],
        image_seq_length=N_IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.pad_token_id, config.bos_token_id, config.eos_token_id = ids["<pad>"], ids["<bos>"], ids["<eos>"]
    return config


def build_model(seed: int = 0) -> Any:
    """The model with random weights; the global random state is left as it was."""
    from transformers import LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(tiny_config())


def build_processor() -> Any:
    """A ``LlavaProcessor`` with a word-level tokenizer and a CLIP image processor (PIL; torchvision is not needed)."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", ids["<bos>"])])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=128,
    )
    return llava_processor(tokenizer, SIZE, PATCH, CHAT_TEMPLATE)


def llava_processor(tokenizer: Any, size: int, patch_size: int, chat_template: str) -> Any:
    """A ``LlavaProcessor`` for square pictures: a tokenizer with a token ``<image>``, and a CLIP image processor (PIL).

    Args:
        tokenizer: a fast tokenizer.
        size: side of a picture, pixels.
        patch_size: side of a patch, pixels.
        chat_template: how conversations are rendered.
    """
    import transformers

    # transformers before 5.1 or so has one CLIP image processor, later ones a PIL backend beside the torchvision one
    image_class = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    image_processor = image_class(
        size={"height": size, "width": size},
        do_resize=True,
        do_center_crop=False,
        crop_size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return transformers.LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=chat_template,
    )


def save_tiny_vlm(model: Any, folder: str | Path) -> Path:
    """Write model (fp16 safetensors), processor and checksum: a plain Hugging Face folder."""
    from safetensors.torch import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS, save(state, metadata={"format": "pt"}))
    config = tiny_config()
    config.architectures, config.dtype = [type(model).__name__], torch.float16
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    build_processor().save_pretrained(folder)
    (folder / CHECKSUM).write_text(f"{sha256_of(folder / WEIGHTS)}  {WEIGHTS}\n")
    return folder


def load_tiny_vlm(path: str | Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The trained model and its processor.

    Args:
        path: a folder written by the training script; the one inside the package if ``None``.
        dtype: of the weights (stored as fp16).

    Returns:
        ``(LlavaForConditionalGeneration, LlavaProcessor)``.

    Raises:
        FileNotFoundError: no weights in ``path``.
        ValueError: the weights are not the ones the checksum was made of.
    """
    from safetensors.torch import load_file

    with resources.as_file(resources.files("grains_tl") / "data_files" / "tiny_vlm") as bundled:
        folder = Path(path) if path is not None else bundled
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise FileNotFoundError(f"no {WEIGHTS} in {folder}; give a folder written by studies.tiny_vlm.train")
        wanted = (folder / CHECKSUM).read_text().split()[0]
        found = sha256_of(weights)
        if found != wanted:
            raise ValueError(
                f"{weights} has sha256 {found}, expected {wanted} (from {CHECKSUM}); the file is damaged or was replaced"
            )
        # not from_pretrained: it draws a progress bar for a load of milliseconds, and would pass over missing weights
        model = build_model()
        model.load_state_dict(load_file(weights))
        return model.to(dtype).eval(), build_processor()
