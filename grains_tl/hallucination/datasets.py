"""The published files as they are: POPE, SPA-VL, MMHal-Bench, MMMU. Images stay what the file has: names, paths or PIL."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grains_tl.records.pairs import PreferencePair
from grains_tl.records.sources import read_rows

Source = str | Path | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class YesNoQuestion:
    """An is-there question.

    Attributes:
        image: PIL image, or the path of one.
        question: its text.
        answer: True for yes.
        split: ``"random"``, ``"popular"``, ``"adversarial"``, or whatever the source calls it.
        meta: other columns of the source.

    Examples:
        >>> YesNoQuestion("kitchen.jpg", "Is there a dog in the image?", False, "adversarial").answer
        False
    """

    image: Any
    question: str
    answer: bool
    split: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JudgedQuestion:
    """A question whose answer a judge rates.

    Attributes:
        image: PIL image, path or address.
        question: its text.
        reference: the standard answer.
        contents: objects in the image, for judges that do not see it.
        kind: type of question.
        meta: other columns of the source.

    Examples:
        >>> question = JudgedQuestion("park.jpg", "What is on the bench?", "A book.", ("bench", "book"), "attribute")
        >>> question.contents
        ('bench', 'book')
    """

    image: Any
    question: str
    reference: str
    contents: tuple[str, ...]
    kind: str
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageQuestion:
    """A question with options, or an open one.

    Attributes:
        images: in the order the question names them (``<image 1>``, ...).
        question: its text.
        options: empty for an open question.
        answer: index of the right option; ``None`` for an open question, or where the file keeps the answer back.
        reference: the answer as the source has it: a letter, or for an open question the text.
        meta: other columns of the source.

    Examples:
        >>> question = ImageQuestion(("graph.png",), "Which line rises? <image 1>", ("red", "blue"), 1, "B")
        >>> question.pair().chosen
        '(B)'
    """

    images: tuple[Any, ...]
    question: str
    options: tuple[str, ...]
    answer: int | None
    reference: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """Question and lettered options as MMMU's own prompts have them."""
        if not self.options:
            return f"{self.question}\n\nAnswer the question using a single word or phrase."
        letters = zip(string.ascii_uppercase, self.options, strict=False)
        listed = "\n".join(f"({letter}) {option}" for letter, option in letters)
        return f"{self.question}\n\n{listed}\n\nAnswer with the option's letter from the given choices directly."

    def pair(self) -> PreferencePair:
        """The right option's letter against the first wrong one's, as a conversation with the images.

        Returns:
            A ``PreferencePair``.

        Raises:
            ValueError: an open question, or one whose answer is not known.
        """
        if self.answer is None or len(self.options) < 2:
            raise ValueError(
                f"a question with {len(self.options)} options and the answer {self.reference!r} gives no "
                "preference pair; expected a right and a wrong option"
            )
        wrong = next(i for i in range(len(self.options)) if i != self.answer)
        letters = [f"({string.ascii_uppercase[i]})" for i in (self.answer, wrong)]
        image = list(self.images) or None
        return PreferencePair(
            [{"role": "user", "content": self.prompt}], letters[0], letters[1], image, dict(self.meta)
        )


def load_pope(source: Source, split: str | None = None, *, images: str | Path | None = None) -> list[YesNoQuestion]:
    """POPE's questions: one JSON object a line with ``image``, ``text``, ``label`` ("yes" / "no").

    Args:
        source: the file (``coco_pope_adversarial.json``), or its rows.
        split: name of the split; by default taken from the file's name, or from a column ``category``.
        images: folder the image names stand in.

    Returns:
        One ``YesNoQuestion`` per row, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without these columns or with another label; the message names the row (from 1).

    Examples:
        >>> rows = [{"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "no"}]
        >>> load_pope(rows, "random")[0].answer
        False
    """
    known = ("random", "popular", "adversarial")
    if split is None and isinstance(source, (str, Path)):
        split = next((s for s in known if s in Path(source).stem), None)
    found = []
    for number, row in read_rows(source):
        _require(row, ("image", "label"), number)
        text = row.get("text", row.get("question"))
        label = str(row["label"]).strip().lower()
        if text is None or label not in ("yes", "no"):
            raise ValueError(
                f"row {number}: expected a text and a label yes or no (POPE), got {text!r}, {row['label']!r}"
            )
        name = split or str(row.get("category", "unknown"))
        used = ("image", "text", "question", "label")
        found.append(YesNoQuestion(_image(row["image"], images), str(text), label == "yes", name, _others(row, used)))
    return _some(found, "questions", source)


