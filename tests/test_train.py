"""If these fail, a killed run does not go on where it was, equal seeds give unequal losses, or a run that broke says so
by a traceback. Models are tiny, but text, shards, optimisers and files are real."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_engram, tiny_tables
from tiny_study import STEPS, VOCAB, build_shards, study_run

from engram.config import EngramConfig, OptimConfig, OverEncodingConfig
from engram.muon import Muon
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime, UserError
from experiments.shards import Shards
from experiments.train import train
from experiments.trainer import Trainer

ROOT = Path(__file__).parent.parent
EVERY_STEP = Runtime(device="cpu", checkpoint_every_s=0.0)

RANDOM = tiny_engram(tables=tiny_tables(lookup="random"))
AT_INPUT = OverEncodingConfig(tables=tiny_tables(n_slots=((31, 37, 41, 43),)))
ARMS: dict[str, dict[str, Any]] = {
    "engram": {},
    "streams": {"model": {"n_streams": 2}},
    "no-fusion": {"model": {"n_streams": 2, "engram": tiny_engram(one_stream=True)}},
    "random-ids": {"model": {"engram": RANDOM}},
    "over-encoding": {"model": {"engram": None, "over_encoding": AT_INPUT}},
    "pure-moe": {"model": {"engram": None}},
    "dense": {"model": {"engram": None, "moe": None, "n_dense_layers": 3}},
    "rowwise-adamw-wsd": {"optim": OptimConfig(lr=5e-3, tables="rowwise", matrices="adamw", schedule="wsd")},
    "dense-tables-cosine-bf16": {
        "optim": OptimConfig(lr=5e-3, tables="dense", schedule="cosine"),
        "precision": "bf16",
        "eval_every": 5,
    },
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(tmp_path_factory.mktemp("study"))


def never() -> bool:
    return False


def train_whole(run: Run, shards: Shards, folder: Path, runtime: Runtime = EVERY_STEP) -> RunDir:
    run_dir = RunDir.create(folder, run)
    with run_dir.owned():
        assert train(run_dir, shards, runtime, never) == "final"
    return run_dir


def metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir.path / "metrics.jsonl").read_text().splitlines()]


def result(run_dir: RunDir) -> dict[str, Any]:
    final = run_dir.final()
    assert final is not None
    return dict(final["result"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_stopped_after_every_few_steps_equals_one_that_was_not(arm: str, shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards, **ARMS[arm])
    whole = train_whole(run, shards, tmp_path / "whole")
    parts = RunDir.create(tmp_path / "parts", run)
    outcomes = []
    for _ in range(STEPS):
        polls = iter([False, False, True])
        with parts.owned():
            outcomes.append(train(parts, shards, EVERY_STEP, lambda polls=polls: next(polls)))  # type: ignore[misc]
        if outcomes[-1] == "final":
            break
    assert outcomes == ["interrupted"] * 3 + ["final"]
    assert (parts.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    assert result(parts) == result(whole)
    assert parts.final()["cost"]["attempts"] == 4  # type: ignore[index]


def test_training_learns_and_its_first_loss_is_that_of_a_uniform_guess(shards: Shards, tmp_path: Path) -> None:
    losses = [line["loss"] for line in metrics(train_whole(study_run(shards), shards, tmp_path)) if "lr" in line]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(VOCAB)).item(), abs=0.1)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("arm", ["engram", "random-ids"])
def test_equal_seeds_give_bitwise_equal_metrics_and_unequal_seeds_do_not(
    arm: str, shards: Shards, tmp_path: Path
) -> None:
    one = train_whole(study_run(shards, **ARMS[arm]), shards, tmp_path / "one")
    two = train_whole(study_run(shards, **ARMS[arm]), shards, tmp_path / "two")
    other = train_whole(study_run(shards, seed=1, **ARMS[arm]), shards, tmp_path / "one")
    assert (one.path / "metrics.jsonl").read_bytes() == (two.path / "metrics.jsonl").read_bytes()
    assert result(one)["valid_loss"] != result(other)["valid_loss"]


@pytest.mark.parametrize("arm", ["engram", "random-ids"])
def test_micro_batches_change_only_rounding(arm: str, shards: Shards) -> None:
    """Sums in another order: 2e-6 nats over three steps; then 1e-3, once a token at a tie has chosen another expert.

    Three sequences a micro-batch leave a smaller last one. Loads must add up as well: else balancing would differ.
    """
    spec = study_run(shards, **ARMS[arm]).spec
    whole, *parts = (Trainer(spec, shards, replace(EVERY_STEP, micro_batch_tokens=n)) for n in (0, 64, 192))
    for step in range(STEPS):
        loss = whole.train_step()["loss"]
        for part in parts:
            assert part.train_step()["loss"] == pytest.approx(loss, abs=2e-6 if step < 3 else 1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_muon_iterates_in_the_precision_of_the_run(precision: str, dtype: torch.dtype, shards: Shards) -> None:
    trainer = Trainer(study_run(shards, precision=precision).spec, shards, EVERY_STEP)
    assert [o.dtype for o in trainer.optimizers.optimizers if isinstance(o, Muon)] == [dtype]


def test_runs_of_one_seed_see_the_same_data_and_start_from_the_same_shared_weights(shards: Shards) -> None:
    ours = Trainer(study_run(shards).spec, shards, EVERY_STEP)
    fewer = replace(ours.spec.model.moe, n_routed_experts=4)  # type: ignore[type-var]
    theirs = Trainer(study_run(shards, model={"engram": None, "moe": fewer}).spec, shards, EVERY_STEP)
    assert (ours.order.batch(3, 4) == theirs.order.batch(3, 4)).all()
    mine, other = dict(ours.model.named_parameters()), dict(theirs.model.named_parameters())
    assert torch.equal(mine["embed_VD"], other["embed_VD"])
    stack = "blocks.1.ffn.experts.w_gate_EFD"
    assert torch.equal(mine[stack][:4], other[stack])


# Real processes, killed for real.


def worker(run_dir: RunDir, shards: Shards, *settings: str, **popen: Any) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "experiments", "run", str(run_dir.path), "--shards", str(shards.path)]
    argv += ["device=cpu", "checkpoint_every_s=0", *settings]
    with open(run_dir.path / "train.log", "ab") as log:
        return subprocess.Popen(
            argv, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, **popen
        )


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.002)


def test_a_run_killed_at_random_moments_equals_one_that_was_not(shards: Shards, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"kill moments from seed {seed}")
    rng = random.Random(seed)
    run = study_run(shards, tokens=50 * 256, eval_every=7)
    whole = train_whole(run, shards, tmp_path / "whole")
    killed = RunDir.create(tmp_path / "killed", run)
    path = killed.path / "metrics.jsonl"
    for target in (1, 15, 30):
        process = worker(killed, shards)
        wait_for(lambda: process.poll() is not None or (path.exists() and path.read_bytes().count(b"\n") >= target))  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before the kill: make the run longer"
        assert killed.state() == "interrupted"
    assert worker(killed, shards).wait() == 0
    assert path.read_bytes() == (whole.path / "metrics.jsonl").read_bytes()
    assert result(killed) == result(whole)
    assert killed.attempts() == 4
    assert len(list((killed.path / "checkpoint").iterdir())) == 1


def test_sigterm_saves_and_the_next_worker_goes_on(shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards, tokens=400 * 256)
    run_dir = RunDir.create(tmp_path, run)
    process = worker(run_dir, shards, "checkpoint_every_s=1000")
    wait_for(lambda: (run_dir.path / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 3
    last = metrics(run_dir)[-1]["step"]
    trainer = Trainer(run.spec, shards, EVERY_STEP)
    assert trainer.resume(run_dir.path / "checkpoint")
    assert trainer.step == last
    assert run_dir.state() == "interrupted"


def test_a_second_worker_leaves_a_run_to_the_first(shards: Shards, tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, study_run(shards))
    with run_dir.owned():
        assert worker(run_dir, shards).wait() == 0
    assert run_dir.state() == "planned", "the second worker wrote something"


def test_a_full_disk_ends_the_run_with_one_line_and_leaves_the_last_checkpoint(shards: Shards, tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk: every write beyond it fails the same way, with an OSError."""
    run = study_run(shards)
    run_dir = RunDir.create(tmp_path, run)
    Trainer(run.spec, shards, EVERY_STEP).save(run_dir.path / "checkpoint")
    before = contents(run_dir.path / "checkpoint")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert worker(run_dir, shards, preexec_fn=limit).wait() == 1
    assert contents(run_dir.path / "checkpoint") == before
    assert run_dir.state() == "failed"
    said = (run_dir.path / "train.log").read_text().splitlines()[-1]
    assert said.startswith("error: could not write")
    assert "free space" in said


