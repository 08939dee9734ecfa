"""The page of the vision-language demo: pictures with their heatmaps, the caption table, captions before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grains_tl._util.files import write_atomically
from grains_tl._util.html import number, text
from grains_tl.attribution.result import Attribution
from grains_tl.hallucination.datasets import YesNoQuestion
from grains_tl.models._scenes import partner
from grains_tl.plotting.html import image, page, settings_table, table
from grains_tl.plotting.images import plot_image_attribution


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
    body = f"""<h1>Naming what is not there: attribution and steering</h1>
<p class="note">grains_tl report on {text(results["settings"]["model"])}, a vision-language model of 0.95 million
parameters trained on pictures of handwritten digits in which some digits usually come together</p>
<div class="verdicts"><p>{text(results["verdict"])}</p></div>
<h2>Does it look at the picture?</h2>
<p>Accuracy on digits it was never trained on, and with zeros in the place of the 16 image tokens.</p>
{_skills(results["skills"])}
<h2>Why does it say yes?</h2>
<p>Questions for a digit that is absent, while the digit that came along with it in training is shown; the model says yes.
Chosen is yes, so positive scores (nats) speak for it. Chance for the partner's four patches is 0.25 of the image.</p>
{"".join(_question(question, attribution) for question, attribution in shown)}
{_shares(results["false_yes"])}
<h2>Do captions get better?</h2>
<p>Unsteered, {number(base["hallucinating"], ".3f")} &plusmn; {number(base["hallucinating_se"], ".3f")} (se) of
{number(base["n"], "d")} captions of held-out scenes name an absent digit, and {number(base["coverage"], ".2f")} of the
digits shown are named. Every vector below is scaled to move the caption's next-token distribution by a KL of
{number(kl, "g")} nats; its layer is chosen on other scenes. The interval (95 %) runs over building seeds (or draws) and
test scenes.</p>
{_captions_table(results["table"])}
<p>Fewer hallucinating captions than the rival, by (share of captions, 95 % interval):</p>
{_against(results["against"])}
<h2>Captions before and after</h2>
<p>With the first leave-one-out vector. Digits that are not in the picture are struck through.</p>
{_before_after(results["captions"])}
<h2>Settings and versions</h2>
<p>The run took {number(results["seconds"], ".0f")} seconds.</p>
{settings_table(results["settings"])}
{settings_table(results["versions"])}"""
    return page("grains_tl report", body, style="del { color: #b2182b; text-decoration-thickness: 2px; }")


def _skills(skills: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (
            text(kind),
            number(f["accuracy"]),
            number(f["accuracy_no_image"]),
            number(f["commonest"]),
            number(f["n"], "d"),
        )
        for kind, f in skills.items()
    )
    heads = ("question", "accuracy", "image tokens zeroed", "always the commonest answer", "n")
    return table(heads, rows, numbers=(1, 2, 3, 4))


def _question(question: YesNoQuestion, attribution: Attribution) -> str:
    digits = ", ".join(map(str, question.meta["digits"]))
    picture = image(plot_image_attribution(attribution, question.image), "Picture with the scores of its patches")
    caption = (
        f"&ldquo;{text(question.question)}&rdquo; The picture shows {text(digits)}; "
        f"{partner(question.meta['digit'])} is the partner. log p(yes) &minus; log p(no) = "
        f"{number(attribution.objective, '+.2f')} nats."
    )
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _shares(shares: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (
            text(method),
            f"{number(f['share'])} &plusmn; {number(f['se'])}",
            f"{number(f['of_image'])} &plusmn; {number(f['of_image_se'])}",
            number(f["agreement"]),
            number(f["occlusion_largest"]),
            number(f["median_relative_gap"]),
            number(f["n"], "d"),
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
    return table(heads, rows, numbers=(1, 2, 3, 4, 5, 6))


def _captions_table(found: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        (
            text(row["vector"]),
            number(row["hallucinating"], ".3f"),
            f"{number(row['low'], '.3f')} to {number(row['high'], '.3f')}",
            number(row["coverage"], ".3f"),
            text(row["layers"]),
            number(row["n_vectors"], "d"),
            number(row["n"], "d"),
        )
        for row in found
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
    return table(heads, rows, numbers=(1, 2, 3, 5, 6))


def _against(against: Mapping[str, Mapping[str, float]]) -> str:
    rows = (
        (
            text(name),
            number(c["difference"], "+.3f"),
            f"{number(c['low'], '+.3f')} to {number(c['high'], '+.3f')}",
            f"{c['beaten']:.0f} of {c['n_draws']:.0f}",
        )
        for name, c in against.items()
    )
    return table(("rival", "fewer by", "interval", "rival vectors beaten"), rows, numbers=(1, 2, 3))


def _before_after(rows: Sequence[Mapping[str, Any]]) -> str:
    def marked(said: str, absent: Sequence[int]) -> str:
        gone = {str(v) for v in absent}
        return " ".join(f"<del>{text(w)}</del>" if w in gone else text(w) for w in said.split())

    cells = ((text(r["truth"]), marked(r["before"], r["absent"]), marked(r["after"], r["absent"])) for r in rows)
    return table(("truth", "before", "after"), cells, kind="continuations")
