"""Models from GGUF files, through the cache, and from memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.models import gguf_files
from tests.conftest import tiny_hf, tiny_model, tiny_tokenizer

IDS = torch.tensor([[3, 5, 8, 12, 6]])


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    """A file that stands for a GGUF file, and the conversions made so far; the cache is a folder of the test's."""
    monkeypatch.setenv("GRAINS_TL_CACHE", str(tmp_path / "cache"))
    file, made = tmp_path / "small.gguf", []
    file.write_bytes(b"weights")

    def convert(path: Path) -> Any:
        made.append(path)
        return tiny_hf(), tiny_tokenizer()

    monkeypatch.setattr(gguf_files, "_convert", convert)
    return file, made


def test_a_file_is_converted_once_and_read_from_the_cache(converted: Any, capsys: Any) -> None:
    file, made = converted
    first, second = gr.load_model(path=file), gr.load_model(path=file)
    assert made == [file]
    assert first.cfg.model_name == "small"
    assert torch.equal(first(IDS), second(IDS))
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    told = capsys.readouterr().err
    assert told.count("converting small.gguf") == 1 and "GB in" in told
    file.write_bytes(b"other weights")
    gr.load_model(path=file)
    assert len(made) == 2


def test_a_damaged_copy_is_made_again(converted: Any) -> None:
    file, made = converted
    want = gr.load_model(path=file)(IDS)
    (weights,) = gguf_files.cache_folder().glob("*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 255
    weights.write_bytes(content)
    assert torch.equal(gr.load_model(path=file)(IDS), want)
    assert torch.equal(gr.load_model(path=file)(IDS), want)
    assert len(made) == 2


def test_a_second_process_may_be_first(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _ = converted
    own = gguf_files._convert

    def slow(path: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(gguf_files, "_convert", own)
            gguf_files.load_gguf(path, torch.float32)  # the other process begins and ends while this one converts
        return own(path)

    monkeypatch.setattr(gguf_files, "_convert", slow)
    gr.load_model(path=file)
    assert [f.name[0] for f in gguf_files.cache_folder().iterdir()] == ["s"]  # one copy, nothing half-made


def test_a_cache_that_cannot_be_written_is_no_obstacle(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, made = converted
    blocked = file.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("GRAINS_TL_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="was not kept"):
        model = gr.load_model(path=file, dtype=torch.float64)
    assert model(IDS).dtype == torch.float64 and made == [file]


def test_the_fast_reader_reads_what_the_package_reads(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("words", ["one", "", "drei 🙂"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("sizes", [0.5, 1.5])
    writer.add_string("text", "hello")
    writer.add_tensor("w", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = (make(tmp_path / "x.gguf") for make in (gguf_files._fast_reader(gguf.GGUFReader), gguf.GGUFReader))
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        assert ours.fields[name].contents() == field.contents()
        assert ours.fields[name].data == field.data
    assert np.array_equal(ours.tensors[0].data, theirs.tensors[0].data)


# -- models in memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_in_memory_is_wrapped(name: str, pairs: list[gr.PreferencePair]) -> None:
    hf, tokenizer = tiny_hf(name), tiny_tokenizer()
    want, before = hf(IDS).logits, copy.deepcopy(tokenizer.init_kwargs)
    model = gr.wrap_model(hf, tokenizer, name="mine")
    assert torch.allclose(model(IDS), want, atol=2e-5)
    assert model.cfg.model_name == "mine" and model.original_model is hf
    assert tokenizer.init_kwargs == before
    assert torch.equal(gr.score_pairs(model, pairs), gr.score_pairs(tiny_model("bridge", name), pairs))


def test_a_model_with_adapters_is_wrapped(pairs: list[gr.PreferencePair]) -> None:
    peft = pytest.importorskip("peft")
    hf = tiny_hf()
    tuned = peft.get_peft_model(hf, peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    tuned.eval()
    want = tuned(IDS).logits
    model = gr.wrap_model(tuned, tiny_tokenizer())
    assert torch.allclose(model(IDS), want, atol=2e-5)
    assert not torch.allclose(want, tiny_hf()(IDS).logits, atol=1e-2)
    assert gr.generate(model, ["the film was"], max_new_tokens=3)


def test_what_cannot_be_wrapped_is_refused(bridge: Any) -> None:
    for wrong, words in ((bridge, "as it is"), (bridge.original_model, "already"), ("smollm2", "got str")):
        with pytest.raises(ValueError, match=words):
            gr.wrap_model(wrong, tiny_tokenizer())
    with pytest.raises(ValueError, match="tokenizer"):
        gr.wrap_model(tiny_hf(), None)


CALLS: dict[str, Any] = {
    "attribute": lambda m, p: gr.attribute(m, p[0]),
    "build_vectors": lambda m, p: gr.build_vectors(m, p),
    "score_pairs": lambda m, p: gr.score_pairs(m, p),
    "generate": lambda m, p: gr.generate(m, ["the film"]),
    "compare_attributions": lambda m, p: gr.compare_attributions(m, p),
    "tokenize_pairs": lambda m, p: gr.tokens.tokenize_pairs(m, p),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.usefixtures("unchecked")
def test_a_bare_hugging_face_model_is_told_how(call: str, hf: Any, pairs: list[gr.PreferencePair]) -> None:
    with pytest.raises(ValueError, match="wrap_model"):
        CALLS[call](hf, pairs)