# Runs that must not go on, and say why.


def test_a_diverging_run_ends_with_a_recorded_status(shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards, optim=OptimConfig(lr=1e5, grad_clip=0.0, matrices="adamw"))
    run_dir = RunDir.create(tmp_path, run)
    process = worker(run_dir, shards)
    assert process.wait() == 0
    assert run_dir.state() == "diverged"
    final = run_dir.final()
    assert final is not None
    assert 0 < final["result"]["steps"] <= STEPS
    assert final["result"]["valid_loss"] is None
    assert "Traceback" not in (run_dir.path / "train.log").read_text()
    with run_dir.owned():
        assert train(run_dir, shards, EVERY_STEP, never) == "diverged", "a diverged run is not tried again"


def test_a_run_whose_last_update_breaks_it_has_diverged(shards: Shards, tmp_path: Path) -> None:
    """Only its validation can tell: the loss of the last step is that of the weights before it."""
    run = study_run(shards, tokens=256, optim=OptimConfig(lr=1e30, matrices="adamw", warmup_frac=0.0))
    run_dir = RunDir.create(tmp_path, run)
    with run_dir.owned():
        assert train(run_dir, shards, EVERY_STEP, never) == "diverged"
    assert result(run_dir)["steps"] == 1
    assert result(run_dir)["valid_loss"] is None


