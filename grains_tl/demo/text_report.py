"""One page for one run: verdicts, tokens, layers, controls, continuations, settings. One file that needs no network.

Everything that comes from data is escaped, and the page's own policy lets no script run but ours and loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from grains_tl._util.files import write_atomically
from grains_tl._util.html import DASH, count, number, percent, signed, text
from grains_tl.attribution.result import Attribution
from grains_tl.evaluate.generations import marked_words
from grains_tl.plotting.effects import plot_controls, plot_layers
from grains_tl.plotting.html import image, nothing, page, settings_table, table
from grains_tl.plotting.sweeps import plot_cost

KEYS = ("settings", "versions", "seconds", "sets")


SET_KEYS = (
    *("name", "about", "n", "base", "tokens", "attribution", "sweep", "chosen"),
    *("table", "draws", "continuations", "headline", "verdict"),
)


def write_report(results: dict[str, Any], folder: str | Path) -> Path:
    """Write ``report.html``: self-contained, complete or not at all.

    Args:
        results: of a run, as in ``results.json``: ``settings``, ``versions``, ``seconds`` and ``sets``; numbers may be
            NaN or None (shown as a dash). Effects, standard errors and scores are in nats.
        folder: where to write; made if it is not there.

    Returns:
        Path of the file.

    Raises:
        ValueError: keys missing in ``results`` or in one of its sets; before anything is written.
    """
    # a lone surrogate in a token is data too: it must not keep the page from being written
    return write_atomically(Path(folder) / "report.html", report_html(results).encode("utf-8", "backslashreplace"))


def report_html(results: Mapping[str, Any]) -> str:
    """The page as text; arguments and errors as in ``write_report``."""
    _require(results, KEYS, "results")
    for i, one in enumerate(results["sets"]):
        _require(one, SET_KEYS, f"results['sets'][{i}]")
    model = results["settings"].get("model")
    sets = results["sets"]
    verdicts = "".join(
        f'<p><a href="#set-{i}">{text(one["name"])}</a>\n{text(one["headline"])}</p>' for i, one in enumerate(sets)
    )
    body = f"""<h1>Attribution and steering: what was found</h1>
<p class="note">grains_tl report{"" if model is None else f" on {text(model)}"}; {count(len(sets), "record set")}</p>
<div class="verdicts">{verdicts or "<p>No record set was run.</p>"}</div>
{_how_to_read()}
{"".join(_set_section(one, i, results["settings"]) for i, one in enumerate(sets))}
<h2 id="settings">Settings and versions</h2>
<p>The run took {number(results["seconds"], ".0f")} seconds.</p>
{settings_table(results["settings"])}
{settings_table(results["versions"])}"""
    return page("grains_tl report", body)


def _how_to_read() -> str:
    terms = {
        "margin": "log p(chosen) &minus; log p(rejected) of one record, in nats; one nat is a factor of 2.7 in odds.",
        "effect": "half the change of the margin between steering by +alpha and by &minus;alpha, mean over test "
        "records, in nats. Positive: the vector pushes toward the chosen responses; zero: it does nothing.",
        "alpha": "the size of the step, as a fraction of the layer's typical residual norm, so that one alpha means "
        "one thing at every layer.",
        "uncertainty": "two kinds, and neither replaces the other. Over test records: the standard error (se) says how "
        "the effect would differ on other test records. Over building records: the bootstrap says how it would differ "
        "had the vector been built from other records. Random controls are drawn rather than built: their effect is the "
        "mean over draws, and the range of draws stands in place of the bootstrap. The column &ldquo;interval&rdquo; "
        "names what low and high run over.",
        "p, random tokens": "share of the draws of random tokens whose effect is at least as large.",
        "f(x)": "the contrastive log-likelihood of a prompt, which the token scores explain: how much more the model "
        "expects the chosen response than the rejected one, in nats.",
        "completeness gap": "what the token scores add up to, minus the change of f they should explain. Small against "
        "that change (below 0.05 of it) means the scores have converged; methods that promise no such sum have none.",
    }
    rows = "".join(f"<dt>{term}</dt><dd>{meaning}</dd>" for term, meaning in terms.items())
    return f'<h3 id="how-to-read">How to read this</h3>\n<dl>{rows}</dl>'


def _set_section(one: Mapping[str, Any], index: int, settings: Mapping[str, Any]) -> str:
    n, base, chosen = one["n"], one["base"], one["chosen"]
    # where a run compares at a fixed alpha, the chosen one is that of the continuations alone
    fixed = settings.get("alpha")
    alpha = fixed if isinstance(fixed, int | float) else chosen.get("alpha")
    size = f"""Vectors are built from {number(n.get("build"), "d")} records; layer and alpha are chosen on
{number(n.get("choose"), "d")} others; effects are measured on {number(n.get("test"), "d")} test records (single draws
on {number(n.get("test_for_draws"), "d")} of them)."""
    start = f"""Unsteered, the mean margin on test records is {signed(base.get("margin"))} &plusmn;
{number(base.get("margin_se"))} nats (se) and {percent(base.get("accuracy"))} of the margins are positive."""
    return f"""
