"""The published shape: archives that are the same byte for byte, and a README whose links lead somewhere elsewhere."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    if not (ROOT / "setup.py").exists():
        pytest.skip("not run from the repository")
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_readme_are_absolute_and_their_files_exist(script: Any) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    home = script.home()
    published = script.absolute(text, home)
    outside_code = "".join(re.split(r"(?ms)^```.*?^```$", published))
    targets = re.findall(r"\]\(([^()\s]+)\)", outside_code)
    assert len(targets) > 10
    for target in targets:
        assert re.match(r"https?://|#", target), target
        if target.startswith(home):
            kind, _, path = target.removeprefix(f"{home}/").partition("/main/")
            assert kind in ("blob", "raw") and (ROOT / path.partition("#")[0]).exists(), target
    pictures = re.findall(r"!\[[^\]]*\]\(([^()\s]+)\)", published)
    assert pictures and all("/raw/main/" in target for target in pictures)
    assert script.absolute(published, home) == published


def test_code_and_anchors_in_the_readme_stay(script: Any) -> None:
    text = (
        "[a](b.md) ![p](p.png) [c](#here) [d](https://x.org/y)\n```python\nx = f[1](y)\n```\n[two\nlines](e/f.md#g)\n"
    )
    found = script.absolute(text, "https://h.org/r")
    assert found == (
        "[a](https://h.org/r/blob/main/b.md) ![p](https://h.org/r/raw/main/p.png) [c](#here) [d](https://x.org/y)\n"
        "```python\nx = f[1](y)\n```\n[two\nlines](https://h.org/r/blob/main/e/f.md#g)\n"
    )


def archive(path: Path, folder: Path, order: int) -> bytes:
    with tarfile.open(path, "w:gz") as packed:
        for file in sorted(folder.iterdir())[::order]:
            packed.add(file, f"p-1/{file.name}")
    return path.read_bytes()


def test_an_archive_packed_anew_depends_on_its_files_alone(script: Any, tmp_path: Path) -> None:
    results = []
    for number, (order, when, mode) in enumerate([(1, 1e9, 0o644), (-1, 1.5e9, 0o664)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("b.py", "a.py"):
            (folder / name).write_text(name, encoding="utf-8")
            os.utime(folder / name, (when, when))
            (folder / name).chmod(mode)
        path = tmp_path / f"{number}.tar.gz"
        before = archive(path, folder, order)
        time.sleep(0.01)
        script.pack_anew(str(path), 1_700_000_000)
        results.append((before, path.read_bytes()))
    assert results[0][0] != results[1][0] and results[0][1] == results[1][1]
    with tarfile.open(fileobj=io.BytesIO(results[0][1])) as packed:
        assert [m.name for m in packed.getmembers()] == ["p-1/a.py", "p-1/b.py"]
        assert {m.mtime for m in packed.getmembers()} == {1_700_000_000}
        member = packed.extractfile("p-1/a.py")
        assert member is not None and member.read() == b"a.py"


def test_a_wheel_zipped_anew_has_plain_permissions(script: Any, tmp_path: Path) -> None:
    import zipfile

    results = []
    for mode in (0o100644, 0o100664):
        path = tmp_path / f"{mode}.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for name, bits in (("a.py", mode), ("run.sh", mode | 0o111)):
                entry = zipfile.ZipInfo(name, (2023, 11, 14, 22, 13, 20))
                entry.external_attr = bits << 16
                wheel.writestr(entry, name)
        script.zip_anew(str(path))
        results.append(path.read_bytes())
    assert results[0] == results[1]
    with zipfile.ZipFile(path) as wheel:
        assert [m.external_attr >> 16 for m in wheel.infolist()] == [0o100644, 0o100755]
        assert wheel.read("a.py") == b"a.py"


def test_the_version_and_entry_points_are_declared() -> None:
    import sys

    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    about = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(about["dynamic"]) == {"version", "readme"} and "readme" not in about
    for entry in [*about["scripts"].values(), *about["entry-points"]["inspect_ai"].values()]:
        module = entry.partition(":")[0]
        assert importlib.util.find_spec(module) is not None, entry


def test_every_release_keeps_its_documentation() -> None:
    """The site has a menu of versions, and a tag adds one."""
    workflow = ROOT / ".github" / "workflows" / "docs.yml"
    if not workflow.exists():
        pytest.skip("not run from the repository")
    assert "provider: mike" in (ROOT / "mkdocs.yml").read_text("utf-8")
    assert 'tags: ["v*"]' in workflow.read_text("utf-8") and "mike deploy" in workflow.read_text("utf-8")
    assert '"mike>=' in (ROOT / "pyproject.toml").read_text("utf-8")
