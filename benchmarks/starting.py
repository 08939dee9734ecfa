"""What comes before any work: imports, loading the small model again, and tokenizing."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import grains_tl as gr
from benchmarks.common import timed
from benchmarks.rows import Row, python_shares

LOAD = """
import time
import grains_tl as gr
import torch, transformers.modeling_utils, transformer_lens.model_bridge
started = time.process_time()
gr.load_model({arguments})
print(time.process_time() - started)
"""


def bundled(name: str) -> list[gr.PreferencePair]:
    """All records of a bundled set."""
    return [p for split in ("build", "choose", "test") for p in gr.load_bundled(name, split)]


def of_a_process(code: str, *, printed: bool = False) -> float:
    """CPU seconds of a fresh process, or the last number that it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if printed:
        return float(done.stdout.splitlines()[-1])
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports(repeats: int) -> list[Row]:
    """The main functions, which ``import grains_tl`` alone does not load, beside TransformerLens' own import."""
    names = "load_model, build_vectors, sweep, generate"
    codes = (f"from grains_tl import {names}", "import transformer_lens")
    ours, theirs = (median([of_a_process(code) for _ in range(repeats)]) for code in codes)
    return [Row(f"import {names} from grains_tl", ours, "import transformer_lens", theirs, aim="1")]


def loading(repeats: int) -> list[Row]:
    """``load_model("smollm2")`` from the second time on, beside the same weights from a folder."""
    hf_model, tokenizer, _ = gr.models.load_hugging_face("smollm2")  # fills the cache
    with tempfile.TemporaryDirectory() as folder:
        hf_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        named = LOAD.format(arguments="'smollm2'")
        given = LOAD.format(arguments=f"path={str(Path(folder))!r}")
        runs = [[of_a_process(code, printed=True) for code in (named, given)] for _ in range(repeats)]
    ours, theirs = (median(seconds) for seconds in zip(*runs, strict=True))
    return [Row('load_model("smollm2") again', ours, "the same weights from a folder", theirs, aim="1")]


def tokenizing(model: Any, repeats: int, number: int = 160) -> list[Row]:
    """Prompts and responses of some pairs, with which words the tokens are of, beside the tokenizer's own call alone."""
    pairs = [p for name in ("sentiment", "misconceptions") for p in bundled(name)]
    ids = [[model.tokenizer(str(text))["input_ids"] for text in (p.chosen, p.rejected)] for p in pairs]
    # a random model's tokenizer does not know all words
    pairs = [p for p, (chosen, rejected) in zip(pairs, ids, strict=True) if chosen != rejected][:number]
    texts = [str(p.prompt) + str(response) for p in pairs for response in (p.chosen, p.rejected)]

    def ours() -> Any:
        return gr.tokens.tokenize_pairs(model, pairs)

    seconds, _ = timed({"ours": ours, "theirs": lambda: model.tokenizer(texts)}, repeats)
    return [
        Row(
            f"tokenizing {len(pairs)} pairs",
            seconds["ours"],
            "one call of the tokenizer, ids alone",
            seconds["theirs"],
            aim="0.3 s at most",
            rest=python_shares(ours),
        )
    ]
