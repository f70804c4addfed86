"""If these fail, models that are compared as equal in parameters or FLOPs are not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch
from conftest import tiny_config, tiny_engram, tiny_model, tiny_tables, tokens_without_bos
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, OverEncodingConfig
from engram.counting import count_params, forward_flops_per_token, train_flops_per_token
from engram.moe import RoutedExperts

LATENT_QUERY = MLAConfig(
    n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=20
)
GQA = GQAConfig(n_heads=4, n_kv_heads=2, head_dim=10)
ONE_ROW = tiny_tables(n_slots=((1,) * 4, (1,) * 4))
CONFIGS = {
    "dense, mla": tiny_config(moe=None),
    "dense, gqa": tiny_config(moe=None, mla=None, gqa=GQA),
    "dense, query latent": tiny_config(moe=None, mla=LATENT_QUERY),
    "moe": tiny_config(),
    "moe everywhere, no shared expert": tiny_config(
        n_dense_layers=0, moe=MoEConfig(n_routed_experts=5, top_k=3, d_expert=16, d_shared=0)
    ),
    "moe, all experts active": tiny_config(moe=MoEConfig(n_routed_experts=4, top_k=4, d_expert=16, d_shared=24)),
    "moe, two streams": tiny_config(n_streams=2),
    "engram": tiny_config(engram=tiny_engram()),
    "engram, four streams": tiny_config(engram=tiny_engram(), n_streams=4),
    "engram, no gate": tiny_config(engram=tiny_engram(gate="none")),
    "engram, no gate, four streams": tiny_config(engram=tiny_engram(gate="none"), n_streams=4),
    "engram, no convolution": tiny_config(engram=tiny_engram(conv_kernel=0), n_streams=4),
    "engram, gqa": tiny_config(engram=tiny_engram(), mla=None, gqa=GQA),
    "engram, dense": tiny_config(engram=tiny_engram(), moe=None),
    "module only": tiny_config(engram=tiny_engram(tables=ONE_ROW)),
    "over-encoding": tiny_config(over_encoding=OverEncodingConfig(tables=tiny_tables(n_slots=((31, 37, 41, 43),)))),
}


def group(name: str) -> str:
    """Which group of `ParamCounts` a parameter's name belongs to."""
    rules = {
        "embed_VD": "embedding",
        "head_VD": "head",
        "table_SP": "tables",
        "over_encoding.": "memory_module",
        ".engram.": "memory_module",
        ".residual_": "streams",
        ".attention.": "attention",
        ".router.": "router",
        ".experts.": "routed_experts",
        ".shared.": "shared_experts",
        ".ffn.": "dense_ffn",
        "norm_": "norms",
    }
    return next(g for part, g in rules.items() if part in name)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_group_equals_the_built_model(name: str) -> None:
    config = CONFIGS[name]
    built: Counter[str] = Counter()
    for parameter_name, parameter in tiny_model(config).named_parameters():
        built[group(parameter_name)] += parameter.numel()
    counts = count_params(config)
    assert {g: n for g, n in asdict(counts).items() if n and not g.endswith("_active")} == dict(built)
    assert counts.total == sum(built.values())
    assert counts.P_tot == counts.total - built["embedding"] - built["head"]


def used_by_one_token(config: ModelConfig) -> int:
    """Parameters without vocabulary and head, less the experts and rows that get no gradient from one token."""
    model = tiny_model(config)
    model(tokens_without_bos(1, 1)).sum().backward()
    used = 0
    for name, parameter in model.named_parameters():
        if group(name) in ("routed_experts", "tables"):
            assert parameter.grad is not None
            touched = parameter.grad.flatten(1).any(1).sum().item()
            used += int(touched) * parameter[0].numel()
        elif group(name) not in ("embedding", "head"):
            used += parameter.numel()
    return used


@pytest.mark.parametrize("name", CONFIGS)
def test_active_parameters_are_those_one_token_reaches(name: str) -> None:
    counts = count_params(CONFIGS[name])
    assert counts.P_act == used_by_one_token(CONFIGS[name])
    assert counts.P_sparse == counts.P_tot - counts.P_act


def test_a_dense_model_and_a_table_of_one_row_have_no_sparse_parameters() -> None:
    assert count_params(CONFIGS["dense, mla"]).P_sparse == 0
    assert count_params(CONFIGS["moe, all experts active"]).P_sparse == 0
    assert count_params(CONFIGS["module only"]).P_engram == 0


def test_sparse_parameters_split_into_experts_and_rows_by_hand() -> None:
    counts = count_params(CONFIGS["engram"])
    assert counts.P_moe_sparse == 2 * (8 - 2) * 3 * 32 * 16  # layers, unused experts, matrices, widths
    assert counts.P_engram == (31 + 37 + 41 + 43 + 47 + 53 + 59 + 61 - 8) * 4


def counted_flops(config: ModelConfig, backward: bool, batch: int = 2, length: int = 24) -> float:
    """Torch's own count per token, with the plain loop over experts and attention as two products."""
    model = tiny_model(config)
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.backend = "loop"
    text = tokens_without_bos(batch, length + 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if backward:
            model(text[:, :-1], text[:, 1:]).backward()
        else:
            with torch.no_grad():
                model(text[:, :-1], text[:, 1:])
    return counter.get_total_flops() / (batch * length)


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_flops_equal_torchs_counter(name: str) -> None:
    assert forward_flops_per_token(CONFIGS[name], 24) == pytest.approx(counted_flops(CONFIGS[name], False), rel=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_flops_equal_torchs_counter(name: str) -> None:
    assert train_flops_per_token(CONFIGS[name], 24) == pytest.approx(counted_flops(CONFIGS[name], True), rel=1e-9)


def test_flops_do_not_depend_on_rows_and_depend_on_length_through_attention_alone() -> None:
    few, many = CONFIGS["engram"], CONFIGS["engram"]
    many = replace(many, engram=tiny_engram(tables=tiny_tables(n_slots=((1009,) * 4, (1013,) * 4))))
    assert forward_flops_per_token(few, 64) == forward_flops_per_token(many, 64)
    scores = forward_flops_per_token(few, 65) - forward_flops_per_token(few, 64)
    assert scores == 3 * 2 * 2 * (8 + 8 + 12)  # layers, heads, two operations, query-key and value widths
