"""If these fail, a run loses its name and its result, or two runs share one."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from test_settings import ids, smoke_runs

from engram.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, OptimConfig, TableConfig
from experiments.loading import load_budget, load_run
from experiments.settings import RunSpec, Runtime, TrainConfig, canonical


def test_a_number_has_one_identity_however_it_is_written() -> None:
    lr, tokens = load_budget("cpu-smoke").train.optim.lr, load_budget("cpu-smoke").train.tokens
    for same in (
        f"train.optim.lr={lr}",
        f"train.optim.lr={lr:.6e}",
        f"train.optim.lr={lr:.9f}",
        f"train.tokens={tokens:_}",
    ):
        assert ids(same) == ids()
    names = {tuple(ids(f"train.optim.lr={text}")) for text in ("3e-4", "3.0E-4", "0.0003", "0.00030", ".0003", "30e-5")}
    assert len(names) == 1
    assert not {*names.pop()} & {*ids("train.optim.lr=0.00031")}


def test_how_a_run_is_worked_on_never_changes_which_run_it_is() -> None:
    changed: dict[str, Any] = {"runs_dir": "/elsewhere", "data_dir": "/far", "checkpoint_every_s": 1.5}
    for f in fields(Runtime):
        kind = get_type_hints(Runtime)[f.name]
        if kind is int:
            changed[f.name] = getattr(Runtime(), f.name) + 1
        elif get_args(kind):
            changed[f.name] = get_args(kind)[-1]
    assert {f.name for f in fields(Runtime)} == set(changed), "a new setting: change it here too"
    assert ids(*(f"runtime.{key}={value}" for key, value in changed.items())) == ids()
    assert ids("about=else", "name=another", "flops_per_s=1", "suite=baselines") == ids(), "words about a study"


@pytest.mark.parametrize("change", [{"seed": 1}, {"data": "1" * 64}, {"schema": 1}])
def test_every_part_of_a_spec_changes_the_name(change: dict[str, int | str]) -> None:
    spec = smoke_runs()[0].spec
    assert replace(spec, **change).run_id != spec.run_id  # type: ignore[arg-type]


MINIMAL = RunSpec(
    seed=0,
    model=ModelConfig(
        vocab_size=64,
        d_model=16,
        n_layers=2,
        d_ff=32,
        mla=MLAConfig(n_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4),
        moe=MoEConfig(n_routed_experts=4, top_k=2, d_expert=8, d_shared=8),
        engram=EngramConfig(layer_ids=(1,), tables=TableConfig(d_mem=16, n_slots=((7,) * 16,))),
    ),
    train=TrainConfig(tokens=128, batch_tokens=64, seq_len=32, optim=OptimConfig(lr=1e-3)),
    data="0" * 64,
)


# The same run as a file of this version holds it.
SPELLED_OUT = """
labels: {budget: test, arm: allocation, mode: paper, rho_target: null, rho: null}
spec:
  seed: 0
  schema: 2
  data: "0000000000000000000000000000000000000000000000000000000000000000"
  model:
    {vocab_size: 64, d_model: 16, n_layers: 2, d_ff: 32, n_dense_layers: 0, n_streams: 1, sinkhorn_iters: 20,
    bos_id: 0, rope_theta: 10000.0, norm_eps: 1.0e-06, gqa: null, over_encoding: null,
    mla: {n_heads: 2, kv_lora_rank: 8, qk_nope_head_dim: 4, qk_rope_head_dim: 4, v_head_dim: 4, q_lora_rank: null},
    moe: {n_routed_experts: 4, top_k: 2, d_expert: 8, d_shared: 8, route_scale: 1.0},
    engram: {layer_ids: [1], gate: signed_sqrt, conv_kernel: 4,
      tables: {d_mem: 16, ngram_orders: [2, 3], n_hash_heads: 8, hash_seed: 0, pad_id: 2, compress_tokens: true,
        stop_at_documents: true, lookup: text, n_slots: [[7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7]]}}}
  train:
    {tokens: 128, batch_tokens: 64, seq_len: 32, precision: bf16, eval_tokens: 131072, eval_every: 0,
    optim: {lr: 0.001, matrices: muon, tables: lazy, table_lr_mult: 5.0, weight_decay: 0.1, adam_betas: [0.9, 0.95],
      adam_eps: 1.0e-08, muon_momentum: 0.95, grad_clip: 1.0, schedule: step, warmup_frac: 0.02, final_lr_frac: 0.1,
      wsd_decay_frac: 0.2, router_bias_gamma: 0.001}}
"""


def test_the_name_of_a_known_run_is_what_it_always_was(tmp_path: Path) -> None:
    """A change of a default, or of `canonical`, would give every run a new name and lose its result: raise `schema` if
    results change, else leave the default and name the new value in a budget."""
    (tmp_path / "config.yaml").write_text(SPELLED_OUT)
    assert load_run(tmp_path / "config.yaml").spec == MINIMAL, "a default changed"
    assert MINIMAL.run_id == "r243464ebb0"


def test_none_is_left_out_of_an_identity_so_that_an_optional_field_keeps_old_names() -> None:
    assert canonical({"b": None, "a": {"y": None, "x": 1}, "c": [None, 2]}) == '{"a":{"x":1},"c":[null,2]}'
    text = json.loads(canonical(MINIMAL))
    assert "gqa" not in text["model"]
    assert "q_lora_rank" not in text["model"]["mla"]


def test_an_identity_has_sorted_keys_and_no_spaces() -> None:
    assert canonical({"b": (1, 2.0), "a": True}) == '{"a":true,"b":[1,2.0]}'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_write_has_no_identity(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"lr": value})


def test_names_begin_with_a_letter_and_go_on_with_ten_hex_digits() -> None:
    """Else YAML would read some of them as numbers: 1234567890, or 12e4567890."""
    names = ids(f"seeds={list(range(40))}")
    assert len(names) == len(set(names)) == 240
    for name in names:
        assert name[0] == "r"
        assert len(name) == 11
        assert set(name[1:]) <= set("0123456789abcdef")
