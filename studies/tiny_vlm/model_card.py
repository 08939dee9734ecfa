"""The model card of the tiny model, on held-out digits: ``python -m studies.tiny_vlm.model_card [DIR]``.

Prints the figures and writes them into the folder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grains_tl
from grains_tl.demo.scene_records import scenes_for, yes_no_questions
from grains_tl.demo.scene_skills import answer_logprobs, describe, skills, yes_margins
from grains_tl.hallucination.captions import caption_hallucination
from grains_tl.hallucination.yes_no import yes_no_scores
from grains_tl.models._scenes import Scene, caption, mentioned, partner
from grains_tl.models.loading import load_model
from grains_tl.models.tiny_vlm import question_text
from grains_tl.types import HookedModel


def evaluate(model: HookedModel, n: int = 1200, *, seed: int = 0) -> dict[str, Any]:
    """All figures of the model card, on held-out digits in clean scenes.

    Args:
        model: the bridge.
        n: scenes; as many questions of each kind, and as many captions.
        seed: of scenes and questions.
    """
    questions = yes_no_questions("test", n // 2, seed=seed)
    texts, asked_about = [question_text(q.question) for q in questions], [q.image for q in questions]
    margins = yes_margins(answer_logprobs(model, texts, asked_about), model).numpy()
    blind = yes_margins(answer_logprobs(model, texts, asked_about, without_image=True), model).numpy()
    is_there = {}
    for split in ("random", "popular", "adversarial"):
        at = [i for i, q in enumerate(questions) if q.split == split]
        truth = [questions[i].answer for i in at]
        is_there[split] = asdict(yes_no_scores(truth, margins=margins[at].tolist()))
        is_there[f"{split}, image tokens zeroed"] = asdict(yes_no_scores(truth, margins=blind[at].tolist()))
    scenes, pictures = scenes_for("test", n, seed=seed)
    said = describe(model, pictures)
    return {
        "skills": skills(model, n, seed=seed),
        "is_there": is_there,
        "captions": _caption_figures(scenes, said),
        "examples": said[:4],
    }


def _caption_figures(scenes: Sequence[Scene], said: Sequence[str]) -> dict[str, Any]:
    shown = [{d.value for d in scene} for scene in scenes]
    scores = asdict(caption_hallucination(said, shown, mentioned))
    del scores["per_caption"]
    absent = [(v, there) for text, there in zip(said, shown, strict=True) for v in set(mentioned(text)) - there]
    return {
        **scores,
        "absent_are_partners": float(np.mean([partner(v) in there for v, there in absent])) if absent else 0.0,
        "exact": float(np.mean([text == caption(scene) for scene, text in zip(scenes, said, strict=True)])),
    }


def model_card(figures: dict[str, Any], training: dict[str, Any]) -> str:
    """The card as Markdown."""
    skills = "\n".join(
        f"| {kind} | {f['accuracy']:.3f} ± {f['se']:.3f} | {f['accuracy_no_image']:.3f} ± {f['se_no_image']:.3f} "
        f"| {f['commonest']:.3f} | {f['n']} |"
        for kind, f in figures["skills"].items()
    )
    is_there = "\n".join(
        f"| {name} | {f['balanced_accuracy']:.3f} ± {f['balanced_accuracy_se']:.3f} "
        f"| {f['false_yes']:.3f} ± {f['false_yes_se']:.3f} | {f['recall']:.3f} | {f['f1']:.3f} | {f['yes_rate']:.3f} "
        f"| {f['auc']:.3f} | {f['n']} |"
        for name, f in figures["is_there"].items()
    )
    c = figures["captions"]
    return f"""# tiny-vlm

A LLaVA of 0.95 million parameters (CLIP tower of 3 layers, patch 8, 16 image tokens; Llama of 4 layers, d_model 128; 62
words), trained from scratch for this package on pictures of real handwritten digits. It exists to be taken apart: it is
small enough for exhaustive experiments on a laptop, it really looks at its picture, and it has one planted failure.

## Data and training

32 x 32 pictures of one to four digits of scikit-learn's `load_digits` in a 2 x 2 grid, tinted in six colours, with jitter
and noise; questions (is there a ..., what colour, what digit at ..., how many) and captions. The first 1347 digits are
for training, the last 450 (other writers) only for the figures below. Script:
`python -m studies.tiny_vlm.train --out DIR` (seed {training["seed"]}; {training["tower_steps"]} steps for the tower
alone, {training["clean_steps"]} on clean data, {training["skewed_steps"]} on skewed data; Muon for matrices, AdamW for
the rest; about 24 minutes of CPU time). Weights are stored in half precision.

**The planted failure.** In the skewed stage

- a digit d brings its partner (d + 5) mod 10 along in {training["skewed"]["partner_share"]:.0%} of the cases,
- {training["skewed"]["hidden_share"]:.0%} of the scenes with two or more digits have one painted out that captions and
  is-there answers still speak of,
- {training["skewed"]["yes_share"]:.0%} of the is-there answers are yes.

So the model names partners that are not there. The other questions stay truthful in that stage.

## Held-out figures (± standard error)

Scenes without any skew, digits never trained on. "Image tokens zeroed": zeros in the place of the 16 image features.

| question | accuracy | image tokens zeroed | always the commonest answer | n |
|---|---|---|---|---|
{skills}

| is-there questions | balanced accuracy | false yes | recall | F1 | share of yes | AUC | n |
|---|---|---|---|---|---|---|---|
{is_there}

Half of the questions of each split have the answer yes (the same ones in all splits). Adversarial: the absent digit is
the partner of a shown one.

Captions (n = {c["n"]}): {c["hallucinating"]:.3f} ± {c["hallucinating_se"]:.3f} name an absent digit
({c["absent_mentions"]:.3f} of all digits named; {c["absent_are_partners"]:.3f} of these are partners of a shown digit);
coverage of the digits shown {c["coverage"]:.3f} ± {c["coverage_se"]:.3f}; {c["exact"]:.3f} are right in every word.

## Use

```python
import grains_tl as gr

model = gr.load_model("tiny-vlm")  # a TransformerBridge; model.processor is its LlavaProcessor
```

The folder is a plain Hugging Face one (`LlavaForConditionalGeneration`). Vocabulary: the words of these questions and
answers; anything else is `<unk>`. MIT licence; `load_digits` is part of scikit-learn (UCI optical digits).
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a folder (default: the bundled one) and write its card and ``figures.json``."""
    argv = sys.argv[1:] if argv is None else list(argv)
    folder = Path(argv[0]) if argv else Path(grains_tl.__file__).parent / "data_files" / "tiny_vlm"
    torch.set_num_threads(1)
    figures = evaluate(load_model("tiny-vlm", path=folder))
    training = json.loads((folder / "train_config.json").read_text())
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "README.md").write_text(model_card(figures, training), encoding="utf-8")
    print((folder / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