<h2 id="set-{index}">{text(one["name"])}</h2>
<p>{text(one["about"])}</p>
<p>{size} {start}</p>
<h3>Which tokens cause it</h3>
{_token_pictures(one["tokens"])}
{_attribution_table(one["attribution"])}
<h3>Where steering works</h3>
{_layer_plot(one["sweep"], chosen.get("layer"), alpha)}
<h3>Against controls</h3>
<p>Effects at layer {number(chosen.get("layer"), "d")} with alpha {number(alpha, "g")}, on test records;
effect, se, low and high in nats.</p>
{_control_plot(one["table"], one["draws"])}
{_control_table(one["table"])}
<p class="verdict note">{text(one["verdict"])}</p>
{_at_equal_cost(one.get("cost"))}
<h3>Continuations</h3>
{_continuations(one["continuations"])}
"""


def _token_pictures(examples: Sequence[Mapping[str, Any]]) -> str:
    """The prompts of a few records, a tint on every token."""
    if not examples:
        return nothing("No example records were kept.")
    return "\n".join(f"<figure>{_attribution(example)._repr_html_()}</figure>" for example in examples)


def _attribution(example: Mapping[str, Any]) -> Attribution:
    scores = [math.nan if score is None else float(score) for score in example["scores"]]
    objective, baseline, gap = (
        None if example[key] is None else float(example[key]) for key in ("objective", "baseline_objective", "gap")
    )
    return Attribution(
        scores=torch.tensor(scores, dtype=torch.float32),
        tokens=[str(token) for token in example["tokens"]],
        content=torch.tensor(example["content"], dtype=torch.bool),
        is_image=torch.zeros(len(scores), dtype=torch.bool),
        gap=gap,
        objective=math.nan if objective is None else objective,
        baseline_objective=baseline,
        method=str(example["method"]),
        chosen=str(example["chosen"]),
        rejected=str(example["rejected"]),
    )


def _attribution_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = (
        (
            text(row["method"]),
            "none" if row["median_relative_gap"] is None else number(row["median_relative_gap"], ".3f"),
            number(row["n"], "d"),
            number(row["seconds"], ".1f"),
        )
        for row in rows
    )
    return table(("method", "median relative gap", "records", "seconds"), cells, numbers=(1, 2, 3)) if rows else ""


def _layer_plot(sweep: Sequence[Mapping[str, Any]], layer: int | None, wanted: float | None) -> str:
    """One alpha of the sweep: the wanted one, or else the nearest that was tried."""
    frame = pd.DataFrame(list(sweep))
    if not len(frame):
        return nothing("No layers were swept.")
    alpha = min(set(frame["alpha"]), key=lambda a: (abs(a - (a if wanted is None else wanted)), -abs(a)))
    tried = frame[frame["alpha"] == alpha]
    caption = f"Effect over layers at alpha {number(alpha, 'g')} on the records for choosing"
    caption += "." if tried["n"].isna().all() else f" (n = {number(tried['n'].max(), 'd')})."
    figure = plot_layers(tried, layer)
    return f"<figure>{image(figure, 'Effect over layers')}<figcaption>{caption}</figcaption></figure>"


def _control_plot(table: Sequence[Mapping[str, Any]], draws: Mapping[str, Sequence[Any]]) -> str:
    if not table:
        return nothing("No vectors were measured.")
    picture = image(plot_controls(pd.DataFrame(list(table)), draws), "Effect of each vector with its interval")
    caption = (
        "Large dot and bar: effect and interval; small dots: single draws (bootstrap resamples, or random controls)."
    )
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _control_table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = ("vector", "effect", "se", "low", "high", "interval", "draws", "records", "p, random tokens")
    cells = (
        (
            text(row["vector"]),
            signed(row["effect"]),
            number(row["se"]),
            signed(row["low"]),
            signed(row["high"]),
            text(row["interval"]),
            number(row["n_draws"], "d"),
            number(row["n"], "d"),
            number(row["p_random_tokens"], ".3f"),
        )
        for row in rows
    )
    return table(heads, cells, numbers=(1, 2, 3, 4, 6, 7, 8), kind="controls") if rows else ""


def _at_equal_cost(cost: Mapping[str, Any] | None) -> str:
    """Effect against KL, where it was measured."""
    if not cost:
        return ""
    curve = pd.DataFrame(list(cost["curve"])).dropna(subset=["alpha", "effect", "kl"])
    if curve.empty:
        return nothing("No costs were measured.")
    picture = image(plot_cost(curve), "Effect of each vector against its KL")
    heads = ("vector", "layer", "alpha", "effect", "se", "low", "high", "minus CAA", "low", "high", "records")
    cells = (
        (
            text(row["vector"]),
            number(row["layer"], "d"),
            number(row["alpha"], ".3f"),
            *(signed(row["effect"]), number(row["se"]), signed(row["low"]), signed(row["high"])),
            *(signed(row[f"difference{end}"]) for end in ("", "_low", "_high")),
            number(row["n"], "d"),
        )
        for row in cost["at_kl"]
    )
    return f"""<h3>At equal cost</h3>
