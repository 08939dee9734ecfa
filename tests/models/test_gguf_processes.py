"""A real GGUF file, tiny, converted by two processes at once, and by processes that are killed at every step."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grains_tl.models import gguf_files
from tests.conftest import tiny_hf

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts copies of this process")

IDS = torch.tensor([[3, 5, 8, 12, 6]])
TEXT = "the food"


def byte_names() -> list[str]:
    """The characters byte-level vocabularies write the 256 bytes as: GPT-2's table."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + hidden.index(b)) for b in range(256)]


def write_gguf(file: Path) -> tuple[Any, list[str]]:
    """``tiny_hf`` with a byte-level vocabulary as llama.cpp's converter writes it; the model and the vocabulary."""
    gguf = pytest.importorskip("gguf")
    tokens = ["<pad>", "<bos>", "<eos>", *byte_names(), "th", "the"]
    model = tiny_hf()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokens), mean_resizing=False)
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(len(tokens))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    for role, place in (("pad", 0), ("bos", 1), ("eos", 2)):
        getattr(writer, f"add_{role}_token_id")(place)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbouring dimensions, transformers the two halves
                tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, tokens


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Any, list[int]]:
    """A GGUF file, what its logits must be, and the ids of ``TEXT``; the cache is a folder of the test's."""
    monkeypatch.setenv("GRAINS_TL_CACHE", str(tmp_path / "cache"))
    model, tokens = write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf", model(IDS).logits, [tokens.index(t) for t in ("the", "Ġ", "f", "o", "o", "d")]


def load(file: Path) -> tuple[torch.Tensor, list[int]]:
    """Logits and ids of the model that ``load_gguf`` gives."""
    with torch.no_grad():
        model, tokenizer = gguf_files.load_gguf(file, torch.float32)
        return model.eval()(IDS).logits, tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def start(job: Callable[[], None]) -> Any:
    """A copy of this process that does one thing."""

    def work() -> None:
        torch.set_num_threads(1)  # another thread's locks are not copied
        job()
        os._exit(0)

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    return worker


def ended(worker: Any) -> int:
    """Its exit code."""
    worker.join(120)
    if worker.exitcode is None:
        worker.kill()
        pytest.fail("a process does not end")
    return int(worker.exitcode)


def entries() -> list[Path]:
    """What the cache holds, hidden or not."""
    folder = gguf_files.cache_folder()
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_convert_one_file_at_once(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, logits, ids = tiny
    own, together = gguf_files._convert, multiprocessing.get_context("fork").Barrier(2, timeout=100)

    def convert(path: Path) -> Any:
        together.wait()  # both found no copy
        made = own(path)
        together.wait()  # and both write theirs now
        return made

    def save(target: Path) -> None:
        torch.save(load(file), target)

    monkeypatch.setattr(gguf_files, "_convert", convert)
    torch.set_num_threads(1)
    workers = [start(partial(save, tmp_path / f"{n}.pt")) for n in range(2)]
    assert [ended(worker) for worker in workers] == [0, 0]
    (kept,) = entries()
    assert kept.name.startswith("tiny-") and gguf_files._is_whole(kept)
    monkeypatch.setattr(gguf_files, "_convert", None)  # the third load reads the copy
    for found, its_ids in (*(torch.load(tmp_path / f"{n}.pt") for n in range(2)), load(file)):
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
        assert its_ids == ids


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_killed_at_any_step_leaves_nothing_that_is_taken(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, logits, ids = tiny
    made, cache = gguf_files._convert(file), str(gguf_files.cache_folder())
    monkeypatch.setattr(gguf_files, "_convert", lambda path: made)
    torch.set_num_threads(1)

    def killed_at(step: int) -> None:
        """Before the ``step``-th time that Python opens, makes, renames or deletes something in the cache."""
        left = step

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event.partition(".")[0] in ("open", "os", "shutil", "tempfile") and cache in repr(args):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        gguf_files.load_gguf(file, torch.float32)

    kills = 0
    while not any(not e.name.startswith(".") for e in entries()):
        kills += 1
        assert kills < 200
        assert ended(start(partial(killed_at, kills))) in (0, -signal.SIGKILL)
    kept, *half_made = sorted(entries(), key=lambda e: e.name.startswith("."))
    assert len(half_made) > 5, "killed at too few steps to say anything"
    assert gguf_files._is_whole(kept)
    found, its_ids = load(file)
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=0)
    assert its_ids == ids
    # another conversion clears away what is a day old, and leaves alone what a process may still be writing
    yesterday = time.time() - 25 * 3600
    for left in half_made[1:]:
        os.utime(left, (yesterday, yesterday))
    (kept / "model.safetensors").write_bytes(b"damaged")
    load(file)
    assert entries() == sorted([kept, half_made[0]]) and gguf_files._is_whole(kept)
