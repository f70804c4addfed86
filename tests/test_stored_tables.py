"""If these fail, tables in host memory or in bf16 train another model than tables on the device, or lose updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_config, tiny_engram, tiny_model
from tiny_study import STEPS, build_shards, study_run
from torch import Tensor

from engram.config import OptimConfig, OverEncodingConfig, TableConfig
from engram.memory import NgramTables
from engram.optim import build_optimizers
from engram.stored_tables import StoredTableAdam, StoredTables, round_at_random, store_tables
from engram.table_adam import TableAdam
from experiments.evaluate import validate
from experiments.finished import open_finished
from experiments.rundir import RunDir
from experiments.settings import Runtime, UserError
from experiments.shards import Shards, valid_batches
from experiments.study import parse_study, runs_with_data
from experiments.train import train
from experiments.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(tmp_path_factory.mktemp("stored"))


def losses(trainer: Trainer, steps: int = STEPS) -> list[float]:
    return [trainer.train_step()["loss"] for _ in range(steps)]


@pytest.mark.parametrize("tables", ["lazy", "rowwise"])
@pytest.mark.parametrize("micro_batch_tokens", [0, 64])
def test_tables_in_host_memory_train_the_same_model(shards: Shards, tables: str, micro_batch_tokens: int) -> None:
    """Losses, norms, rows and moments, equal to the last bit over a run whose steps share most of their rows."""
    run = study_run(shards, optim=OptimConfig(lr=5e-3, tables=tables))  # type: ignore[arg-type]
    runtime = Runtime(device="cpu", micro_batch_tokens=micro_batch_tokens)
    near = Trainer(run.spec, shards, runtime)
    far = Trainer(run.spec, shards, replace(runtime, table_device="cpu"))
    for _ in range(STEPS):
        assert near.train_step() == far.train_step()
    assert near.valid_step() == far.valid_step()
    far_tables = [m for m in far.model.modules() if isinstance(m, StoredTables)]
    assert len(far_tables) == 2
    for name, parameter in near.model.named_parameters():
        other = far.model.get_parameter(name)
        assert torch.equal(parameter, other), name
        for what, value in near.optimizers.state_of(parameter).items():
            assert_same(value, far.optimizers.state_of(other)[what])


def assert_same(a: Any, b: Any) -> None:
    assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("lookup", ["random", "over-encoding"])
def test_other_look_ups_come_from_host_memory_too(shards: Shards, lookup: str) -> None:
    engram = tiny_engram()
    model: dict[str, Any] = {"engram": replace(engram, tables=replace(engram.tables, lookup="random"))}
    if lookup == "over-encoding":
        one = replace(engram.tables, n_slots=engram.tables.n_slots[:1])
        model = {"engram": None, "over_encoding": OverEncodingConfig(tables=one)}
    spec = study_run(shards, model=model).spec
    near = Trainer(spec, shards, Runtime(device="cpu"))
    far = Trainer(spec, shards, Runtime(device="cpu", table_device="cpu"))
    assert losses(near) == losses(far)


@pytest.mark.parametrize(("first", "then"), [("same", "cpu"), ("cpu", "same"), ("cpu", "cpu")])
def test_a_checkpoint_moves_between_device_and_host_memory(
    shards: Shards, tmp_path: Path, first: str, then: str
) -> None:
    spec = study_run(shards).spec
    whole = losses(Trainer(spec, shards, Runtime(device="cpu")))
    before = Trainer(spec, shards, Runtime(device="cpu", table_device=first))  # type: ignore[arg-type]
    start = losses(before, 5)
    before.save(tmp_path)
    after = Trainer(spec, shards, Runtime(device="cpu", table_device=then))  # type: ignore[arg-type]
    assert after.resume(tmp_path)
    assert start + losses(after, STEPS - 5) == whole


def test_a_step_that_shares_no_row_with_the_one_before() -> None:
    """Adam over stored rows against TableAdam over the same gradients: disjoint, equal and mixed rows in turn."""
    spans = [(0, 8), (8, 16), (8, 16), (0, 16), (3, 5)]
    plain, stored = (tables_of(16) for _ in range(2))
    far = StoredTables(stored, CPU, torch.float32)
    far.table_SP.data.copy_(stored.table_SP.data)
    adam: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "rowwise": False}
    near_adam, far_adam = TableAdam([plain.table_SP], **adam), StoredTableAdam([far], **adam, device=CPU)
    for i, (low, high) in enumerate(spans):
        rows = torch.arange(low, high).view(1, -1, 1)
        direction = torch.randn(1, high - low, 4, generator=torch.Generator().manual_seed(i))
        plain.table_SP.grad = None
        plain(rows).backward(direction)
        near_adam.step()
        far_adam.prefetch(lambda rows=rows: [rows])  # type: ignore[misc]
        far_adam.begin()
        far(rows).backward(direction)
        far_adam.step()
    far_adam.flush()
    assert torch.equal(plain.table_SP, far.table_SP)


def tables_of(n_rows: int) -> NgramTables:
    tables = NgramTables(TableConfig(d_mem=4, ngram_orders=(2,), n_hash_heads=1, n_slots=((n_rows,),)), 0)
    tables.sparse_grad = True
    torch.nn.init.normal_(tables.table_SP, generator=torch.Generator().manual_seed(0))
    return tables


def test_a_model_moved_to_another_dtype_leaves_its_store_alone() -> None:
    model = tiny_model(tiny_config(engram=tiny_engram()))
    store_tables(model, CPU, torch.bfloat16)
    model.to(torch.float64)
    kinds = {m.table_SP.dtype for m in model.modules() if isinstance(m, StoredTables)}
    assert kinds == {torch.bfloat16}


def test_rounding_at_random_keeps_the_mean() -> None:
    """A value a quarter of the way between two bf16 numbers: three quarters of 40,000 go down, one up; the mean is
    within five standard errors. Values that bf16 holds stay."""
    low, high = 1.0, 1.0 + 2**-7
    x = torch.full((40_000,), low + (high - low) / 4)
    rounded = round_at_random(x, torch.Generator().manual_seed(0))
    assert set(rounded.tolist()) == {low, high}
    up = (rounded == high).float().mean()
    assert abs(float(up) - 0.25) < 5 * (0.25 * 0.75 / len(x)) ** 0.5
    held = torch.randn(1000).to(torch.bfloat16).float()
    assert torch.equal(round_at_random(held, torch.Generator().manual_seed(0)), held)


def test_bf16_tables_follow_fp32_ones(shards: Shards) -> None:
    """The same losses within a hundredth of a nat over a short run, and rows that really are bf16."""
    fp32 = Trainer(study_run(shards).spec, shards, Runtime(device="cpu"))
    optim = OptimConfig(lr=5e-3, table_dtype="bf16")
    bf16 = Trainer(study_run(shards, optim=optim).spec, shards, Runtime(device="cpu"))
    a, b = losses(fp32), losses(bf16)
    assert a != b
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.01
    stored = next(m for m in bf16.model.modules() if isinstance(m, StoredTables))
    assert stored.table_SP.dtype == torch.bfloat16
    assert all(
        s.dtype == torch.bfloat16 for s in map(bf16.optimizers.state_of(stored.table_SP).get, ("first", "second"))
    )


def test_small_steps_are_not_lost_in_bf16() -> None:
    """Steps of a sixteenth of bf16's spacing: rounded to the nearest, the row would never move."""
    tables = StoredTables(tables_of(4096), CPU, torch.bfloat16)
    tables.table_SP.data.fill_(1.0)
    adam = StoredTableAdam([tables], lr=2**-12, betas=(0.0, 0.0), eps=0.0, rowwise=False, device=CPU)
    rows = torch.arange(4096).view(1, -1, 1)
    for _ in range(8):
        adam.prefetch(lambda: [rows])
        adam.begin()
        tables(rows).backward(torch.ones(1, 4096, 4))
        adam.step()
    adam.flush()
    moved = 1.0 - tables.table_SP.float().mean()
    assert abs(float(moved) - 8 * 2**-12) < 1e-4


