"""Small tokenizers in the manner of those that people bring: SentencePiece, WordPiece, other first tokens, bytes."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.conftest import WORDS


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put in front of every text and taken off again in decoding; 45 tokens, ids as in WORDS."""
    vocab = ["<pad>", "<bos>", "<eos>", *("▁" + w for w in WORDS[3:30]), *"abcdefghilmnost"]
    assert len(vocab) == len(WORDS)
    core = Tokenizer(models.Unigram([(w, -1.0 - (len(w) == 1)) for w in vocab], unk_id=0, byte_fallback=False))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def wordpiece_like() -> PreTrainedTokenizerFast:
    """As BERT's: ``##`` marks the pieces that go on with a word."""
    vocab = [*WORDS[:30], *("##" + c for c in "abcdefghilmnost")]
    assert len(vocab) == len(WORDS)
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocab)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )


def starting_with(*front: str, bos: str | None = None, end: str = "") -> PreTrainedTokenizerFast:
    """The tiny word-level tokenizer, putting these tokens in front of every text (GLM: two, no BOS declared)."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="the"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    used = [(w, WORDS.index(w)) for w in dict.fromkeys([*front, *end.split()])]
    core.post_processor = TemplateProcessing(single=" ".join([*front, "$A", *end.split()]), special_tokens=used)
    options: dict[str, Any] = {} if bos is None else {"bos_token": bos}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="the", **options
    )
