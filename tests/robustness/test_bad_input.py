"""Bad input meets the error that docs/bad-input.md promises, before the model runs; strange but sound input just works."""

from __future__ import annotations

import json
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import grains_tl as gr
from grains_tl.records.pictures import load_images
from tests.conftest import tiny_model

DOC = Path(__file__).parents[2] / "docs" / "bad-input.md"
GOOD = {"prompt": "this film was very", "chosen": " good", "rejected": " bad"}


@dataclass(frozen=True)
class Case:
    """One row of the table: what is wrong, what is called with it, what is promised."""

    what: str
    call: Callable[[Any], Any]
    words: str  # of the message, parts between " ... "
    error: type[Exception] = ValueError
    runs: bool = False  # the model must run to notice


def file(env: Any, name: str, content: str | bytes) -> Path:
    """A file in the test's folder."""
    path = env.folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(name: str, content: str | bytes, **options: Any) -> Callable[[Any], Any]:
    return lambda env: gr.load_pairs(file(env, name, content), **options)


def build(*records: dict[str, Any], **options: Any) -> Callable[[Any], Any]:
    pairs = records or (GOOD,)
    return lambda env: gr.build_vectors(
        env.model, gr.load_pairs(list(pairs)), **{"top_k": 1, "progress": False, **options}
    )


def broken(kind: str) -> Any:
    model = tiny_model("bridge", "gpt2") if kind == "train" else tiny_model()
    if kind == "train":
        model.original_model.train()
    if kind == "nan":
        with torch.no_grad():
            model.original_model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    if kind == "no tokenizer":
        model.tokenizer = None
    if kind == "no template":
        model.tokenizer.chat_template = None
    return model