def test_metrics_that_were_lost_are_not_filled_up(shards: Shards, tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, study_run(shards))
    polls = iter([False, True])
    with run_dir.owned():
        assert train(run_dir, shards, EVERY_STEP, lambda: next(polls)) == "interrupted"
        (run_dir.path / "metrics.jsonl").unlink()
        with pytest.raises(UserError, match=r"metrics.jsonl has 0 bytes, but the checkpoint counts \d+"):
            train(run_dir, shards, EVERY_STEP, never)


def test_a_checkpoint_hashed_otherwise_is_refused_and_both_are_named(shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards)
    trainer = Trainer(run.spec, shards, EVERY_STEP)
    trainer.save(tmp_path / "checkpoint")
    spec = trainer.model.hash_spec
    assert spec is not None
    assert trainer.model.hasher is not None
    trainer.model.hasher.spec = replace(spec, pad_id=spec.pad_id + 1)
    with pytest.raises(UserError, match=rf"another pad_id: stored {spec.pad_id}, now {spec.pad_id + 1}"):
        trainer.resume(tmp_path / "checkpoint")


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
@pytest.mark.parametrize("how", ["cut", "lost"])
def test_a_damaged_checkpoint_is_refused_by_name(file: str, how: str, shards: Shards, tmp_path: Path) -> None:
    trainer = Trainer(study_run(shards).spec, shards, EVERY_STEP)
    trainer.train_step()
    trainer.save(tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "step-0000000001" / file
    if how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"step-0000000001 is damaged .*: delete it to train this run from its start"):
        trainer.resume(tmp_path / "checkpoint")


def test_another_runs_checkpoint_is_refused(shards: Shards, tmp_path: Path) -> None:
    Trainer(study_run(shards, seed=1).spec, shards, EVERY_STEP).save(tmp_path / "checkpoint")
    with pytest.raises(UserError, match="belongs to run"):
        Trainer(study_run(shards).spec, shards, EVERY_STEP).resume(tmp_path / "checkpoint")


def test_a_run_of_another_schema_is_not_trained(shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards)
    old = replace(run, spec=replace(run.spec, schema=run.spec.schema - 1))
    run_dir = RunDir.create(tmp_path, old)
    with pytest.raises(
        UserError, match=r"planned under schema 1, and this code trains under 2.*launch its suite again"
    ):
        train(run_dir, shards, EVERY_STEP, lambda: False)
    assert not (run_dir.path / "attempts.jsonl").exists()


def test_shards_of_other_data_are_refused(shards: Shards) -> None:
    run = study_run(shards)
    with pytest.raises(UserError, match="was planned for shards 0000"):
        Trainer(replace(run.spec, data="0" * 64), shards, EVERY_STEP)


def test_a_tiny_model_overfits_one_batch(shards: Shards) -> None:
    """Memory, experts and streams together: 120 steps on one batch take the loss from ln V below 0.1 nats."""
    model = {"n_streams": 2, "engram": EngramConfig(layer_ids=(0, 2), tables=tiny_tables())}
    spec = study_run(shards, model=model, tokens=120 * 256, optim=OptimConfig(lr=1e-2, weight_decay=0.0)).spec
    trainer = Trainer(spec, shards, EVERY_STEP)
    batch = trainer.order.batch(0, 4)
    trainer.order.batch = lambda step, n: batch  # type: ignore[method-assign]
    losses = [trainer.train_step()["loss"] for _ in range(120)]
    assert losses[0] > 5
    assert losses[-1] < 0.1


def test_a_result_says_what_the_suites_vary(shards: Shards, tmp_path: Path) -> None:
    """The columns that analysis reads, and a replicate that has a name of its own and the same loss to the last bit."""
    optim = OptimConfig(lr=5e-3, table_lr_mult=2.5)
    run = study_run(shards, optim=optim, tokens=2 * 256)
    labels = replace(run.labels, suite="layers", variant="layer-1+3")
    again = replace(run.spec, replicate=1)
    first, second = (result(train_whole(Run(spec=spec, labels=labels), shards, tmp_path)) for spec in (run.spec, again))
    assert (first["suite"], first["variant"], first["engram_layers"]) == ("layers", "layer-1+3", "0 2")
    assert (first["lr"], first["table_lr_mult"]) == (5e-3, 2.5)
    assert first["P_tot_per_P_act"] == first["P_tot"] / first["P_act"]
    assert first["tokens_per_P_tot"] == 512 / first["P_tot"]
    assert (first["replicate"], second["replicate"]) == (None, 1)
    assert first["run_id"] != second["run_id"]
    assert first["valid_loss"] == second["valid_loss"]
