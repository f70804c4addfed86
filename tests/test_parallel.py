"""If these fail, a run's result depends on how many processes train it, a sharded table is read wrongly, or a
checkpoint written by some processes cannot be taken up by others. Real processes on gloo; the same code runs on NCCL.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from conftest import tiny_engram, tiny_tables
from tiny_study import STEPS, build_shards, study_run

from engram.config import OptimConfig
from engram.memory import NgramTables
from engram.sharding import ShardedTables, share_of_rows
from experiments.rundir import RunDir
from experiments.settings import Run
from experiments.shards import Shards

ROOT = Path(__file__).parent.parent
ARMS: dict[str, dict[str, Any]] = {
    "engram": {},
    "dense-tables-streams": {"model": {"n_streams": 2}, "optim": OptimConfig(lr=5e-3, tables="dense")},
    "rowwise-random-ids": {
        "model": {"engram": tiny_engram(tables=tiny_tables(lookup="random"))},
        "optim": OptimConfig(lr=5e-3, tables="rowwise", matrices="adamw"),
    },
    "pure-moe": {"model": {"engram": None}},
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(tmp_path_factory.mktemp("parallel"))


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """A test that fails half-way leaves no worker behind."""
    yield
    for process in STARTED:
        process.terminate()
        process.wait()
    STARTED.clear()


def start(run_dir: RunDir, shards: Shards, *settings: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "experiments", "run", str(run_dir.path), "--shards", str(shards.path), "device=cpu"]
    with open(run_dir.path / "train.log", "ab") as log:
        STARTED.append(
            subprocess.Popen(
                [*argv, *settings], cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        )
    return STARTED[-1]


def finish(run: Run, shards: Shards, folder: Path, *settings: str) -> RunDir:
    run_dir = RunDir.create(folder, run)
    code = start(run_dir, shards, *settings).wait()
    assert code == 0, (run_dir.path / "train.log").read_text()
    return run_dir


def metrics(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir.path / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.01)


def assert_same_curve(one: RunDir, other: RunDir) -> None:
    """Sums in another order: 2e-6 nats over three steps; then 1e-3, once a token at a tie has chosen another expert.

    The same for validation, and for gradient norms relative to their size.
    """
    for a, b in zip(metrics(one), metrics(other), strict=True):
        early = a["step"] <= 3
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-6 if early else 1e-3)
        if "grad_norm" in a:
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5 if early else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_two_processes_give_the_curve_of_one(arm: str, shards: Shards, tmp_path: Path) -> None:
    """With two micro-batches a process, so that accumulation is exchanged once, and a last validation batch of one."""
    run = study_run(shards, eval_every=3, eval_tokens=64 * 7, **ARMS[arm])
    alone = finish(run, shards, tmp_path / "alone")
    for layout in ("ddp", "fsdp"):
        pair = finish(run, shards, tmp_path / layout, "processes=2", f"parallel={layout}", "micro_batch_tokens=64")
        assert_same_curve(alone, pair)
        assert pair.attempts() == 1, "only the first process takes notes"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_four_processes_give_the_curve_of_one(layout: str, shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards, eval_every=3)
    alone = finish(run, shards, tmp_path / "alone")
    assert_same_curve(alone, finish(run, shards, tmp_path / "four", "processes=4", f"parallel={layout}"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [("4", "2"), ("2", "1"), ("1", "2")], ids=lambda c: "-to-".join(c))
@pytest.mark.parametrize("layouts", [("ddp", "ddp"), ("fsdp", "fsdp"), ("ddp", "fsdp")], ids="-".join)
def test_a_checkpoint_is_taken_up_by_another_number_of_processes(
    layouts: tuple[str, str], changes: tuple[str, str], shards: Shards, tmp_path: Path
) -> None:
    run = study_run(shards, model={"n_streams": 2}, tokens=3 * STEPS * 256)
    alone = finish(run, shards, tmp_path / "alone")
    run_dir = RunDir.create(tmp_path / "moved", run)
    first = start(run_dir, shards, f"processes={changes[0]}", f"parallel={layouts[0]}")
    wait_for(lambda: (run_dir.path / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 3, (run_dir.path / "train.log").read_text()
    assert run_dir.state() == "interrupted"
    assert start(run_dir, shards, f"processes={changes[1]}", f"parallel={layouts[1]}").wait() == 0
    assert_same_curve(alone, run_dir)
    assert (
        f"resumes at step {json.loads((run_dir.path / 'attempts.jsonl').read_text().splitlines()[1])['step']}"
        in (run_dir.path / "train.log").read_text()
    )


@pytest.mark.slow
def test_torchrun_starts_the_same_processes(shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards)
    ours = finish(run, shards, tmp_path / "ours", "processes=2")
    theirs = RunDir.create(tmp_path / "theirs", run)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "experiments",
    ]
    argv = [*torchrun, "run", str(theirs.path), "--shards", str(shards.path), "device=cpu"]
    subprocess.run(argv, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    assert (theirs.path / "metrics.jsonl").read_bytes() == (ours.path / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["2", "4"])  # two alone cannot tell whether the order of sums comes back
def test_processes_that_are_stopped_go_on_bit_for_bit(processes: str, shards: Shards, tmp_path: Path) -> None:
    run = study_run(shards, tokens=3 * STEPS * 256)
    whole = finish(run, shards, tmp_path / "whole", f"processes={processes}")
    parts = RunDir.create(tmp_path / "parts", run)
    first = start(parts, shards, f"processes={processes}")
    wait_for(lambda: (parts.path / "metrics.jsonl").exists() and len(metrics(parts)) >= 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 3
    assert start(parts, shards, f"processes={processes}").wait() == 0
    assert (parts.path / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()


def test_a_process_that_dies_ends_the_run_and_is_named(shards: Shards, tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, study_run(shards, tokens=4000 * 256))
    worker = start(run_dir, shards, "processes=2")
    wait_for(lambda: (run_dir.path / "metrics.jsonl").exists() and len(metrics(run_dir)) >= 2)
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    assert worker.wait() == 128 + signal.SIGKILL
    assert not run_dir.is_locked(), "a process goes on"
    assert run_dir.state() == "failed"
    last = json.loads((run_dir.path / "attempts.jsonl").read_text().splitlines()[-1])
    assert last["error"] == "process 1 of 2 was killed by signal 9 (Killed)"


def test_a_batch_that_processes_cannot_share_is_refused(shards: Shards, tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path, study_run(shards))
    assert start(run_dir, shards, "processes=3").wait() == 2
    said = (run_dir.path / "train.log").read_text()
    assert "3 processes cannot share 4 sequences a step: take a divisor of 4" in said


# The sharded table itself, against the whole one.

N_ROWS, D_ROW = 23, 4


@pytest.mark.parametrize(("n_rows", "size"), [(23, 2), (23, 4), (3, 4), (8, 4), (1, 2)])
def test_every_row_has_one_owner_and_shares_are_torchs_chunks(n_rows: int, size: int) -> None:
    shares = [share_of_rows(n_rows, rank, size) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n_rows))
    chunks = [len(chunk) for chunk in torch.zeros(n_rows).chunk(size)]
    assert [len(share) for share in shares] == chunks + [0] * (size - len(chunks))


def _lookups(rank: int) -> torch.Tensor:
    """The last process asks for one row only, and nobody for some rows."""
    if rank == 2:
        return torch.full((1, 2, 3), 5)
    return torch.randint(0, N_ROWS - 2, (2, 5, 3), generator=torch.Generator().manual_seed(rank))


def _weights_of_loss(rank: int) -> torch.Tensor:
    return torch.randn(*_lookups(rank).shape[:2], 3 * D_ROW, generator=torch.Generator().manual_seed(100 + rank))


def _sharded_process(rank: int, size: int, port: int, sparse: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    tables = NgramTables(tiny_tables(d_mem=D_ROW * 4, n_slots=((5, 5, 6, 7),)), 0)
    tables.sparse_grad = sparse
    sharded = ShardedTables(tables, dist.group.WORLD)
    whole_SP = torch.randn(N_ROWS, D_ROW, generator=torch.Generator().manual_seed(7))
    own = share_of_rows(N_ROWS, rank, size)
    with torch.no_grad():
        sharded.table_SP.copy_(whole_SP[own.start : own.stop])
    out = sharded(_lookups(rank))
    (out * _weights_of_loss(rank)).sum().backward()
    grad = sharded.table_SP.grad
    assert grad is not None
    assert grad.is_sparse == sparse
    torch.save((out.detach(), grad.to_dense()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
def test_a_sharded_table_gives_the_rows_and_the_gradients_of_the_whole(sparse: bool, tmp_path: Path) -> None:
    size, port = 3, 29_000 + os.getpid() % 1000
    mp.start_processes(
        _sharded_process, args=(size, port, sparse, str(tmp_path)), nprocs=size, start_method="spawn", join=True
    )
    whole_SP = torch.randn(N_ROWS, D_ROW, generator=torch.Generator().manual_seed(7)).requires_grad_()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(size)]
    for rank, (out, _) in enumerate(parts):
        expected = F.embedding(_lookups(rank), whole_SP).flatten(-2)
        assert torch.equal(out, expected)
        (expected * _weights_of_loss(rank)).sum().backward()
    assert whole_SP.grad is not None
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole_SP.grad, rtol=1e-5, atol=1e-6)
