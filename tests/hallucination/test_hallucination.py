"""Hallucination measures against counts by hand, readers on samples with the published columns, a judge on a stub."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from grains_tl import hallucination as hl

POPE = (
    '{"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?", '
    '"label": "yes"}\n'
    '{"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a backpack in the image?", '
    '"label": "no"}\n'
)
MMHAL = [
    {
        "question_type": "attribute",
        "question_topic": "indoor",
        "image_id": "ba9a6a2d1f2f5d2e",
        "image_src": "https://example.org/7_ba9a6a2d1f2f5d2e_o.jpg",
        "image_content": ["Cat", "Mat"],
        "question": "What colour is the cat?",
        "gt_answer": "The cat is black.",
        "model_answer": "",
    }
]
MMMU: list[dict[str, Any]] = [
    {
        "id": "validation_Accounting_1",
        "question": "<image 1> Which year has the larger income?",
        "options": "['1991', '1992', \"it's equal\"]",
        "explanation": "",
        "image_1": "a.png",
        "image_2": None,
        "img_type": "['Tables']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Financial Accounting",
    },
    {
        "id": "open",
        "question": "How many?",
        "options": "[]",
        "answer": "4",
        "image_1": "b.png",
        "question_type": "open",
    },
]


# -- yes / no ---------------------------------------------------------------------------------------------------------


def test_yes_no_scores_are_the_counts() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(60) < 0.4
    margins = rng.normal(size=60) + truth
    s = hl.yes_no_scores(truth.tolist(), margins=margins.tolist())
    yes = margins > 0
    tp, fp, fn, tn = (yes & truth).sum(), (yes & ~truth).sum(), (~yes & truth).sum(), (~yes & ~truth).sum()
    assert s.accuracy == pytest.approx((tp + tn) / 60)
    assert (s.precision, s.recall) == pytest.approx((tp / (tp + fp), tp / (tp + fn)))
    assert s.f1 == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert s.yes_rate == pytest.approx((tp + fp) / 60)
    assert s.false_yes == pytest.approx(fp / (fp + tn))
    assert s.balanced_accuracy == pytest.approx((tp / (tp + fn) + tn / (tn + fp)) / 2)
    # AUC is the chance that a true yes has the larger margin
    above = [(a > b) + 0.5 * (a == b) for a in margins[truth] for b in margins[~truth]]
    assert s.auc == pytest.approx(np.mean(above))


def test_a_shift_of_the_margins_leaves_auc_alone() -> None:
    truth, margins = [True, False, True, False, True], [2.0, 1.0, 0.5, -1.0, 3.0]
    before = hl.yes_no_scores(truth, margins=margins)
    after = hl.yes_no_scores(truth, margins=[m - 1.5 for m in margins])
    assert after.auc == before.auc
    assert after.yes_rate < before.yes_rate


def test_yes_no_scores_where_one_side_is_missing() -> None:
    s = hl.yes_no_scores([True, True], said=[True, False])
    assert (s.accuracy, s.recall) == (0.5, 0.5)
    assert math.isnan(s.balanced_accuracy) and math.isnan(s.false_yes) and math.isnan(s.auc)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([True], None, None), "neither answers nor margins"),
        (([True], [True, False], None), "1 true answers, 2 given"),
        (([], [], None), "0 true answers"),
        (([True, False], None, [1.0, math.nan]), "NaN or infinite"),
    ],
)
def test_yes_no_scores_refuse(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hl.yes_no_scores(*arguments)


def test_read_yes_no_follows_the_first_sentence() -> None:
    answers = ["Yes, there is a dog.", "No, there isn't.", "There is no dog. Yes.", "It isn't there", "nothing here"]
    assert [hl.read_yes_no(a) for a in answers] == [True, False, False, False, True]


def test_win_rate_counts_ties_half() -> None:
    rate, se = hl.preference_win_rate(torch.tensor([[0.0, -1.0], [-1.0, 0.0], [-2.0, -2.0], [0.0, -3.0]]))
    wins = [1, 0, 0.5, 1]
    assert rate == np.mean(wins)
    assert se == pytest.approx(np.std(wins, ddof=1) / 2)


# -- captions ---------------------------------------------------------------------------------------------------------


def test_caption_scores_by_hand() -> None:
    def objects(text: str) -> set[str]:
        return {"cat", "dog", "mat", "cup"} & set(text.split())

    captions = ["a cat and a dog and a dog", "a mat", "nothing"]
    present = [{"cat"}, {"mat", "cup"}, {"cup"}]
    s = hl.caption_hallucination(captions, present, objects)
    assert s.per_caption == (True, False, False)
    assert s.hallucinating == pytest.approx(1 / 3)
    assert s.absent_mentions == pytest.approx(1 / 3)  # cat, dog, mat are named, dog is absent
    assert s.coverage == pytest.approx((1 + 0.5 + 0) / 3)
    assert s.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))


def test_caption_scores_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="1 captions and 0 sets"):
        hl.caption_hallucination(["a"], [], str.split)


# -- readers ----------------------------------------------------------------------------------------------------------


def test_pope_file(tmp_path: Path) -> None:
    path = tmp_path / "coco_pope_adversarial.json"
    path.write_text(POPE)
    questions = hl.load_pope(path, images="/images")
    assert [q.answer for q in questions] == [True, False]
    assert {q.split for q in questions} == {"adversarial"}
    assert Path(questions[0].image) == Path("/images/COCO_val2014_000000310196.jpg")
    assert questions[1].meta["question_id"] == 2


def test_pope_as_the_hub_has_it() -> None:
    rows = [{"question": "Is there a dog?", "answer": "yes", "category": "popular", "image": "x", "label": "yes"}]
    assert hl.load_pope(rows)[0].split == "popular"


def test_pope_refuses_another_label() -> None:
    with pytest.raises(ValueError, match="row 1.*maybe"):
        hl.load_pope([{"image": "x", "text": "Is it?", "label": "maybe"}])


def test_spa_vl_rows() -> None:
    row = {
        "image": "3.jpg",
        "question": "What is this?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "class1": "Toxicity",
    }
    pair = hl.load_spa_vl([row], images="pictures")[0]
    assert (pair.chosen, pair.rejected, pair.meta) == ("A cat.", "A dog.", {"class1": "Toxicity"})
    assert pair.prompt == [{"role": "user", "content": "What is this?"}]
    assert Path(pair.image) == Path("pictures/3.jpg")
    with pytest.raises(ValueError, match="row 2 lacks the columns \\['chosen'\\]"):
        hl.load_spa_vl([row, {**row, "chosen": None}])
    with pytest.raises(ValueError, match="row 1: chosen equals rejected"):
        hl.load_spa_vl([{**row, "rejected": "A cat."}])


def test_mmhal_file(tmp_path: Path) -> None:
    path = tmp_path / "response_template.json"
    path.write_text(json.dumps(MMHAL))
    question = hl.load_mmhal(path)[0]
    assert (question.reference, question.contents, question.kind) == ("The cat is black.", ("Cat", "Mat"), "attribute")
    assert question.image == "https://example.org/7_ba9a6a2d1f2f5d2e_o.jpg"
    assert Path(hl.load_mmhal(path, images="here")[0].image) == Path("here/7_ba9a6a2d1f2f5d2e_o.jpg")


def test_mmmu_rows() -> None:
    choice, open_question = hl.load_mmmu(MMMU)
    assert choice.options == ("1991", "1992", "it's equal")
    assert (choice.answer, choice.images, open_question.answer) == (1, ("a.png",), None)
    assert "(B) 1992" in choice.prompt and open_question.reference == "4"
    assert (choice.pair().chosen, choice.pair().rejected, choice.pair().image) == ("(B)", "(A)", ["a.png"])
    with pytest.raises(ValueError, match="no preference pair"):
        open_question.pair()
    assert hl.load_mmmu([{**MMMU[0], "answer": "?"}])[0].answer is None
    with pytest.raises(ValueError, match="row 1: the answer 'D' does not name one of the 3 options"):
        hl.load_mmmu([{**MMMU[0], "answer": "D"}])
    with pytest.raises(ValueError, match="row 1: options .1; 2. cannot be read"):
        hl.load_mmmu([{**MMMU[0], "options": "1; 2"}])


def test_readers_name_missing_files_and_broken_lines(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hl.load_pope(tmp_path / "nowhere.json")
    path = tmp_path / "pope.jsonl"
    path.write_text(POPE + "{broken\n")
    with pytest.raises(ValueError, match="line 3: not valid JSON"):
        hl.load_pope(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no questions"):
        hl.load_pope(path)


# -- judges -----------------------------------------------------------------------------------------------------------


def test_judge_answers_with_a_rule() -> None:
    questions = hl.load_mmhal(MMHAL) * 2

    def rule(prompt: str) -> str:
        answer = prompt.split("Answer to rate: ")[1].split("\n")[0]
        return f"Rating: {5 if 'black' in answer else 1}"

    frame = hl.judge_answers(questions, ["It is black.", "It is a dog."], rule)
    assert frame["rating"].tolist() == [5, 1]
    assert frame["hallucinates"].tolist() == [False, True]
    with pytest.raises(ValueError, match="answer 1: expected 'Rating: 0'"):
        hl.judge_answers(questions[:1], ["x"], lambda _: "good")
    with pytest.raises(ValueError, match="2 questions and 1 answers"):
        hl.judge_answers(questions, ["x"], rule)


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("Rating: 3", 3), ("**Rating**: 0", 0), ("Rating: 2 ... so\nRating: 4", 4), ("Rating: 10", None), ("6", None)],
)
def test_read_rating(reply: str, rating: int | None) -> None:
    assert hl.read_rating(reply) == rating


class _Stub(BaseHTTPRequestHandler):
    """Answers like an OpenAI-compatible server; ``plan`` says with which status, call by call."""

    plan: ClassVar[list[int]] = []
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append({"path": self.path, "body": body, "key": self.headers.get("Authorization")})
        status = type(self).plan.pop(0) if type(self).plan else 200
        reply = {"choices": [{"message": {"role": "assistant", "content": "fine\nRating: 4"}}]}
        raw = json.dumps(reply if status == 200 else {"error": "no"} if status != 299 else {"other": 1}).encode()
        self.send_response(200 if status == 299 else status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Stub.plan, _Stub.seen = [], []
    stub = HTTPServer(("127.0.0.1", 0), _Stub)
    thread = threading.Thread(target=stub.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{stub.server_port}/v1"
    stub.shutdown()
    stub.server_close()


def test_chat_judge_speaks_the_protocol(server: str) -> None:
    judge = hl.chat_judge(server, "my-judge", api_key="secret")
    frame = hl.judge_answers(hl.load_mmhal(MMHAL), ["It is black."], judge)
    assert frame["rating"].tolist() == [4]
    call = _Stub.seen[0]
    assert call["path"] == "/v1/chat/completions"
    assert call["key"] == "Bearer secret"
    assert call["body"]["model"] == "my-judge"
    assert call["body"]["temperature"] == 0
    assert call["body"]["messages"][0]["role"] == "user"
    assert "Image contents: Cat, Mat" in call["body"]["messages"][0]["content"]


def test_chat_judge_tries_again_when_the_server_is_busy(server: str) -> None:
    _Stub.plan = [503, 429]
    assert hl.chat_judge(server, "m", wait=0.01)("hello").endswith("Rating: 4")
    assert len(_Stub.seen) == 3


@pytest.mark.parametrize(("plan", "calls"), [([401], 1), ([500] * 9, 2)])
def test_chat_judge_gives_up(server: str, plan: list[int], calls: int) -> None:
    _Stub.plan = plan
    with pytest.raises(ConnectionError, match=f"answered {plan[0]}"):
        hl.chat_judge(server, "m", retries=1, wait=0.01)("hello")
    assert len(_Stub.seen) == calls


def test_chat_judge_refuses_other_replies_and_addresses(server: str) -> None:
    _Stub.plan = [299]
    with pytest.raises(ValueError, match="not a chat completion"):
        hl.chat_judge(server, "m")("hello")
    with pytest.raises(ConnectionError, match="after 1 tries"):
        hl.chat_judge("http://127.0.0.1:9", "m", retries=0)("hello")
    with pytest.raises(ValueError, match="an address such as"):
        hl.chat_judge("localhost:8000", "m")
