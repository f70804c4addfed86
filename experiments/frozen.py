"""The code that jobs run: a copy made when they are submitted, so that edits made meanwhile do not reach them.

A copy lies in a directory named after its commit, or after its content where there is no clean commit. It is made once.
FROZEN.json in it tells `experiments.rundir.provenance` what it is.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from experiments.rundir import FROZEN
from experiments.settings import UserError

PACKAGES = ("engram", "experiments")  # all that a job imports of the suite


@dataclass(frozen=True)
class FrozenCode:
    """A copy of the code."""

    path: Path
    commit: str
    """`unknown` outside a git checkout."""
    dirty: bool


def check_clean(root: Path, *, allow_dirty: bool) -> None:
    """Refuse code that no commit holds.

    Raises:
        UserError: a file of the packages differs from the commit, or is not in it.
    """
    changed = _git(root, "status", "--porcelain", "--", *PACKAGES)
    if changed and not allow_dirty:
        names = [line[3:] for line in changed.splitlines()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"the code differs from the last commit ({', '.join(names[:3])}{more}): commit, or launch with "
            "--allow-dirty, which is noted in every run"
        )


def freeze(root: Path, into: Path, *, allow_dirty: bool = False) -> FrozenCode:
    """Copy the packages as they are now, unless this very copy is there.

    Args:
        root: the directory that holds the packages, a git checkout or not.
        into: directory of copies, on a file system that all nodes share.
        allow_dirty: also copy what is in no commit.

    Raises:
        UserError: the code is dirty, and this is not allowed.
    """
    if (root / FROZEN).exists():  # launched from a copy
        return FrozenCode(root, **json.loads((root / FROZEN).read_text()))
    check_clean(root, allow_dirty=allow_dirty)
    commit = _git(root, "rev-parse", "HEAD") or "unknown"
    dirty = commit != "unknown" and bool(_git(root, "status", "--porcelain", "--", *PACKAGES))
    into.mkdir(parents=True, exist_ok=True)
    draft = into / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        if commit != "unknown" and not dirty:
            # From the commit itself: what somebody edits at this very moment stays out.
            archive = subprocess.run(
                ["git", "archive", "HEAD", "--", *PACKAGES], cwd=root, capture_output=True, check=True
            )
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(draft, filter="data")
            name = commit[:12]
        else:
            for file in _files(root, tracked=commit != "unknown"):
                (draft / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, draft / file)
            name = (f"{commit[:12]}-dirty-" if dirty else "files-") + _digest(draft)
        code = FrozenCode(into / name, commit, dirty)
        facts = {"commit": commit, "dirty": dirty}
        (draft / FROZEN).write_text(json.dumps(facts, indent=1) + "\n")
        if not code.path.exists():
            try:
                draft.rename(code.path)
            except OSError:
                if not code.path.exists():  # else another launch has just put the same there
                    raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return code


def _files(root: Path, *, tracked: bool) -> list[Path]:
    """Files of the packages: what git knows or would add, or everything but caches."""
    if tracked:
        listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
        return [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]
    found = [path.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*") if path.is_file()]
    return [path for path in found if "__pycache__" not in path.parts]


def _digest(folder: Path) -> str:
    """Ten hex digits of the names and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:10]


def _git(root: Path, *args: str) -> str:
    """Output of git; empty if this is no checkout or there is no git."""
    try:
        done = subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.rstrip("\n") if done.returncode == 0 else ""
