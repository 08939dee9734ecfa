"""The many errors of huggingface_hub as four of Python's own: not found, not allowed, no connection, no space.

None of them says a token, nor carries the error that it came from, whose request would.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Packages through which huggingface_hub talks, by version (httpx2 among them); their errors have no common kind.
TRANSPORT = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextmanager
def said_plainly(repo: str, hub: str | None, token: str | None, safe: str) -> Iterator[None]:
    """Run what talks to a hub.

    Args:
        repo: ``owner/name``.
        hub: its address; ``None`` for huggingface.co.
        token: to be kept out of messages, beside that of the environment.
        safe: what an error has left as it was.

    Raises:
        ImportError: without huggingface_hub.
        FileNotFoundError: no such repository, revision or file.
        PermissionError: not allowed.
        ConnectionError: not reached, failed or broken off.
        OSError: no space.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ImportError("vectors on a hub need huggingface_hub: pip install huggingface_hub") from None
    try:
        yield
    except Exception as error:
        said = _Talk(repo, hub or "https://huggingface.co", token, safe).plain(error)
        if said is None:
            raise
        raise said from None


@dataclass(frozen=True, repr=False)
class _Talk:
    """What an error is about."""

    repo: str
    where: str
    token: str | None
    safe: str

    def plain(self, error: Exception) -> OSError | None:
        """The error to be raised instead; ``None`` for one that has nothing to do with a hub."""
        import huggingface_hub.errors as hf

        at = f"{self.repo} at {self.where}"
        not_there = (
            (hf.RevisionNotFoundError, f"{at} has no such revision"),
            (hf.RemoteEntryNotFoundError, f"{at} has no such file; name one that it has: hf://{self.repo}/FILE"),
        )
        for kind, said in not_there:
            if isinstance(error, kind):
                return FileNotFoundError(said)
        if isinstance(error, hf.GatedRepoError):
            return PermissionError(f"{at} is gated: ask for access on its page, and log in")
        if isinstance(error, hf.RepositoryNotFoundError):
            why = "there is none, or it is private: check the name, and log in (HF_TOKEN)"
            return FileNotFoundError(f"no repository {at}: {why}")
        if isinstance(error, hf.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            return self.plain(error.__cause__)
        if isinstance(error, hf.HfHubHTTPError):
            return self._of_status(error)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            reason = f"{error.strerror or error}: cannot write {self.repo} into the cache; {self.safe}"
            return type(error)(error.errno, reason, error.filename)
        if isinstance(error, OSError) or type(error).__module__.startswith(TRANSPORT):
            return ConnectionError(
                f"{self.where} was not reached for {self.repo}, or broke off ({self._scrubbed(error)}); {self.safe}. Try "
                "again"
            )
        return None

    def _of_status(self, error: Any) -> OSError:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            advice = "log in, or give a token with access"
            return PermissionError(f"{self.where} refused {self.repo} (status {status}): {advice}; {self.safe}")
        said = self._scrubbed(error)
        return ConnectionError(f"{self.where} failed with {self.repo} ({said}); {self.safe}. Try again later")

    def _scrubbed(self, error: BaseException) -> str:
        """The first line of an error, without a token."""
        from huggingface_hub import get_token

        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        for secret in (self.token, get_token()):
            said = said.replace(secret, "***") if secret else said
        return said
