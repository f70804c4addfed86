"""A finished run, taken up again to be looked at: model, tokenizer, result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.hashing import compress_vocabulary
from engram.transformer import Transformer
from experiments.checkpoint import check_hash, load_weights
from experiments.rundir import RunDir
from experiments.settings import Run, UserError
from experiments.shards import Shards


@dataclass(frozen=True)
class Finished:
    """What is known of a run that ended well."""

    run: Run
    run_dir: RunDir
    final: dict[str, Any]
    shards: Shards
    """What it was trained and validated on; holds its tokenizer."""
    load_model: Callable[[], Transformer]
    """Read the weights: in evaluation mode, on the CPU."""


def open_finished(path: Path, data_dir: Path) -> Finished:
    """Open a run's directory.

    Args:
        path: its directory.
        data_dir: where its shards lie.

    Raises:
        UserError: no run there, or one that has not finished or has diverged, or its shards are gone.
    """
    run_dir = RunDir(path)
    run, final = run_dir.load(), run_dir.final()
    if final is None or final["status"] != "final":
        state = run_dir.state()
        remedy = "its weights say nothing" if state == "diverged" else "launch its suite first"
        raise UserError(f"run {run.spec.run_id} is {state}: {remedy}")
    shards = find_shards(data_dir, run.spec.data)
    return Finished(run, run_dir, final, shards, lambda: _load_model(run, run_dir, shards))


def find_shards(data_dir: Path, data: str) -> Shards:
    """The shards of that hash.

    Raises:
        UserError: none there have it.
    """
    for manifest in sorted(data_dir.glob("*/manifest.json")):
        try:
            shards = Shards(manifest.parent)
        except UserError:  # damaged ones of another study are no matter here
            continue
        if shards.hash == data:
            return shards
    raise UserError(
        f"no shards {data[:12]} in {data_dir}: build them again with `python -m experiments data` and the run's "
        "budget, or name their place with runtime.data_dir=PATH"
    )


def _load_model(run: Run, run_dir: RunDir, shards: Shards) -> Transformer:
    """Raises UserError for weights that are gone, damaged, of another run or hashed otherwise."""
    config, folder = run.spec.model, run_dir.path / "checkpoint"
    model = Transformer(config, compress_vocabulary(shards.tokenizer, config.vocab_size) if config.memory else None)
    facts = load_weights(folder, model)
    if facts["run_id"] != run.spec.run_id or facts["step"] != run.spec.train.steps:
        raise UserError(f"{folder} holds step {facts['step']} of run {facts['run_id']}, not the end of this one")
    check_hash(folder, facts, model)
    return model.eval()
