"""Vectors on a Hugging Face hub: pushed with a card in one commit, fetched by ``hf://owner/name``.

``HF_ENDPOINT`` names another hub, ``HF_TOKEN`` or a login holds the token. A token is handed to huggingface_hub and to
nothing else: no file, no card and no message has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grains_tl._util.errors import OptionError
from grains_tl.vectors.card import card_of
from grains_tl.vectors.hub_errors import said_plainly
from grains_tl.vectors.steering import Steering
from grains_tl.vectors.tensor_files import vectors_content

#: The file that ``push_to_hub`` writes.
FILE = "vectors.safetensors"

ADDRESS = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class OnHub:
    """What lets ``SteeringVectors`` be pushed."""

    def push_to_hub(
        self,
        repo: str,
        *,
        evidence: Any = None,
        chosen: Steering | None = None,
        licence: str | None = None,
        prompts_licence: str | None = None,
        intended_use: str | None = None,
        private: bool | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the vectors with a card that says what they do; ``load_vectors("hf://owner/name")`` reads them.

        File and card go up in one commit, so that the repository has both or neither. The evidence is kept in the file too.

        Args:
            repo: ``"owner/name"``; made where there is none.
            evidence: what was measured: the result of ``audit`` or ``find_vector``, or its ``.evidence``. Without it the
                card says that nothing is known.
            chosen: the layer, alpha and operator to use; default those of the evidence, or of the file that was loaded.
            licence: of the vectors, by its identifier on the hub, such as ``"mit"``.
            prompts_licence: of the records that the vectors were built from.
            intended_use: what they are for, and what not.
            private: make a private repository, where it is new.
            token: with write access; default that of the environment or of a login.

        Returns:
            The address of the repository.

        Raises:
            OptionError: a name that is not owner/name, evidence that is neither a result nor a mapping.
            PermissionError: no token, or one without write access.
            ConnectionError: a hub that cannot be reached or fails; nothing was changed there.

        Examples:
            >>> vectors.push_to_hub("me/refusal-smollm2", evidence=audit(model, vectors, pairs))    # doctest: +SKIP
        """
        if REPOSITORY.fullmatch(repo) is None:
            raise OptionError(f"repo={repo!r}; expected owner/name, of letters, digits, '-', '_' and '.'")
        vectors = _with_evidence(self, evidence, chosen)
        readme = card_of(vectors, repo, licence=licence, prompts_licence=prompts_licence, intended_use=intended_use)
        address = _endpoint()
        with said_plainly(repo, address, _checked(token), "no file was changed there"):
            from huggingface_hub import CommitOperationAdd, HfApi

            api = HfApi(endpoint=address, token=token)
            url = api.create_repo(repo, private=private, exist_ok=True)
            files = {FILE: vectors_content(vectors), "README.md": readme.encode()}
            additions = [
                CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()
            ]
            api.create_commit(repo, additions, commit_message="Steering vectors and what was measured of them")
        return str(url)


def _with_evidence(vectors: Any, evidence: Any, chosen: Steering | None) -> Any:
    found = getattr(evidence, "evidence", evidence)
    if found is not None and not isinstance(found, Mapping):
        raise OptionError(
            f"evidence is a {type(evidence).__name__}; expected the result of audit or find_vector, or its .evidence"
        )
    info = dict(vectors.info) if found is None else {**vectors.info, "evidence": dict(found)}
    choice = found.get("chosen") if found is not None and chosen is None else chosen and chosen.choice
    return replace(vectors, info={**info, "chosen": choice} if choice else info)


def fetch(address: str) -> Path:
    """The file behind ``hf://owner/name``, ``hf://owner/name@revision`` or ``hf://owner/name/file``, in the hub's own cache.

    Raises:
        OptionError: no such address.
        FileNotFoundError: no such repository, revision or file.
        PermissionError: a private or gated repository without access.
        ConnectionError: a hub that cannot be reached, fails, or stops half-way; the cache holds no half of a file.
        OSError: no space.
    """
    found = ADDRESS.fullmatch(address)
    if found is None or REPOSITORY.fullmatch(found["repo"]) is None or ".." in (found["file"] or ""):
        raise OptionError(f"{address!r}; expected hf://owner/name, with @revision or /file behind it where they differ")
    hub = _endpoint()
    with said_plainly(found["repo"], hub, None, "no file was written"):
        from huggingface_hub import hf_hub_download

        got = hf_hub_download(found["repo"], found["file"] or FILE, revision=found["revision"], endpoint=hub)
        return Path(got)


def is_address(path: str | Path) -> bool:
    """Whether it is ``hf://...`` and no file."""
    return str(path).startswith("hf:/")


def _endpoint() -> str | None:
    """Read at every call, as huggingface_hub reads it only when it is imported."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _checked(token: str | None) -> str | None:
    """A token that can be a header; its value is in no message."""
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
        raise OptionError("token is empty, or has white space or characters that no token has; copy it again")
    return token
