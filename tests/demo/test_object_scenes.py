"""Scenes, questions and caption pairs for the vision model around SmolLM2."""

from __future__ import annotations

import pytest

from grains_tl.demo import object_scenes as records
from grains_tl.models._object_scenes import OBJECTS, Thing, named_objects, partner


def test_questions_are_balanced_and_true(unchecked: None) -> None:
    questions = records.object_questions("test", 30)
    assert len(questions) == 120 and sum(q.answer for q in questions) == 60
    for question in questions:
        index, shown = question.meta["object"], question.meta["objects"]
        assert named_objects(question.question) == [index]
        assert question.answer == (index in shown)
        if question.split == "adversarial" and not question.answer:
            assert partner(index) in shown
    assert not set(records.object_scenes("build", 20)[0]) & set(records.object_scenes("choose", 20)[0])
    with pytest.raises(ValueError, match="part='dev'"):
        records.object_scenes("dev", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "shared", "chosen", "rejected"),
    [
        ("A king and a queen.", "A king", ".", " and a queen."),
        ("A king, a queen and a five.", "A king", " and a five.", ", a queen and a five."),
        ("A queen and a king.", "A", " king.", " queen and a king."),
        ("A sun and a five", "A", " five.", " sun and a five."),
    ],
)
def test_a_caption_is_set_against_itself_without_what_is_absent(
    said: str, shared: str, chosen: str, rejected: str
) -> None:
    scene = tuple(Thing(OBJECTS.index(name), cell, 0, 0) for cell, name in enumerate(("king", "five")))
    pair = records.object_caption_pair(scene, None, said)
    assert (pair.prompt, pair.chosen, pair.rejected) == (records.CAPTION_PROMPT + shared, chosen, rejected)
    short = records.object_caption_pair(scene, None, said, first_word=True)
    assert chosen.startswith(str(short.chosen)) and rejected.startswith(str(short.rejected))
    assert short.chosen != short.rejected


@pytest.mark.parametrize("said", ["A king.", "A sun.", "Nothing."])
def test_captions_without_a_difference_are_refused(said: str) -> None:
    with pytest.raises(ValueError, match="shown and absent"):
        records.object_caption_pair((Thing(OBJECTS.index("king"), 0, 0, 0),), None, said)
