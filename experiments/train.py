"""The only training loop: every arm of every study goes through it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from experiments.final import write_final
from experiments.parallel import Team
from experiments.rundir import RunDir, provenance
from experiments.runlogs import open_logs
from experiments.settings import SCHEMA, Runtime, UserError
from experiments.shards import Shards
from experiments.trainer import Trainer

Outcome = Literal["final", "diverged", "interrupted"]

DIVERGED_FACTOR = 3.0  # a loss this many times ln(V), that of a uniform guess, does not come back


def train(
    run_dir: RunDir, shards: Shards, runtime: Runtime, stop_asked: Callable[[], bool], team: Team | None = None
) -> Outcome:
    """Train a run to its end, from wherever it stands. The caller, or the team's first process, holds the run's lock.

    Args:
        run_dir: directory with a config.yaml.
        shards: the tokens the spec names.
        runtime: device, threads and the like, which change the order of sums.
        stop_asked: polled after each step; True saves a checkpoint and returns "interrupted".
        team: the processes that call this together; None is this one alone.

    Raises:
        UserError: shards, tokenizer or checkpoint do not fit the spec, or the spec is of another schema.
        OSError: a file could not be written; earlier files are whole.
    """
    team = team or Team(runtime)
    if (final := team.share(run_dir.final())) is not None:
        return "diverged" if final["status"] == "diverged" else "final"
    run = run_dir.load()
    if run.spec.schema != SCHEMA:
        raise UserError(
            f"{run_dir.path} was planned under schema {run.spec.schema}, and this code trains under {SCHEMA}, with "
            "other results: launch its suite again, which makes a run of its own"
        )
    train, steps = run.spec.train, run.spec.train.steps
    if team.is_first:
        run_dir.note_attempt("start", **provenance(), threads=runtime.threads, processes=team.size)
    trainer = Trainer(run.spec, shards, runtime, team)
    checkpoint, metrics_path = run_dir.path / "checkpoint", run_dir.path / "metrics.jsonl"
    how = "resumes at" if trainer.resume(checkpoint) else "starts at"
    if team.is_first:
        among = f" and {team.size - 1} more" if team.size > 1 else ""
        print(f"{run.spec.run_id}: {how} step {trainer.step} of {steps} on {trainer.device}{among}", flush=True)

    last_saved = time.monotonic()
    with open_logs(run_dir.path, trainer.metrics_bytes, trainer.step, writes=team.is_first) as (metrics, timing):
        while trainer.step < steps:
            line, valid = trainer.train_step(), None
            if trainer.step == steps or (train.eval_every and trainer.step % train.eval_every == 0):
                valid = trainer.valid_step()
            timing.note(trainer.step, train.batch_tokens)
            if _diverged(line, valid, run.spec.model.vocab_size):
                if team.is_first:
                    print(f"diverged at step {trainer.step}: {line}, {valid}")
                    write_final(run, run_dir, trainer, "diverged", line, None)
                return "diverged"
            trainer.metrics_bytes += metrics.write(line) + (metrics.write(valid) if valid else 0)
            due = trainer.step == steps or time.monotonic() - last_saved >= runtime.checkpoint_every_s
            stopping, saving = team.any(stop_asked() and trainer.step < steps, due)
            if stopping or saving:
                metrics.sync()
                trainer.save(checkpoint)
                last_saved = time.monotonic()
            if stopping:
                if team.is_first:
                    run_dir.note_attempt("interrupted", step=trainer.step)
                return "interrupted"
    if team.is_first:
        # Read back, since a kill may have come between the last checkpoint and here.
        line, valid = _last_two(metrics_path)
        write_final(run, run_dir, trainer, "final", line, valid)
    return "final"


def _diverged(line: dict[str, Any], valid: dict[str, Any] | None, vocab_size: int) -> bool:
    losses = [line["loss"], *([valid["loss"]] if valid else [])]
    finite = all(map(math.isfinite, [*losses, line["grad_norm"]]))
    return not finite or max(losses) > DIVERGED_FACTOR * math.log(vocab_size)


def _last_two(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last training and the last validation line."""
    train, valid = (json.loads(text) for text in path.read_text().splitlines()[-2:])
    return train, valid
