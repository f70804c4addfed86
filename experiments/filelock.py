"""Locks that keep two launches apart, and the proof that locks work where the runs lie.

That no run is trained twice rests on flock, which some network file systems ignore, refuse, or keep to one machine:
Lustre without `-o flock` or with `localflock`, NFS with `nolock` or `local_lock`.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.settings import UserError

ONLY_HERE = ("localflock", "nolock", "local_lock=flock", "local_lock=all")  # mount options

_TRY = """
import fcntl, sys
with open(sys.argv[1], "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(7)
"""
_REFUSED = 7


def check_locks(folder: Path) -> None:
    """Prove that a lock held here turns another process away.

    Raises:
        UserError: it does not, or holds on this machine only.
    """
    remedy = "choose another file system with runtime.runs_dir=DIR, or ask its administrators for flock"
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-check-") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder}: files cannot be locked here ({error.strerror}): {remedy}") from error
        other = subprocess.run([sys.executable, "-c", _TRY, file.name], capture_output=True, text=True, check=False)
    if other.returncode == 0:
        raise UserError(f"{folder}: a locked file could be locked again, so two jobs might train one run: {remedy}")
    if other.returncode != _REFUSED:
        said = other.stderr.strip().splitlines()[-1:]
        raise UserError(f"{folder}: the check of locks failed ({''.join(said)}): {remedy}")
    options = mount_options(folder, Path("/proc/mounts"))
    if found := [option for option in ONLY_HERE if option in options]:
        raise UserError(f"{folder}: mounted with {found[0]}, locks hold on one machine only: {remedy}")


def mount_options(folder: Path, table: Path) -> list[str]:
    """Options of the file system that a folder lies on; none where the system does not tell."""
    if not table.exists():
        return []
    folder, best, options = folder.resolve(), Path(), [""]
    for line in table.read_text(errors="replace").splitlines():
        fields = line.split()
        point = Path(fields[1].replace("\\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, options = point, fields[3].split(",")
    return options


@contextmanager
def launch_lock(runs_dir: Path, patience_s: float = 300.0) -> Iterator[None]:
    """Keep other launches away from deciding what to submit.

    Raises:
        UserError: another one has held it all the time.
    """
    give_up = time.monotonic() + patience_s
    with open(runs_dir / "SUBMIT.lock", "a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    lock.seek(0)
                    holder = lock.read().strip() or "another launch"
                    raise UserError(f"{holder} has been submitting to {runs_dir} for {patience_s:.0f} s") from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} of {os.uname().nodename}")
        lock.flush()
        yield
