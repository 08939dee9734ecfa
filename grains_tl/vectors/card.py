"""The card of vectors on a hub: what they do, how sure that is, what they cost, how they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from grains_tl._util.files import plain, short_hash
from grains_tl.vectors.directions import LayerDirections

#: Keys of a manifest that the card shows elsewhere, or that are too long for it.
ELSEWHERE = {
    "model",
    "chosen",
    "evidence",
    "found",
    "versions",
    "gate",
    "fisher",
    "neutral_texts",
    "weights",
    "read_from",
}

TAGS = ("steering-vectors", "activation-steering", "interpretability")


def card_of(
    vectors: LayerDirections,
    repo: str,
    *,
    licence: str | None = None,
    prompts_licence: str | None = None,
    intended_use: str | None = None,
) -> str:
    """A README in Markdown, with the hub's metadata in front.

    Args:
        vectors: what is described; ``info["evidence"]`` and ``info["chosen"]`` are what is known of their effect and use.
        repo: ``owner/name``.
        licence: of the vectors.
        prompts_licence: of the records that they were built from.
        intended_use: what they are for.
    """
    info, evidence = vectors.info, vectors.info.get("evidence") or {}
    model = info.get("model") if isinstance(info.get("model"), Mapping) else {}
    parts = [
        *_metadata(str((model or {}).get("name", "")), licence),
        f"# {_text(repo.partition('/')[2])}",
        f"Steering vectors for {_code((model or {}).get('name', 'a model that the file does not name'))}: directions in the "
        f"residual stream, at layers {_list(vectors.layers)}, of width {vectors.directions.shape[1]}.",
        "## What it does",
        *_effect(evidence),
        "## Use",
        *_use(info.get("chosen"), repo),
        "## How it was built",
        *_built(info, model or {}),
        "## Prompts",
        f"Licence of the records it was built from: {_text(prompts_licence or 'not stated')}.",
        "## Intended use",
        _text(intended_use or "Not stated. Research on steering; nothing here was tested for safety in use."),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(model: str, licence: str | None) -> Iterator[str]:
    lines = ["---", "library_name: grains-tl", "tags:", *(f"- {tag}" for tag in TAGS)]
    lines += [f"license: {json.dumps(licence)}"] if licence else []
    lines += [f"base_model: {json.dumps(model)}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else []
    yield "\n".join([*lines, "---"])


def _effect(evidence: Mapping[str, Any]) -> Iterator[str]:
    if not evidence:
        yield (
            "**Nobody has shown what it does**: no evidence was given with it. Judge it on records of the behaviour it is "
            "meant to have: `grains-tl audit vectors.safetensors --model MODEL --pairs PAIRS --out audit`."
        )
        return
    steers = bool(evidence.get("steers"))
    yield (
        f"**{'It steers' if steers else 'It is not shown to steer'}**, measured on {evidence.get('n', '?')} records that it "
        "was neither built nor chosen on. The effect is the change of log p(chosen) - log p(rejected), in nats."
    )
    rows = [
        ("effect", f"{_number(evidence, 'effect', '+.2f')} nats"),
        (
            f"interval ({_number(evidence, 'level', '.0%')}, all recipes together)",
            f"{_number(evidence, 'low', '+.2f')} to {_number(evidence, 'high', '+.2f')}",
        ),
        ("records", str(evidence.get("n", "?"))),
        ("cost", f"KL {_number(evidence, 'kl', '.3f')} nats per token of neutral text"),
        *_controls(evidence),
    ]
    yield "\n".join(["| | |", "|---|---|", *(f"| {_text(name)} | {_text(value)} |" for name, value in rows)])
    sentences = [str(line) for line in evidence.get("verdict", ())]
    if sentences:
        yield "\n".join(f"> {_text(line)}  " for line in sentences)


def _controls(evidence: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    draws = evidence.get("n_draws")
    if not draws:
        yield "controls", "none was run"
        return
    beaten, n = int(evidence.get("beaten", 0)), int(draws)
    yield "random directions at the same KL", f"above {beaten} of {n}"
    above = [_number(evidence, name, "+.2f") for name in ("above_control", "above_low", "above_high")]
    clear = isinstance(evidence.get("above_low"), (int, float)) and evidence["above_low"] > 0
    yield (
        "above the strongest control by",
        f"{above[0]} ({above[1]} to {above[2]}): {'beaten' if clear else 'not beaten'}",
    )


def _use(chosen: Any, repo: str) -> Iterator[str]:
    load = [
        "import grains_tl as gr",
        "",
        "model = gr.load_model(...)  # the model it was made for; another one is refused",
    ]
    load += [f'vectors = gr.load_vectors("hf://{repo}", model)']
    if isinstance(chosen, Mapping):
        at = f"layers {_list(chosen.get('layers', ()))}, alpha {chosen.get('alpha')}"
        yield f"Chosen: {at}, operator {_code(chosen.get('operator'))}, positions {_code(chosen.get('positions', 'all'))}."
        load += ['gr.generate(model, "The film was", vectors.chosen)']
    else:
        load += ["vectors.steering(alpha, layers)  # nobody chose them yet"]
    yield "\n".join(["```python", *load, "```"])


def _built(info: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    rows = [("model", _code(model["name"]))] if "name" in model else []
    rows += [("hash of the model's shape", _code(model["config_hash"]))] if "config_hash" in model else []
    if "fingerprint" in model:
        rows += [("hash of what the weights compute", _code(short_hash(model["fingerprint"])))]
    for name, value in sorted(info.items()):
        said = json.dumps(value, default=plain) if not isinstance(value, str) else value
        if name not in ELSEWHERE and value is not None and len(said) <= 120:
            rows.append((name.replace("_", " "), _code(said)))
    versions = info.get("versions")
    if isinstance(versions, Mapping):
        rows += [("versions", _text(", ".join(f"{name} {version}" for name, version in versions.items())))]
    yield (
        "\n".join(["| | |", "|---|---|", *(f"| {_text(name)} | {value} |" for name, value in rows)])
        if rows
        else "Not stated."
    )


def _number(evidence: Mapping[str, Any], name: str, form: str) -> str:
    value = evidence.get(name)
    return format(float(value), form) if isinstance(value, (int, float)) and value == value else "?"


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)


def _text(value: Any) -> str:
    """On one line, with nothing in it that Markdown or HTML would take for its own."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", line)


def _code(value: Any) -> str:
    line = " ".join(str(value).split()).replace("`", "'").replace("|", "/")
    return f"`{line}`"
