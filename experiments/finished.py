"""A finished run, taken up again to be looked at: model, tokenizer, result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engram.hashing import compress_vocabulary
from engram.stored_tables import store_tables
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

    def load_model(self, *, tables_stay: bool = False) -> Transformer:
        """Read the weights: in evaluation mode, on the CPU.

        Args:
            tables_stay: keep n-gram tables in host memory, in the precision that they were trained in, wherever the
                model is moved; it then brings the rows that it reads.

        Raises:
            UserError: the weights are gone, damaged, of another run, or hashed otherwise.
        """
        spec, folder = self.run.spec, self.run_dir.path / "checkpoint"
        config, compressed_V = spec.model, None
        if config.memory:
            compressed_V = compress_vocabulary(self.shards.tokenizer, config.vocab_size)
        model = Transformer(config, compressed_V)
        if tables_stay:
            dtype = torch.bfloat16 if spec.train.optim.table_dtype == "bf16" else torch.float32
            store_tables(model, torch.device("cpu"), dtype)
        facts = load_weights(folder, model)
        if facts["run_id"] != spec.run_id or facts["step"] != spec.train.steps:
            raise UserError(f"{folder} holds step {facts['step']} of run {facts['run_id']}, not the end of this one")
        check_hash(folder, facts, model)
        return model.eval()


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
    return Finished(run, run_dir, final, find_shards(data_dir, run.spec.data))


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