def on(kind: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same call on a model with something wrong."""
    return lambda env: call(SimpleNamespace(**{**vars(env), "model": broken(kind)}))


def vectors(n_layers: int = 3, d_model: int = 32) -> gr.SteeringVectors:
    return gr.SteeringVectors.from_raw(
        torch.randn(n_layers, d_model, generator=torch.Generator().manual_seed(0)),
        range(n_layers),
        torch.full((n_layers,), 5.0),
    )


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Any], Any]:
    def call(env: Any) -> Any:
        path = vectors().save(env.folder / "v.safetensors")
        path.write_bytes(change(path.read_bytes()))
        return gr.load_vectors(path)

    return call


def flipped(content: bytes) -> bytes:
    return content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]


def png(width: int, height: int) -> bytes:
    """The header of a picture of any size, without its pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + pixels


def cut_off(env: Any) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(env.folder / "whole.png")
    return file(env, "cut.png", (env.folder / "whole.png").read_bytes()[:2000])


def steer(**options: Any) -> Callable[[Any], Any]:
    return lambda env: vectors().hooks(**{"alpha": 0.2, "layers": [1], **options})


def say(*prompts: str, **options: Any) -> Callable[[Any], Any]:
    return lambda env: gr.generate(env.model, list(prompts), **{"max_new_tokens": 3, **options})


def sweep(v: gr.SteeringVectors, **options: Any) -> Callable[[Any], Any]:
    return lambda env: gr.sweep(env.model, v, gr.load_pairs([GOOD]), **{"progress": False, **options})


LINE = json.dumps(GOOD)
HEAD = "prompt,chosen,rejected\n"
CASES = [
    Case("no records", lambda env: gr.load_pairs([]), "no records ... at least one"),
    Case("empty prompt", build({**GOOD, "prompt": " "}), "row 1: prompt is empty"),
    Case("empty response", build(GOOD, {**GOOD, "chosen": ""}), "row 2: chosen is empty"),
    Case("chosen equal to rejected", build({**GOOD, "chosen": " bad"}), "row 1: chosen equals rejected ... drop"),
    Case("responses that give the same tokens", build({**GOOD, "chosen": "  bad"}), "record 1 ... same tokens"),
    Case("a number as response", build({**GOOD, "chosen": 4}), "row 1: chosen is 4 ... text or a list of messages"),
    Case("prompt longer than the context", build({**GOOD, "prompt": "good " * 70}), "record 1 ... context holds 64"),
    Case("top_k above the content tokens", build(top_k=9), "record 1: top_k=9 ... 4 content tokens ... lower top_k"),
    Case("layer out of range", build(layers=[3]), "layers [3] do not exist; the model has layers 0 to 2"),
    Case("negative layer", build(layers=[-1]), "layers [-1] do not exist"),
    Case("unknown method", build(method="magic"), "magic"),
    Case("csv without a column", load("p.csv", "prompt,chosen\na,b\n"), "row 1 has no column ... Map it", KeyError),
    Case("csv, a quote never closed", load("p.csv", HEAD + 'a,"b,c\nd,e,f\n'), "p.csv, line 3: bad csv ... twice"),
    Case("csv, text after a closing quote", load("p.csv", HEAD + 'a,"b"x,c\n'), "p.csv, line 2: bad csv"),
    Case("csv, a row with too many cells", load("p.csv", HEAD + "a,b,c,d\n"), "p.csv, row 1: 4 cells under 3 columns"),
    Case("csv, a row with too few cells", load("p.csv", HEAD + "a,b\n"), "row 1: rejected is missing"),
    Case("csv, a column named twice", load("p.csv", "prompt,prompt\na,b\n"), "p.csv: the header names ['prompt']"),
    Case(
        "csv, a cell of 200,000 characters", load("p.csv", HEAD + "x" * 200_000), "p.csv, line 2: bad csv (field larger"
    ),
    Case("a line of gigabytes", load("p.jsonl", "x" * 3_000_000), "p.jsonl, line 1: longer than 2,000,000 characters"),
    Case("jsonl with a broken line", load("p.jsonl", f"{LINE}\n{LINE[:-9]}\n"), "p.jsonl, line 2: not valid JSON"),
    Case("jsonl nested without end", load("p.jsonl", "[" * 200_000), "p.jsonl, line 1: JSON that cannot be read"),
    Case("jsonl with a number of 10,000 digits", load("p.jsonl", "1" * 10_000), "p.jsonl, line 1: JSON that cannot be"),
    Case("jsonl, a line that is a list", load("p.jsonl", "[1]\n"), "row 1 is a list; expected a mapping"),
    Case("text that is not UTF-8", load("p.jsonl", b"\xff\xfe{\x00"), "p.jsonl: not UTF-8 after line 0 ... save"),
    Case(
        "a broken parquet file",
        load("p.parquet", b"PAR1"),
        "p.parquet: cannot be read as parquet ... use .jsonl, .json or .csv",
    ),
    Case("a missing file", lambda env: gr.load_pairs("none.csv"), "no file none.csv", FileNotFoundError),
    Case("train mode with dropout, build", on("train", build()), "in train mode and ... call model.eval() first"),
    Case("train mode with dropout, generate", on("train", say("the film")), "in train mode and ... model.eval()"),
    Case("NaN in the weights, build", on("nan", build()), "NaN", runs=True),
    Case("NaN in the weights, generate", on("nan", say("the film")), "NaN or inf at blocks.2 ... float32", runs=True),
    Case("NaN in the weights, sweep", on("nan", sweep(vectors())), "NaN", runs=True),
    Case("no tokenizer", on("no tokenizer", build()), "no tokenizer; set model.tokenizer"),
    Case(
        "a conversation without a chat template",
        on("no template", build({**GOOD, "prompt": [{"role": "user", "content": "was it good"}]})),
        "record 1 ... no chat template; give plain text",
    ),
    Case(
        "a hook name that does not exist",
        say("the film", fwd_hooks=[("blocks.9.hook_resid_post", lambda act, hook: act)]),
        "no hook point ['blocks.9.hook_resid_post']; similar names",
        KeyError,
    ),
    Case(
        "a zero vector",
        lambda env: gr.SteeringVectors.from_raw(torch.zeros(1, 4), [3], torch.ones(1)),
        "layers [3] is zero or not finite",
    ),
    Case("alpha NaN", steer(alpha=math.nan), "alpha=nan; expected a finite number"),
    Case("alpha inf", steer(alpha=math.inf), "alpha=inf; expected a finite number"),
    Case("alpha NaN in a sweep", sweep(vectors(), alphas=[math.nan]), "alpha=nan", runs=True),
    Case("no layer named", steer(layers=None), "name the layers to steer ... stored are [0, 1, 2]"),
    Case("a layer without a vector", steer(layers=[7]), "no vector for layer 7; stored are [0, 1, 2]"),
    Case("vectors of another width", sweep(vectors(3, 16)), "vectors of d_model 16 ... do not fit", runs=True),
    Case("vectors of more layers", sweep(vectors(5)), "up to layer 4 do not fit ... 3 layers", runs=True),
    Case("vector file, cut off", damaged(lambda c: c[:-9]), "v.safetensors is not a readable safetensors file"),
    Case("vector file, one bit flipped", damaged(flipped), "v.safetensors is damaged (its checksum"),
    Case("vector file, a header of terabytes", damaged(lambda c: b"\xff" * 5 + b"\0" * 3 + c[8:]), "not a readable"),
    Case(
        "vector file that is a pickle",
        damaged(lambda c: b"\x80\x04N."),
        "v.safetensors is not a readable file of torch.save",
    ),
    Case("zero new tokens", say("the film", max_new_tokens=0), "max_new_tokens=0; expected at least 1"),
    Case("an empty prompt to continue", say(""), "the prompt is empty ... expected some text"),
    Case("no prompts", say(), "no prompts; give at least one"),
    Case("an image that is cut off", lambda env: load_images(cut_off(env)), "cut.png is a picture that cannot be read"),
    Case("a text file as image", lambda env: load_images(file(env, "a.png", "hi")), "a.png cannot be read by Pillow"),
    Case(
        "an image of 100 megapixels",
        lambda env: load_images(file(env, "bomb.png", png(10_000, 10_000))),
        "bomb.png has 10000 x 10000 = 100 megapixels; at most 50 are read",
    ),
    Case(
        "an image of 10,000 megapixels", lambda env: load_images(file(env, "b.png", png(100_000, 100_000))), "b.png: "
    ),
    Case("an image without pixels", lambda env: load_images(np.zeros((0, 4, 3))), "no pixels"),
    Case("pixels that are NaN", lambda env: load_images(np.full((2, 2, 3), np.nan)), "pixels go from 0 to 1"),
    Case(
        "an image for a text model",
        build({**GOOD, "image": np.zeros((4, 4, 3))}),
        "record 1: the model takes no images",
    ),
]


def table() -> str:
    """The table of docs/bad-input.md."""
    rows = [f"| {case.what} | {case.error.__name__} | {case.words.replace(' ... ', ' … ')} |" for case in CASES]
    return "\n".join(["| input | error | the message says |", "|---|---|---|", *rows])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_bad_input_meets_the_promised_error(
    case: Case, bridge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grains_tl.records.sources.MAX_LINE", 2_000_000)
    ran: list[Any] = []
    if not case.runs:
        monkeypatch.setattr("torch.nn.Linear.forward", lambda *args: ran.append(args))
    with pytest.raises(case.error) as caught:
        case.call(SimpleNamespace(model=bridge, folder=tmp_path))
    message, at = str(caught.value), 0
    for part in case.words.split(" ... "):
        at = message.find(part, at)
        assert at >= 0, f"{part!r} is not in {message!r}"
    assert not ran


def test_the_page_shows_this_table() -> None:
    assert table() in DOC.read_text(encoding="utf-8")


# -- strange, but sound ------------------------------------------------------------------------------------------------

STRANGE = {
    "mixed languages": "the film 映画 was фильм very",
    "emoji": "the \U0001f468\u200d\U0001f469\u200d\U0001f467 film \U0001f600 was very",
    "right to left": "the \u202e\u0647\u0630\u0627 \u0627\u0644\u0641\u064a\u0644\u0645\u202c film was very",
    "a word of 3,000 letters": "the film " + "x" * 3_000 + " was",
    "control characters": "the \x00 film \x1b[31m was \u2028 very",
    "combining marks": "the fi\u0301lm wa\u0308s ve\u0327ry",
}


@pytest.mark.parametrize("prompt", STRANGE.values(), ids=list(STRANGE))
def test_strange_text_is_text(prompt: str, bridge: Any) -> None:
    pair = gr.PreferencePair(prompt=prompt, chosen=" good \U0001f600", rejected=" bad")
    found = gr.attribute(bridge, pair, method="leave_one_out")
    assert len(found.tokens) == len(found.scores) and bool(torch.isfinite(found.scores[found.content]).all())
    assert len(gr.generate(bridge, [prompt], max_new_tokens=2)) == 1


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + b'prompt,chosen,rejected\r\n"a, b","c ""d""\r\ne",f\r\n')
    assert gr.load_pairs(tmp_path / "p.csv") == [gr.PreferencePair(prompt="a, b", chosen='c "d"\r\ne', rejected="f")]


def test_records_that_repeat_are_kept_and_said() -> None:
    with pytest.warns(UserWarning, match="1 of 3 records repeat earlier ones .*record 3"):
        assert len(gr.load_pairs([GOOD, {**GOOD, "prompt": "the film was"}, GOOD])) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gr.load_pairs([GOOD, {**GOOD, "prompt": "the film was"}])


@pytest.mark.parametrize("token", ["pad_token", "bos_token", "chat_template"])
def test_tokenizers_without_pad_bos_or_template(token: str) -> None:
    model = tiny_model()
    setattr(model.tokenizer, token, None)
    built = gr.build_vectors(model, gr.load_pairs([GOOD, {**GOOD, "prompt": "the film"}]), top_k=1, progress=False)
    assert built.directions.shape == (3, 32)
    assert len(gr.generate(model, ["the film was", "a"], max_new_tokens=2)) == 2


def test_train_mode_without_dropout_is_no_matter(bridge: Any) -> None:
    model = tiny_model()  # a Llama has no dropout
    wanted = gr.generate(model, ["the film was"], max_new_tokens=4)
    model.original_model.train()
    assert gr.generate(model, ["the film was"], max_new_tokens=4) == wanted


@pytest.mark.parametrize("mode", ["CMYK", "L", "P", "RGBA", "1", "LA", "I;16"])
def test_every_picture_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    picture = Image.new(mode, (5, 3))
    name = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    picture.save(name)
    assert [p.mode + str(p.size) for p in load_images([picture, name])] == ["RGB(5, 3)"] * 2


def test_a_picture_of_one_pixel() -> None:
    assert load_images(np.zeros((1, 1, 3)))[0].size == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_do_not_overflow(dtype: torch.dtype) -> None:
    act = torch.full((1, 2, 1024), 2e4, dtype=dtype)  # the norm, 6.4e5, is beyond float16
    unit = torch.randn(1024, generator=torch.Generator().manual_seed(0))
    for operator in ("add_renorm", "ablate", "clamp"):
        ((_, fn),) = gr.hooks.steer_hook(0, unit, 0.5, operator=operator)  # type: ignore[arg-type]
        assert bool(torch.isfinite(fn(act, hook=None)).all())
