"""A real small vision-language model that ships with the package, and everything it was made with.

``gr.load_model("tiny-vlm")`` loads it; ``python -m grains_tl.tiny_vlm.train --out DIR`` makes it again.
"""

from grains_tl.tiny_vlm.model import load_tiny_vlm, question_text
from grains_tl.tiny_vlm.preferences import caption_pair, caption_pairs, scenes_for, yes_no_pairs, yes_no_questions
from grains_tl.tiny_vlm.scenes import (
    Digit,
    Scene,
    SceneRule,
    ask,
    caption,
    make_scene,
    make_scenes,
    mentioned,
    partner,
    patches_of,
    render,
    to_images,
)

__all__ = [
    "Digit",
    "Scene",
    "SceneRule",
    "ask",
    "caption",
    "caption_pair",
    "caption_pairs",
    "load_tiny_vlm",
    "make_scene",
    "make_scenes",
    "mentioned",
    "partner",
    "patches_of",
    "question_text",
    "render",
    "scenes_for",
    "to_images",
    "yes_no_pairs",
    "yes_no_questions",
]
