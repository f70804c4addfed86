"""One training state on disk, replaced atomically: a kill at any moment leaves the old one or the new one, whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from experiments.settings import UserError


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside, flush to disk, rename.

    Raises:
        OSError: the disk is full or not writable; the former checkpoint is untouched.
    """
    draft = path.with_suffix(".part")
    try:
        with open(draft, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        draft.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {error}; free space and launch again") from error


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Read what `save_checkpoint` wrote; None if there is nothing.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): delete it to train this run from its start"
        ) from error
    return dict(state)