def load_spa_vl(source: Source, *, images: str | Path | None = None) -> list[PreferencePair]:
    """SPA-VL's preferences: ``image``, ``question``, ``chosen``, ``rejected``, as conversations with an image.

    Args:
        source: a ``datasets.Dataset``, a .json / .jsonl file, or rows.
        images: folder the image names stand in.

    Returns:
        One ``PreferencePair`` per row, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without these columns, or with chosen equal to rejected; the message names the row (from 1).

    Examples:
        >>> row = {"image": "x.jpg", "question": "What is this?", "chosen": "A cat.", "rejected": "A dog."}
        >>> load_spa_vl([row])[0].prompt
        [{'role': 'user', 'content': 'What is this?'}]
    """
    found = []
    for number, row in read_rows(source):
        _require(row, ("image", "question", "chosen", "rejected"), number)
        prompt = [{"role": "user", "content": str(row["question"])}]
        meta = _others(row, ("image", "question", "chosen", "rejected"))
        try:
            pair = PreferencePair(prompt, str(row["chosen"]), str(row["rejected"]), _image(row["image"], images), meta)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        found.append(pair)
    return _some(found, "preferences", source)


def load_mmhal(source: Source, *, images: str | Path | None = None) -> list[JudgedQuestion]:
    """MMHal-Bench's questions: ``question``, ``gt_answer``, ``image_content``, ``image_src``, ``question_type``.

    Args:
        source: the file (``response_template.json``), or its rows.
        images: folder with the images under the last part of their address; by default the address is kept.

    Returns:
        One ``JudgedQuestion`` per row, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row without these columns; the message names the row (from 1).

    Examples:
        >>> row = {"question": "How many cats?", "gt_answer": "Two.", "image_content": ["cat"], "image_src": "x.jpg",
        ...        "question_type": "counting"}
        >>> load_mmhal([row])[0].reference
        'Two.'
    """
    found = []
    used = ("question", "gt_answer", "image_content", "image_src", "question_type")
    for number, row in read_rows(source):
        _require(row, used, number)
        address = row["image_src"]
        place = _image(str(address).rsplit("/", 1)[-1], images) if images is not None else address
        contents = tuple(str(c) for c in row["image_content"])
        question = JudgedQuestion(
            place, str(row["question"]), str(row["gt_answer"]), contents, str(row["question_type"]), _others(row, used)
        )
        found.append(question)
    return _some(found, "questions", source)


def load_mmmu(source: Source, *, images: str | Path | None = None) -> list[ImageQuestion]:
    """MMMU's questions: ``question``, ``options`` (a list, or its text), ``answer`` (a letter), ``image_1`` .. ``image_7``.

    Args:
        source: a ``datasets.Dataset``, a .json / .jsonl file, or rows.
        images: folder the image names stand in.

    Returns:
        One ``ImageQuestion`` per row, in order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: missing columns, options that are no list, an answer that is none of them; names the row (from 1).

    Examples:
        >>> row = {"question": "Which? <image 1>", "options": ["red", "blue"], "answer": "B", "image_1": "x.png"}
        >>> load_mmmu([row])[0].answer
        1
    """
    found = []
    for number, row in read_rows(source):
        _require(row, ("question", "options", "answer"), number)
        options = _options(row["options"], number)
        letter = str(row["answer"]).strip()
        places = string.ascii_uppercase[: len(options)]
        answer = places.index(letter) if len(letter) == 1 and letter in places else None
        if options and answer is None and letter != "?":  # the test split keeps its answers back
            raise ValueError(
                f"row {number}: the answer {letter!r} does not name one of the {len(options)} options ({places})"
            )
        pictures = [row.get(f"image_{i}") for i in range(1, 8)]
        kept = tuple(_image(p, images) for p in pictures if p is not None)
        meta = _others(row, ("question", "options", "answer", *(f"image_{i}" for i in range(1, 8))))
        found.append(ImageQuestion(kept, str(row["question"]), options, answer, letter, meta))
    return _some(found, "questions", source)


def _options(value: Any, number: int) -> tuple[str, ...]:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value) if value.strip() else []
        except (ValueError, SyntaxError):
            raise ValueError(f"row {number}: options {value!r} cannot be read as a list") from None
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"row {number}: options are a {type(value).__name__}; expected a list")
    return tuple(str(option) for option in value)


def _require(row: Any, columns: Sequence[str], number: int) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"row {number} is a {type(row).__name__}; expected a mapping with {list(columns)}")
    missing = [c for c in columns if row.get(c) is None]
    if missing:
        raise ValueError(f"row {number} lacks the columns {missing}; it has {list(row)}")


def _image(value: Any, folder: str | Path | None) -> Any:
    return str(Path(folder) / value) if folder is not None and isinstance(value, str) else value


def _others(row: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    return {str(k): v for k, v in row.items() if k not in used}


def _some(found: list[Any], what: str, source: Any) -> list[Any]:
    if not found:
        raise ValueError(f"no {what} in {source if isinstance(source, (str, Path)) else 'the given rows'}")
    return found
