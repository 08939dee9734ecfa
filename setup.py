"""What pyproject.toml cannot say: a README whose links lead somewhere on the package index, and reproducible archives.

With ``SOURCE_DATE_EPOCH`` set, two builds of one commit are the same byte for byte.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent


def absolute(text: str, home: str) -> str:
    """Markdown with its relative links and images turned into addresses in the repository."""

    def address(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        return f"{picture}[{label}]({home}/{'raw' if picture else 'blob'}/main/{target})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # code stays as it is
    return "".join(
        part if part.startswith("```") else re.sub(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)", address, part) for part in parts
    )


def home() -> str:
    """The repository, which pyproject.toml names in one place."""
    found = re.search(r'^Homepage = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.M)
    if found is None:
        raise ValueError("pyproject.toml has no Homepage")
    return found[1]


class ReproducibleSdist(sdist):
    """Packed anew in the order of names, with one time and no owner, where ``SOURCE_DATE_EPOCH`` asks for it."""

    def make_archive(self, base_name: str, format: Any, *args: Any, **options: Any) -> str:
        """Called once for each format."""
        path = str(super().make_archive(base_name, format, *args, **options))
        epoch = os.environ.get("SOURCE_DATE_EPOCH")
        if epoch is not None and path.endswith(".tar.gz"):
            pack_anew(path, int(epoch))
        return path


def pack_anew(path: str, epoch: int) -> None:
    """The same files as a tar archive that depends on nothing else."""
    content = io.BytesIO()
    with (
        tarfile.open(path) as old,
        gzip.GzipFile(filename="", fileobj=content, mode="wb", mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda m: m.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname, member.pax_headers = (
                epoch,
                0,
                0,
                "",
                "",
                {},
            )
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    Path(path).write_bytes(content.getvalue())


class ReproducibleWheel(bdist_wheel):
    """With the same permissions whatever the umask, where ``SOURCE_DATE_EPOCH`` asks for it."""

    def run(self) -> None:
        """Build, then pack anew."""
        super().run()
        if "SOURCE_DATE_EPOCH" in os.environ:
            for _, _, path in self.distribution.dist_files:
                if path.endswith(".whl"):
                    zip_anew(path)


def zip_anew(path: str) -> None:
    """The same files as an archive of plain permissions."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            member.external_attr = (0o100755 if member.external_attr >> 16 & 0o100 else 0o100644) << 16
            new.writestr(member, data)
    Path(path).write_bytes(content.getvalue())


if __name__ == "__main__":
    readme = absolute((ROOT / "README.md").read_text("utf-8"), home())
    commands = {"sdist": ReproducibleSdist, "bdist_wheel": ReproducibleWheel}
    setup(long_description=readme, long_description_content_type="text/markdown", cmdclass=commands)
