"""If these fail, a job runs other code than it was submitted with, or claims a commit that it does not run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.frozen import freeze
from experiments.settings import UserError

ROOT = Path(__file__).parent.parent


def git(root: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, *args], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A small suite that is no checkout."""
    root = tmp_path / "suite"
    for name in ("engram/a.py", "experiments/b.py", "experiments/configs/c.yaml", "notes/d.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{name} as committed")
    (root / ".gitignore").write_text("*.tmp\n")
    return root


@pytest.fixture
def checkout(files: Path) -> Path:
    git(files, "init", "-q")
    git(files, "add", ".")
    git(files, "commit", "-qm", "first")
    return files


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_clean_checkout_is_copied_from_its_commit_once(checkout: Path, tmp_path: Path) -> None:
    (checkout / "notes/d.txt").write_text("no job reads this")
    code = freeze(checkout, tmp_path / "code")
    head = git(checkout, "rev-parse", "HEAD")
    assert (code.path, code.commit, code.dirty) == (tmp_path / "code" / head[:12], head, False)
    assert names(code.path) == ["FROZEN.json", "engram/a.py", "experiments/b.py", "experiments/configs/c.yaml"]
    assert json.loads((code.path / "FROZEN.json").read_text()) == {"commit": head, "dirty": False}
    made = (code.path / "engram/a.py").stat().st_mtime_ns
    assert freeze(checkout, tmp_path / "code") == code
    assert (code.path / "engram/a.py").stat().st_mtime_ns == made
    assert [path.name for path in (tmp_path / "code").iterdir()] == [head[:12]], "a draft was left behind"


@pytest.mark.parametrize("change", ["edited", "new", "deleted"])
def test_code_that_no_commit_holds_is_refused_by_name(change: str, checkout: Path, tmp_path: Path) -> None:
    path = checkout / ("engram/new.py" if change == "new" else "engram/a.py")
    if change == "deleted":
        path.unlink()
    else:
        path.write_text("changed")
    with pytest.raises(UserError, match=rf"differs from the last commit \(engram/{path.name}\).*--allow-dirty"):
        freeze(checkout, tmp_path / "code")
    assert not (tmp_path / "code").exists()


def test_dirty_code_is_copied_as_it_is_and_told_apart(checkout: Path, tmp_path: Path) -> None:
    (checkout / "engram/a.py").write_text("changed")
    (checkout / "engram/new.py").write_text("new")
    (checkout / "engram/scratch.tmp").write_text("ignored")
    (checkout / "experiments/b.py").unlink()
    one = freeze(checkout, tmp_path / "code", allow_dirty=True)
    assert one.dirty
    assert one.path.name.startswith(f"{git(checkout, 'rev-parse', 'HEAD')[:12]}-dirty-")
    assert names(one.path) == ["FROZEN.json", "engram/a.py", "engram/new.py", "experiments/configs/c.yaml"]
    (checkout / "engram/a.py").write_text("changed again")
    other = freeze(checkout, tmp_path / "code", allow_dirty=True)
    assert other.path != one.path
    assert (one.path / "engram/a.py").read_text() == "changed", "a copy changed with the checkout"


def test_a_suite_that_is_no_checkout_is_copied_without_caches(files: Path, tmp_path: Path) -> None:
    (files / "engram/__pycache__").mkdir()
    (files / "engram/__pycache__/a.pyc").write_text("cache")
    code = freeze(files, tmp_path / "code")
    assert (code.commit, code.dirty) == ("unknown", False)
    assert code.path.name.startswith("files-")
    assert names(code.path) == ["FROZEN.json", "engram/a.py", "experiments/b.py", "experiments/configs/c.yaml"]


def test_a_launch_from_a_copy_uses_that_copy(checkout: Path, tmp_path: Path) -> None:
    code = freeze(checkout, tmp_path / "code")
    assert freeze(code.path, tmp_path / "code") == code


def test_a_run_of_a_copy_inside_a_checkout_notes_the_commit_of_the_copy(tmp_path: Path) -> None:
    """Git itself would answer for the checkout around it."""
    outer = tmp_path / "outer"
    outer.mkdir()
    git(outer, "init", "-q")
    git(outer, "commit", "-qm", "another", "--allow-empty")
    copy = outer / "results/code/abc"
    for package in ("engram", "experiments"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "FROZEN.json").write_text('{"commit": "abc", "dirty": true}')
    program = "from experiments.rundir import provenance; p = provenance(); print(p['commit'], p['dirty'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["abc", "True"]
