"""The page of the vision-language demo: pictures with their heatmaps, the caption table, captions before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_tl.hallucination.readers import YesNoQuestion
from grains_tl.plotting.images import plot_image_attribution
from grains_tl.report import CSS, _image, _number, _settings_table, _table, _text
from grains_tl.tiny_vlm.scenes import partner
from grains_tl.types import Attribution
from grains_tl.vectors import write_atomically


def write_vision_report(
    results: Mapping[str, Any], shown: Sequence[tuple[YesNoQuestion, Attribution]], folder: str | Path
) -> Path:
    """Write ``report.html``: self-contained, complete or not at all.

    Args:
        results: of ``run_vision_demo``.
        shown: questions with their attribution, to draw.
        folder: where to write.
    """
    return write_atomically(Path(folder) / "report.html", vision_report_html(results, shown).encode("utf-8"))


def vision_report_html(results: Mapping[str, Any], shown: Sequence[tuple[YesNoQuestion, Attribution]]) -> str:
    """The page as text; arguments as in ``write_vision_report``."""
    base, kl = results["base"], results["settings"]["kl"]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>grains_tl report</title>
<style>{CSS}
del {{ color: #b2182b; text-decoration-thickness: 2px; }}</style>
</head>
<body>
<h1>Naming what is not there: attribution and steering</h1>
<p class="note">grains_tl report on {_text(results["settings"]["model"])}, a vision-language model of 0.95 million
parameters trained on pictures of handwritten digits in which some digits usually come together</p>
<div class="verdicts"><p>{_text(results["verdict"])}</p></div>
<h2>Does it look at the picture?</h2>
<p>Accuracy on digits it was never trained on, and with zeros in the place of the 16 image tokens.</p>
{_skills(results["skills"])}
<h2>Why does it say yes?</h2>
<p>Questions for a digit that is absent, while the digit that came along with it in training is shown; the model says yes.
Chosen is yes, so positive scores (nats) speak for it. Chance for the partner's four patches is 0.25 of the image.</p>
{"".join(_question(question, attribution) for question, attribution in shown)}
{_shares(results["false_yes"])}
<h2>Do captions get better?</h2>
<p>Unsteered, {_number(base["hallucinating"], ".3f")} &plusmn; {_number(base["hallucinating_se"], ".3f")} (se) of
{_number(base["n"], "d")} captions of held-out scenes name an absent digit, and {_number(base["coverage"], ".2f")} of the
digits shown are named. Every vector below is scaled to move the caption's next-token distribution by a KL of
{_number(kl, "g")} nats; its layer is chosen on other scenes. The interval (95 %) runs over building seeds (or draws) and
test scenes.</p>
{_captions_table(results["table"])}
<p>Fewer hallucinating captions than the rival, by (share of captions, 95 % interval):</p>
{_against(results["against"])}
<h2>Captions before and after</h2>
<p>With the first leave-one-out vector. Digits that are not in the picture are struck through.</p>
{_before_after(results["captions"])}
<h2>Settings and versions</h2>
<p>The run took {_number(results["seconds"], ".0f")} seconds.</p>
{_settings_table(results["settings"])}
{_settings_table(results["versions"])}
</body>
</html>
"""


def _skills(skills: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (
            _text(kind),
            _number(f["accuracy"]),
            _number(f["accuracy_no_image"]),
            _number(f["commonest"]),
            _number(f["n"], "d"),
        )
        for kind, f in skills.items()
    )
    heads = ("question", "accuracy", "image tokens zeroed", "always the commonest answer", "n")
    return _table(heads, rows, numbers=(1, 2, 3, 4))


def _question(question: YesNoQuestion, attribution: Attribution) -> str:
    digits = ", ".join(map(str, question.meta["digits"]))
    picture = _image(plot_image_attribution(attribution, question.image), "Picture with the scores of its patches")
    caption = (
        f"&ldquo;{_text(question.question)}&rdquo; The picture shows {_text(digits)}; "
        f"{partner(question.meta['digit'])} is the partner. log p(yes) &minus; log p(no) = "
        f"{_number(attribution.objective, '+.2f')} nats."
    )
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _shares(shares: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (
            _text(method),
            f"{_number(f['share'])} &plusmn; {_number(f['se'])}",
            f"{_number(f['of_image'])} &plusmn; {_number(f['of_image_se'])}",
            _number(f["agreement"]),
            _number(f["occlusion_largest"]),
            _number(f["median_relative_gap"]),
            _number(f["n"], "d"),
        )
        for method, f in shares.items()
    )
    heads = (
        "attribution",
        "support for yes on the partner's patches (&plusmn; se)",
        "of the support within the image",
        "correlation with taking cells out",
        "taking the partner out lowers yes most",
        "median relative gap",
        "n",
    )
    return _table(heads, rows, numbers=(1, 2, 3, 4, 5, 6))


def _captions_table(table: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            _text(row["vector"]),
            _number(row["hallucinating"], ".3f"),
            f"{_number(row['low'], '.3f')} to {_number(row['high'], '.3f')}",
            _number(row["coverage"], ".3f"),
            _text(row["layers"]),
            _number(row["n_vectors"], "d"),
            _number(row["n"], "d"),
        )
        for row in table
    )
    heads = (
        "vector",
        "captions naming an absent digit",
        "interval",
        "coverage",
        "layers chosen",
        "vectors",
        "captions",
    )
    return _table(heads, rows, numbers=(1, 2, 3, 5, 6))


def _against(against: Mapping[str, Mapping[str, float]]) -> str:
    rows = (
        (
            _text(name),
            _number(c["difference"], "+.3f"),
            f"{_number(c['low'], '+.3f')} to {_number(c['high'], '+.3f')}",
            f"{c['beaten']:.0f} of {c['n_draws']:.0f}",
        )
        for name, c in against.items()
    )
    return _table(("rival", "fewer by", "interval", "rival vectors beaten"), rows, numbers=(1, 2, 3))


def _before_after(rows: Sequence[Mapping[str, Any]]) -> str:
    def marked(text: str, absent: Sequence[int]) -> str:
        gone = {str(v) for v in absent}
        return " ".join(f"<del>{_text(w)}</del>" if w in gone else _text(w) for w in text.split())

    cells = ((_text(r["truth"]), marked(r["before"], r["absent"]), marked(r["after"], r["absent"])) for r in rows)
    return _table(("truth", "before", "after"), cells, kind="continuations")