def test_evaluation_reads_the_store() -> None:
    model = tiny_model(tiny_config(engram=tiny_engram()))
    tokens = torch.randint(2, 64, (2, 9))
    expected = model(tokens)
    rows = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("table_SP")}
    store_tables(model, CPU, torch.float32)
    for name, values in rows.items():
        model.get_parameter(name).data.copy_(values)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected)


def test_a_launch_that_stored_tables_cannot_serve_is_refused_before_data_are_built(tmp_path: Path) -> None:
    words = ["cpu-smoke", f"runtime.data_dir={tmp_path / 'data'}", "runtime.table_device=cpu"]
    for more, said in (
        (["allocation", "train.optim.tables=dense"], "lazy or rowwise"),
        (["ablation", "grid.ablations=[dense-adam]"], "grid.ablations"),
        (["allocation", "runtime.processes=2"], "take one process"),
    ):
        with pytest.raises(UserError, match=said):
            runs_with_data(parse_study([*words, *more]), build=True)
    assert not (tmp_path / "data").exists()


def test_a_finished_run_with_bf16_tables_is_taken_up_again(shards: Shards, tmp_path: Path) -> None:
    """Rows are stored in bf16 and loaded in fp32: the same values, and so the run's own loss, to the bit."""
    run = study_run(shards, optim=OptimConfig(lr=5e-3, table_dtype="bf16"))
    run_dir = RunDir.create(tmp_path, run)
    assert train(run_dir, shards, Runtime(device="cpu", table_device="cpu"), lambda: False) == "final"
    finished = open_finished(run_dir.path, shards.path.parent)
    batches = valid_batches(shards, run.spec.train.eval_tokens, run.spec.train.seq_len, 4)
    score = validate(finished.load_model(), batches, shards.token_bytes, "fp32")
    assert score.nats_per_token == finished.final["result"]["valid_loss"]


def test_what_stored_tables_cannot_do_is_refused(shards: Shards) -> None:
    dense = study_run(shards, optim=OptimConfig(lr=5e-3, tables="dense")).spec
    with pytest.raises(UserError, match=r"tables=lazy or rowwise"):
        Trainer(dense, shards, Runtime(device="cpu", table_device="cpu"))
    with pytest.raises(ValueError, match="no bf16 form"):
        OptimConfig(lr=5e-3, tables="dense", table_dtype="bf16")
    model = tiny_model(tiny_config(engram=tiny_engram()))
    store_tables(model, CPU, torch.float32)
    with pytest.raises(ValueError, match="lazy or rowwise"):
        build_optimizers(model, OptimConfig(lr=5e-3, tables="dense"))
