"""Vectors on a hub: pushed to and fetched from a hub on this machine, which refuses, fails and breaks off."""

from __future__ import annotations

import errno
import json
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants, file_download

import grains_tl as gr
from grains_tl.cli.main import main
from grains_tl.models.identity import model_identity
from grains_tl.vectors.card import card_of
from tests.conftest import tiny_model
from tests.helpers.stub_hub import TOKEN, StubHub

REPO = "someone/liking-tiny"


def vectors(**info: Any) -> gr.SteeringVectors:
    raw = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    return gr.SteeringVectors.from_raw(raw, range(3), torch.full((3,), 4.0), {"method": "caa", "n_records": 24, **info})


EVIDENCE = {
    "recipe": "audited", "steers": True, "level": 0.95, "effect": 1.87, "low": 1.13, "high": 2.6, "kl": 0.0501, "n": 12,
    "above_control": 2.0, "above_low": 0.67, "above_high": 3.33, "beaten": 4, "n_draws": 4,
    "chosen": {"layers": [1], "alpha": 0.2, "operator": "add_renorm", "positions": "all", "scale": "residual"},
    "verdict": ["The vector steers.", "It lies above 4 of 4 random draws."],
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    stub = StubHub()
    monkeypatch.setenv("HF_ENDPOINT", stub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub client's own tries
    yield stub
    stub.close()


def parts_of(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


# -- there and back ---------------------------------------------------------------------------------------------------


def test_pushed_vectors_come_back_with_their_evidence(hub: StubHub, bridge: Any) -> None:
    v = vectors(model=model_identity(bridge))
    address = v.push_to_hub(
        REPO, evidence=EVIDENCE, licence="mit", prompts_licence="CC BY 4.0", intended_use="Tests.", token=TOKEN
    )
    assert address == f"{hub.endpoint}/{REPO}"
    assert set(hub.repos[REPO]) == {"vectors.safetensors", "README.md"} and hub.commits == 1
    again = gr.load_vectors(f"hf://{REPO}", bridge)
    assert torch.equal(again.directions, v.directions) and again.info["evidence"] == EVIDENCE
    assert again.chosen is not None and again.chosen.label == "caa, alpha +0.2, layer 1"
    with pytest.raises(ValueError, match="different"):
        gr.load_vectors(f"hf://{REPO}", tiny_model("bridge", "gpt2"))
    assert torch.equal(gr.load_vectors(f"hf://{REPO}@{hub.revision}").directions, v.directions)


def test_a_second_fetch_takes_the_cache_and_a_new_commit_replaces_it(hub: StubHub) -> None:
    vectors().push_to_hub(REPO, token=TOKEN)
    gr.load_vectors(f"hf://{REPO}")
    before = len(hub.requests)
    gr.load_vectors(f"hf://{REPO}")
    assert not [r for r in hub.requests[before:] if r.startswith("GET")]
    (-vectors()).push_to_hub(REPO, token=TOKEN)
    assert torch.equal(gr.load_vectors(f"hf://{REPO}").directions, -vectors().directions)


def test_files_of_other_programs_on_a_hub(hub: StubHub, tmp_path: Path) -> None:
    gr.export.export_gguf(vectors(), tmp_path / "v.gguf", layers=[1, 2])
    hub.repos[REPO] = {
        "v/happy.gguf": (tmp_path / "v.gguf").read_bytes(),
        "vectors.safetensors": b"\x80\x04cos\nsystem\n(S'touch /tmp/no'\ntR.",
    }
    assert gr.load_vectors(f"hf://{REPO}/v/happy.gguf").layers == (1, 2)
    with pytest.raises(ValueError, match="pickled"):
        gr.load_vectors(f"hf://{REPO}")


def test_private_repositories_need_the_token(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors().push_to_hub(REPO, private=True, token=TOKEN)
    with pytest.raises(FileNotFoundError, match="private"):
        gr.load_vectors(f"hf://{REPO}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert gr.load_vectors(f"hf://{REPO}").layers == (0, 1, 2)


# -- what goes wrong --------------------------------------------------------------------------------------------------


PUSHES = ("POST /api/repos", f"POST /api/models/{REPO}/preupload", f"POST /api/models/{REPO}/commit")
KINDS = {401: PermissionError, 403: PermissionError, 404: OSError, 429: ConnectionError, 500: ConnectionError}


@pytest.mark.parametrize("start", PUSHES)
@pytest.mark.parametrize("status", KINDS)
def test_a_push_that_fails_changes_no_file(hub: StubHub, status: int, start: str) -> None:
    vectors().push_to_hub(REPO, token=TOKEN)
    before = dict(hub.repos[REPO])
    hub.fail = {start: status}
    with pytest.raises(KINDS[status], match=re.escape(REPO)) as caught:
        (-vectors()).push_to_hub(REPO, token=TOKEN)
    assert hub.repos[REPO] == before
    assert_kept_secret(caught)
    hub.fail = {}
    (-vectors()).push_to_hub(REPO, token=TOKEN)
    assert hub.repos[REPO] != before


@pytest.mark.parametrize("method", ["HEAD", "GET"])
@pytest.mark.parametrize("status", [*KINDS, "cut"])
def test_a_fetch_that_fails_leaves_no_half_of_a_file(hub: StubHub, tmp_path: Path, status: Any, method: str) -> None:
    if (method, status) == ("HEAD", "cut"):
        pytest.skip("an answer without a body cannot break off")
    vectors().push_to_hub(REPO, token=TOKEN)
    hub.fail = {f"{method} /{REPO}": status}
    with pytest.raises(KINDS.get(status, ConnectionError), match=re.escape(REPO)):
        gr.load_vectors(f"hf://{REPO}")
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not list((tmp_path / "cache").rglob("blobs/*"))
    hub.fail = {}
    assert torch.equal(gr.load_vectors(f"hf://{REPO}").directions, vectors().directions)


def test_a_full_disk_during_the_download(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors().push_to_hub(REPO, token=TOKEN)

    def full(url: str, temp_file: Any, **options: Any) -> None:
        temp_file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", full)
        with pytest.raises(OSError, match="No space left") as caught:
            gr.load_vectors(f"hf://{REPO}")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert torch.equal(gr.load_vectors(f"hf://{REPO}").directions, vectors().directions)


def test_no_hub_at_all(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="not reached"):
        gr.load_vectors(f"hf://{REPO}")
    with pytest.raises(ConnectionError, match="not reached") as caught:
        vectors().push_to_hub(REPO, token=TOKEN)
    assert_kept_secret(caught)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: gr.load_vectors(f"hf://{REPO}"), lambda: vectors().push_to_hub(REPO, token=TOKEN)):
        with pytest.raises(ConnectionError, match="offline|HF_HUB_OFFLINE"):
            call()


def test_what_is_not_there(hub: StubHub) -> None:
    vectors().push_to_hub(REPO, token=TOKEN)
    for address, said in (
        ("hf://someone/other", "no repository"),
        (f"hf://{REPO}@v9", "no such revision"),
        (f"hf://{REPO}/other.gguf", "no such file"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            gr.load_vectors(address)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://one", "hf://a/../b", "hf:/a/b", "hf://a/b/../../c", "hf://a b/c", "hf://-a/b"]
)
def test_addresses_that_cannot_be(hub: StubHub, address: str) -> None:
    with pytest.raises(ValueError, match="hf://owner/name"):
        gr.load_vectors(address)
    assert hub.requests == []


def test_pushes_that_cannot_be(hub: StubHub) -> None:
    for repo in ("liking", "a/b/c", "", "a/b c", f"{hub.endpoint}/a/b"):
        with pytest.raises(ValueError, match="owner/name"):
            vectors().push_to_hub(repo, token=TOKEN)
    with pytest.raises(ValueError, match="evidence"):
        vectors().push_to_hub(REPO, evidence=3, token=TOKEN)
    for token in ("", f"{TOKEN}\n", f"two {TOKEN}", "hf_ü"):
        with pytest.raises(ValueError, match="white space") as caught:
            vectors().push_to_hub(REPO, token=token)
        assert_kept_secret(caught)
    assert hub.requests == []


# -- the token --------------------------------------------------------------------------------------------------------


def assert_kept_secret(caught: Any) -> None:
    said = "".join(traceback.format_exception(caught.type, caught.value, None))
    assert TOKEN not in said and TOKEN not in repr(caught.value)


def test_the_token_is_nowhere(
    hub: StubHub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    v = vectors()
    v.push_to_hub(REPO, evidence=EVIDENCE, token=TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    gr.load_vectors(f"hf://{REPO}")
    hub.fail = {"POST": 500}
    with pytest.raises(ConnectionError) as caught:
        v.push_to_hub(REPO)
    assert_kept_secret(caught)
    assert TOKEN not in "".join(capfd.readouterr())
    for file in [*hub.repos[REPO].values(), *(f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())]:
        assert TOKEN.encode() not in file


def test_a_token_in_an_error_is_taken_out(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def talkative(*_: Any, **__: Any) -> None:
        raise OSError(f"bad header Authorization: Bearer {TOKEN}")

    monkeypatch.setattr(HfApi, "create_repo", talkative)
    with pytest.raises(ConnectionError, match=r"\*\*\*") as caught:
        vectors().push_to_hub(REPO, token=TOKEN)
    assert_kept_secret(caught)


# -- the card ---------------------------------------------------------------------------------------------------------


def test_the_card_says_what_was_measured() -> None:
    model = {"name": "someone/tiny", "config_hash": "abc", "fingerprint": {"logprobs": [1.0], "norms": [2.0]}}
    v = vectors(model=model, evidence=EVIDENCE, chosen=EVIDENCE["chosen"], data_hash="d1", seed=3)
    front, body = parts_of(card_of(v, REPO, licence="mit", prompts_licence="CC BY 4.0", intended_use="Tests only."))
    assert front["license"] == "mit" and front["base_model"] == "someone/tiny" and front["library_name"] == "grains-tl"
    for said in (
        "It steers", "+1.87 nats", "+1.13 to +2.60", "95%", "12", "KL 0.050", "above 4 of 4",
        "+2.00 (+0.67 to +3.33): beaten",
        "CC BY 4.0", "Tests only.", "`abc`", "`d1`", "alpha 0.2", "`add_renorm`", f"hf://{REPO}", "The vector steers.",
    ):  # fmt: skip
        assert said in body, said


def test_the_card_says_what_is_not_known() -> None:
    front, body = parts_of(card_of(vectors(), REPO))
    assert "license" not in front and "base_model" not in front
    assert "Nobody has shown what it does" in body and "not stated" in body
    weak = {**EVIDENCE, "steers": False, "above_low": -0.2, "beaten": 2}
    assert "not shown to steer" in card_of(vectors(evidence=weak), REPO)
    assert ": not beaten" in card_of(vectors(evidence=weak), REPO)
    alone = {k: x for k, x in EVIDENCE.items() if k not in ("n_draws", "beaten", "above_control", "above_low")}
    assert "none was run" in card_of(vectors(evidence=alone), REPO)


@pytest.mark.parametrize(
    "nasty", ["a | b\n\n# Heading", "---\nlicense: evil", "<script>x</script>", "`code` [link](http://x)"]
)
def test_what_others_wrote_cannot_change_the_card(nasty: str) -> None:
    evidence = {**EVIDENCE, "verdict": [nasty], "effect": nasty, "recipe": nasty}
    v = vectors(method=nasty, model={"name": nasty}, evidence=evidence, note=nasty)
    one = {**EVIDENCE, "verdict": ["x"]}
    plain_lines = card_of(vectors(model={"name": "x"}, evidence=one, note="x"), REPO).count("\n")
    card = card_of(v, REPO, licence=nasty, prompts_licence=nasty, intended_use=nasty)
    front, body = parts_of(card)
    assert front["license"] == nasty and set(front) == {"library_name", "tags", "license"}
    assert card.count("\n") == plain_lines + 1  # one line more of metadata
    assert "<script>" not in re.sub(r"`[^`]*`", "", body) and "\n# Heading" not in card


# -- evidence from results --------------------------------------------------------------------------------------------


def test_an_audit_gives_its_evidence(bridge: Any, hub: StubHub) -> None:
    words = ("great", "good", "warm", "awful", "bad", "cold")
    places = ("film", "food", "hotel", "soup", "room")
    pairs = [gr.PreferencePair(f"the {p} was", f" {a}", f" {b}") for p in places for a in words[:3] for b in words[3:]]
    options: dict[str, Any] = {"n_draws": 2, "n_examples": 1, "max_new_tokens": 2, "alphas": [0.1, 0.4]}
    result = gr.audit(bridge, vectors(), pairs, ["caa", "random_direction"], layers=[1], **options)
    evidence = result.evidence
    assert json.loads(json.dumps(evidence)) == evidence
    assert evidence["effect"] == pytest.approx(float(result.row["effect"])) and evidence["n"] == int(result.row["n"])
    assert evidence["chosen"]["layers"] == [1] and evidence["steers"] == result.steers
    result.vectors.push_to_hub(REPO, evidence=result, token=TOKEN)
    again = gr.load_vectors(f"hf://{REPO}")
    assert again.chosen is not None and again.chosen.alpha == pytest.approx(float(result.row["alpha"]))
    assert f"{evidence['effect']:+.2f} nats" in hub.repos[REPO]["README.md"].decode()
    found = result.found.evidence
    assert found["chosen"]["layers"] == list(result.found.best.layers) and found["verdict"]


# -- from a shell -----------------------------------------------------------------------------------------------------


def test_the_command_pushes(hub: StubHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    file, told = vectors().save(tmp_path / "v.safetensors"), tmp_path / "evidence.json"
    told.write_text(json.dumps(EVIDENCE), encoding="utf-8")
    arguments = ["push", str(file), "--repo", REPO, "--evidence", str(told), "--licence", "mit"]
    assert main(arguments) == 2 and "log in" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert f"hf://{REPO}" in said.out and TOKEN not in said.out + said.err
    assert gr.load_vectors(f"hf://{REPO}").info["evidence"] == EVIDENCE
    told.write_text("no json", encoding="utf-8")
    assert main(arguments) == 2 and "evidence.json" in capsys.readouterr().err
    told.write_text("[1]", encoding="utf-8")
    assert main(arguments) == 2 and "evidence" in capsys.readouterr().err


def test_a_repository_without_its_prefix_is_told_how() -> None:
    with pytest.raises(FileNotFoundError, match=r"load_vectors\('hf://somebody/warm-vectors'\)"):
        gr.load_vectors("somebody/warm-vectors")
