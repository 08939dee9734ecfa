"""Judges: plain callables from a prompt to a reply. One for OpenAI-compatible servers, and the rating of MMHal-Bench."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Sequence

import pandas as pd

from grains_tl._util.progress import progress_bar
from grains_tl.hallucination.datasets import JudgedQuestion

#: Takes a prompt, returns the judge's reply.
Judge = Callable[[str], str]


SCALE = """\
6: nothing made up, very informative, with good analysis or reasoning
5: nothing made up, very informative
4: nothing made up, somewhat informative
3: nothing made up, not informative
2: something made up, very informative
1: something made up, somewhat informative
0: something made up, not informative"""


def rating_prompt(question: JudgedQuestion, answer: str) -> str:
    """The prompt for a judge that does not see the image: what is in it, question, standard answer, the answer to rate.

    The scale is that of MMHal-Bench (arXiv 2309.14525), the wording is our own, so ratings need not equal published ones.

    Args:
        question: from ``load_mmhal``.
        answer: the model's answer.

    Returns:
        The prompt; it asks for a rating from 0 to 6.

    Examples:
        >>> question = JudgedQuestion("park.jpg", "What is on the bench?", "A book.", ("bench", "book"), "attribute")
        >>> "Image contents: bench, book" in rating_prompt(question, "A dog.")
        True
    """
    return (
        "Rate the answer of a vision-language model. You do not see the image; what is in it is listed. An answer makes "
        "something up if it states what the image contents and the standard answer do not support.\n\n"
        f"Image contents: {', '.join(question.contents)}\nQuestion: {question.question}\n"
        f"Standard answer: {question.reference}\nAnswer to rate: {answer}\n\nScale:\n{SCALE}\n\n"
        "Explain in one or two sentences, then end with a line 'Rating: N'."
    )


def read_rating(reply: str) -> int | None:
    r"""The last rating (0 to 6) in a judge's reply; ``None`` if there is none.

    Args:
        reply: the judge's text.

    Returns:
        The rating, or ``None``.

    Examples:
        >>> read_rating("It invents a dog.\nRating: 1"), read_rating("**Rating:** 5"), read_rating("fine")
        (1, 5, None)
    """
    found = re.findall(r"rating\W*\s*([0-6])(?![\d])", reply, flags=re.IGNORECASE)
    return int(found[-1]) if found else None


def judge_answers(
    questions: Sequence[JudgedQuestion],
    answers: Sequence[str],
    judge: Judge,
) -> pd.DataFrame:
    """Rate answers, one row each: ``kind``, ``question``, ``answer``, ``rating``, ``hallucinates``, ``reply``.

    As in MMHal-Bench an answer with a rating under 3 hallucinates; the mean of ``hallucinates`` is the hallucination rate.

    Args:
        questions: from ``load_mmhal``.
        answers: one per question.
        judge: any callable from prompt to reply: ``chat_judge(...)``, or rules of your own.

    Returns:
        One row per answer, in order; ``rating`` from 0 to 6, ``hallucinates`` true or false.

    Raises:
        ValueError: not one answer per question, or a reply without a rating (named by its number, from 1).

    Examples:
        >>> question = JudgedQuestion("park.jpg", "What is on the bench?", "A book.", ("bench", "book"), "attribute")
        >>> judge_answers([question], ["A dog."], lambda prompt: "There is no dog. Rating: 1")["hallucinates"].tolist()
        [True]
    """
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions and {len(answers)} answers; expected one each")
    rows = []
    pairs = progress_bar(zip(questions, answers, strict=True), total=len(questions), desc="judge")
    for number, (question, answer) in enumerate(pairs, start=1):
        reply = judge(rating_prompt(question, answer))
        rating = read_rating(reply)
        if rating is None:
            raise ValueError(
                f"answer {number}: expected 'Rating: 0' to 'Rating: 6' in the judge's reply, got: {reply[:200]!r}"
            )
        rows.append(
            {
                "kind": question.kind,
                "question": question.question,
                "answer": answer,
                "rating": rating,
                "hallucinates": rating < 3,
                "reply": reply,
            }
        )
    return pd.DataFrame(rows)


def chat_judge(
    url: str,
    model: str,
    *,
    api_key: str | None = None,
    timeout: float = 60.0,
    retries: int = 3,
    wait: float = 1.0,
) -> Judge:
    """A judge behind any OpenAI-compatible server (the chat completions call; temperature 0).

    Args:
        url: base address, e.g. ``"http://localhost:8000/v1"``.
        model: the server's name for the model.
        api_key: sent as a bearer token if given.
        timeout: seconds to wait for a reply.
        retries: further tries after a busy server (429, 5xx) or a broken connection.
        wait: seconds before the second try; doubles each time.

    Returns:
        A callable from prompt to reply; it raises ``ConnectionError`` when all tries failed or the server refused, and
        ``ValueError`` for a reply of another form.

    Raises:
        ValueError: an address that does not begin with http:// or https://.

    Examples:
        >>> judge = chat_judge("http://localhost:8000/v1", "my-judge")     # doctest: +SKIP
        >>> judge_answers(load_mmhal("response_template.json"), answers, judge)["hallucinates"].mean()  # doctest: +SKIP
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url!r}; expected an address such as 'http://localhost:8000/v1'")
    address = url.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"

    def judge(prompt: str) -> str:
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:
                    return _content(response.read())
            except urllib.error.HTTPError as error:
                detail = error.read(300).decode(errors="replace")
                if attempt == retries or (error.code != 429 and error.code < 500):
                    raise ConnectionError(f"{address} answered {error.code}: {detail}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                if attempt == retries:
                    raise ConnectionError(f"no answer from {address} after {retries + 1} tries: {error}") from None
            time.sleep(wait * 2**attempt)
        raise AssertionError("unreachable")

    return judge


def _content(raw: bytes) -> str:
    try:
        return str(json.loads(raw)["choices"][0]["message"]["content"])
    except (json.JSONDecodeError, KeyError, IndexError, TypeError):
        raise ValueError(f"the server's reply is not a chat completion: {raw[:200]!r}") from None
