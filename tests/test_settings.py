"""If these fail, a typing mistake trains another model than the one asked for, or a run loses its name and its result.

Covers budgets (YAML and overrides), runs as files, and the identity of a run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from experiments.loading import CONFIGS, budget_names, load_budget, load_run, load_runtime, save_run
from experiments.settings import Run, Runtime, UserError
from experiments.suites import runs_of

BUDGETS = budget_names()
ALL_ARMS = "controls=[dense,module-only,random-ids,strict,over-encoding]"


def smoke_runs(*overrides: str, suite: str = "allocation") -> list[Run]:
    return runs_of(suite, load_budget("cpu-smoke", overrides), "0" * 64)


def ids(*overrides: str) -> list[str]:
    return [run.spec.run_id for run in smoke_runs(*overrides)]


# Budgets that come with the suite


def test_every_budget_is_listed_by_its_files_name() -> None:
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == BUDGETS
    assert {"cpu-small", "cpu-smoke", "gpu-small", "gpu-medium", "paper-2e20", "paper-6e20", "27b"} <= set(BUDGETS)


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_is_a_pure_moe_with_an_unsized_memory_and_a_grid_that_holds_rho_1(name: str) -> None:
    budget = load_budget(name)
    assert budget.name == name
    assert budget.about
    assert budget.backbone.moe is not None
    assert budget.backbone.memory is None
    assert budget.engram.tables.n_slots == ()
    assert 1.0 in budget.rhos
    assert budget.data.vocab_size <= budget.backbone.vocab_size


def test_a_budget_may_lie_anywhere_and_is_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((CONFIGS / "cpu-smoke.yaml").read_text())
    assert load_budget(str(path)) == replace(load_budget("cpu-smoke"), name="mine")


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    before = load_budget("cpu-smoke")
    after = load_budget("cpu-smoke", ["train.tokens=8192", "seeds=[3]", "data.corpus=a=b", "backbone.moe.top_k=2"])
    assert before.backbone.moe is not None
    assert after == replace(
        before,
        train=replace(before.train, tokens=8192),
        seeds=(3,),
        data=replace(before.data, corpus="a=b"),
        backbone=replace(before.backbone, moe=replace(before.backbone.moe, top_k=2)),
    )


# Mistakes


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert "$VALUE" not in text, "OmegaConf's unfilled template"
    return text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("nonsense=1", ["nonsense=1", "not in 'Budget'"]),
        ("train.nonsense=1", ["train.nonsense=1", "not in 'TrainConfig'"]),
        ("backbone.moe.n_experts=4", ["backbone.moe.n_experts=4", "not in 'MoEConfig'"]),
        ("train.tokens=true", ["train.tokens", "'True'", "Integer"]),
        ("train.tokens=1e6", ["train.tokens=1e6", "float", "Integer"]),
        ("train.tokens=many", ["train.tokens", "'many'", "Integer"]),
        ("train.tokens=", ["train.tokens=", "'None'"]),
        ("train.optim.lr=true", ["train.optim.lr", "'True'", "Float"]),
        ("seeds=[true]", ["seeds=[true]", "Integer"]),
        ("seeds=[0.5]", ["seeds=[0.5]", "Integer"]),
        ("seeds=3", ["seeds=3", "int"]),
        ("train.optim=3", ["train.optim=3", "OptimConfig"]),
        ("train.precision=fp16", ["train.precision", "'fp16'", "'bf16', 'fp32'"]),
        ("controls=[dense,nothing]", ["controls=[dense,nothing]", "'module-only'"]),
        ("rhos=[1.0,0.5", ["rhos=[1.0,0.5", "expected ',' or ']'"]),
    ],
)
def test_an_unknown_key_or_a_wrong_type_is_refused_with_key_and_value(override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_budget("cpu-smoke", [override])
    text = refusal(error)
    assert all(part in text for part in said), text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.tokens=100", "tokens=100 is less than one step"),
        ("train.seq_len=100", "must be a multiple of seq_len=100"),
        ("train.eval_tokens=1", "eval_tokens=1 is less than one sequence"),
        ("train.eval_every=-1", "eval_every=-1"),
        ("train.optim.lr=-1", "lr=-1.0"),
        ("train.optim.lr=inf", "train.optim.lr=inf"),
        ("train.optim.lr=nan", "lr=nan"),
        ("backbone.moe.top_k=47", "n_routed_experts=46 is below top_k=47"),
        ("backbone.mla=null", "exactly one of mla and gqa"),
        ("backbone.moe=null", "it needs moe and no memory"),
        (
            "backbone.over_encoding={tables: {d_mem: 16, n_hash_heads: 1, n_slots: [[5, 7]]}}",
            "it needs moe and no memory",
        ),
        ("backbone.d_model=30", "d_model=30"),
        ("data.vocab_size=2000", "data.vocab_size=2000 tokens do not fit into backbone.vocab_size=1024"),
        ("engram.tables.d_mem=30", "d_mem=30 must be a multiple"),
        ("engram.layer_ids=[2,1]", "layer_ids=(2, 1) must rise"),
        ("rhos=[0.5,1.5]", "not [1.5]"),
        ("rhos=[nan]", "not [nan]"),
        ("seeds=[]", "seeds=[]"),
        ("rhos=[]", "rhos=[]"),
        ("seeds=[0,-1]", "seeds=[0, -1]: a seed is a number from 0 on"),
        ("control_rho=1.0", "control_rho=1.0"),
        ("flops_per_s=0", "flops_per_s=0.0"),
        ("runtime.workers=-1", "runtime.workers=-1 must be at least 0"),
        ("runtime.threads=0", "runtime.threads=0 must be at least 1"),
        ("runtime.micro_batch_tokens=-64", "runtime.micro_batch_tokens=-64"),
        ("runtime.checkpoint_every_s=-1", "runtime.checkpoint_every_s=-1"),
    ],
)
def test_an_impossible_value_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        load_budget("cpu-smoke", [override])
    assert refusal(error).startswith("budget cpu-smoke: ")
    assert said in refusal(error)
    assert "self." not in refusal(error), "the user has no self"


@pytest.mark.parametrize("word", ["--x=1", "x =1", "train.tokens =1", "=1", "seeds[0]=1", "seeds.0=1", "train.tokens"])
def test_a_word_that_is_no_override_is_refused_with_an_example(word: str) -> None:
    with pytest.raises(UserError) as error:
        load_budget("cpu-smoke", [word])
    assert refusal(error) == f"changes look like train.tokens=100000, not {word}"


def test_omegaconfs_mark_for_a_missing_value_does_not_pass_for_one() -> None:
    with pytest.raises(UserError, match=r"not train\.tokens=\?\?\?"):
        load_budget("cpu-smoke", ["train.tokens=???"])


def test_one_key_given_twice_is_refused_rather_than_decided() -> None:
    with pytest.raises(UserError) as error:
        load_budget("cpu-smoke", ["train.tokens=8192", "seeds=[1]", "train.tokens=16384"])
    assert refusal(error).startswith("train.tokens is given more than once: train.tokens=8192 ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing mandatory value: about"),
        ("[1, 2]", "must map keys to values"),
        ("3", "must map keys to values"),
        ("about: [", "did not find expected"),
        ("about: a\nabout: b", "duplicate key about"),
        ("about: a\nseeds: [true]", "seeds: Value in it could not be converted"),
        ("about: a\nbackbone: {moe: {n_experts: 3}}", "backbone.moe.n_experts"),
        ("about: a\ntrain: {tokens: 1e6}", "train.tokens"),
        ("about: ${nowhere}", "nowhere"),
        ("\0", "control characters"),
    ],
)
def test_a_broken_budget_file_is_refused_by_path_and_place(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_budget(str(path))
    assert refusal(error).startswith(f"budget {path}")
    assert said in refusal(error)


@pytest.mark.parametrize("name", ["cpu-smal", "missing/budget.yaml", ""])
def test_an_unknown_budget_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError) as error:
        load_budget(name)
    assert f"no budget {name!r}: choose one of {', '.join(BUDGETS)}" in refusal(error)


@pytest.mark.parametrize(
    ("word", "said"),
    [("worker=1", "worker=1: Key 'worker'"), ("threads=0", "threads=0 must be"), ("device=tpu", "'tpu'")],
)
def test_a_workers_settings_are_checked_as_strictly(word: str, said: str) -> None:
    assert load_runtime(["threads=1", "threads=2"]) == Runtime(threads=2), "the later counts: flags are put behind"
    with pytest.raises(UserError) as error:
        load_runtime([word])
    assert said in refusal(error)


# Runs as files


def test_a_run_of_every_arm_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    runs = smoke_runs(ALL_ARMS) + smoke_runs(suite="baselines")
    arms = {"allocation", "dense", "module-only", "random-ids", "over-encoding", "engram-large"}
    assert {run.labels.arm for run in runs} == arms
    assert {run.labels.mode for run in runs} == {"paper", "strict"}
    for run in runs:
        save_run(run, tmp_path / "config.yaml")
        back = load_run(tmp_path / "config.yaml")
        assert back == run
        assert hash(back.spec.model) == hash(run.spec.model), "a list in place of a tuple"
        assert back.spec.run_id == run.spec.run_id


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("seed: 0", "seed: zero", "spec.seed"),
        ("seed: 0", "sed: 0", "sed"),
        ("d_model: 32", "d_model: 33", "d_model=33"),
        ("labels:", "labels: [", "expected"),
    ],
)
def test_a_damaged_run_file_is_refused_by_path(before: str, after: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_run(smoke_runs()[0], path)
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after, 1))
    with pytest.raises(UserError) as error:
        load_run(path)
    assert refusal(error).startswith(f"{path}: ")
    assert said in refusal(error)