<p>Each vector at the layer that was best for it on the records for choosing. The cost is the KL of the steered from the
unsteered model on neutral text. The table reads the curves at {number(cost["kl"], "g")} nats per token. An effect here is
the change of the margin by +alpha alone, so that it is not the same as above.</p>
<figure>{picture}<figcaption>Effect on test records against its cost, one point per alpha.</figcaption></figure>
{table(heads, cells, numbers=range(1, 11))}"""


def _continuations(rows: Sequence[Mapping[str, Any]]) -> str:
    """Texts of one prompt side by side, alphas from low to high."""
    if not rows:
        return nothing("No continuations were kept.")
    alphas = sorted({float(row["alpha"]) for row in rows})
    texts: dict[str, dict[float, list[str]]] = {}
    for row in rows:
        texts.setdefault(str(row["prompt"]), {}).setdefault(float(row["alpha"]), []).append(str(row["text"]).strip())
    head = "".join(f"<th>alpha {number(a, '+g') if a else '0 (unsteered)'}</th>" for a in alphas)
    body = ""
    for prompt, found in texts.items():
        body += f'<tr><td class="prompt" colspan="{len(alphas)}">{text(prompt)}</td></tr>'
        base = " ".join(found.get(0.0, []))
        cells = ("\n".join(marked_words(base, one) if a else text(one) for one in found.get(a, [DASH])) for a in alphas)
        body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    whole = f'<table class="continuations"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{whole}</div>{nothing("Tinted words are not in the unsteered text at their place.")}'


def _require(mapping: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(f"{where} lacks {missing}; a report needs {list(keys)}")
