"""If these fail, two launches may submit one run, or jobs rely on locks that hold on one machine only."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments import filelock
from experiments.filelock import check_locks, launch_lock, mount_options
from experiments.settings import UserError


def test_locks_work_where_tests_run(tmp_path: Path) -> None:
    check_locks(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("other", "said"),
    [("pass", "could be locked again, so two jobs might train one run"), ("raise OSError('no')", "no")],
)
def test_a_place_where_locks_do_not_exclude_is_refused(
    other: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filelock, "_TRY", other)  # what the child does instead of being turned away
    with pytest.raises(UserError, match=f"{said}.*runtime.runs_dir=DIR"):
        check_locks(tmp_path)


def test_a_mount_that_keeps_locks_on_one_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filelock, "mount_options", lambda *_: ["rw", "localflock"])
    with pytest.raises(UserError, match="mounted with localflock, locks hold on one machine only"):
        check_locks(tmp_path)


def test_mount_options_are_those_of_the_innermost_mount(tmp_path: Path) -> None:
    table = tmp_path / "mounts"
    table.write_text(f"root / ext4 rw 0 0\nfs {tmp_path} lustre rw,localflock 0 0\nfs /elsewhere nfs nolock 0 0\n")
    assert mount_options(tmp_path / "runs", table) == ["rw", "localflock"]
    assert mount_options(Path("/usr"), table) == ["rw"]
    assert mount_options(tmp_path, tmp_path / "absent") == []


def test_a_second_launch_waits_for_the_first_and_knows_who_it_is(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match=rf"process {os.getpid()} of .* has been submitting")
    with launch_lock(tmp_path), refused, launch_lock(tmp_path, patience_s=0.2):
        pass
    with launch_lock(tmp_path, patience_s=0):
        pass
