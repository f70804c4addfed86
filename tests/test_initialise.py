"""If these fail, runs of one seed differ in more than what rho changes, and paired differences are not paired."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from conftest import tiny_config, tiny_engram, tiny_model, tiny_tables, tokens_without_bos

from engram.allocation import allocate
from engram.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, TableConfig
from engram.initialise import init_weights

MEMORY = EngramConfig(layer_ids=(0, 2), tables=TableConfig(d_mem=16, n_hash_heads=2))
BACKBONE = tiny_config(moe=MoEConfig(n_routed_experts=60, top_k=2, d_expert=16, d_shared=24))
PER_EXPERT = ("w_gate_EFD", "w_up_EFD", "w_down_EDF", "router_ED")


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in tiny_model(config, seed).named_parameters()}


def test_tensors_of_equal_name_and_shape_are_equal_over_rho() -> None:
    points = [weights(allocate(BACKBONE, MEMORY, rho)) for rho in (0.0, 0.5, 1.0)]
    for here, there in pairwise(points):
        common = [name for name in here.keys() & there.keys() if here[name].shape == there[name].shape]
        assert len(common) > 30
        assert all(torch.equal(here[name], there[name]) for name in common)


def test_an_expert_starts_equal_in_models_with_other_numbers_of_experts() -> None:
    few, many = (
        weights(tiny_config(moe=MoEConfig(n_routed_experts=n, top_k=2, d_expert=16, d_shared=24))) for n in (46, 106)
    )
    stacks = [name for name in few if name.endswith(PER_EXPERT)]
    assert len(stacks) == 2 * len(PER_EXPERT)
    for name in stacks:
        assert torch.equal(few[name], many[name][:46])


def test_random_tensors_differ_from_each_other_and_for_another_seed() -> None:
    one, other = (weights(tiny_config(engram=tiny_engram(), n_streams=2), seed) for seed in (0, 1))
    drawn = [name for name, w in one.items() if w.std() > 0 and not name.endswith(("stream_bias", "gain"))]
    assert len(drawn) > 30
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    for i, a in enumerate(drawn):
        assert not any(one[a].shape == one[b].shape and torch.equal(one[a], one[b]) for b in drawn[:i])


def test_experts_of_a_stack_differ() -> None:
    stack_EFD = weights(BACKBONE)["blocks.1.ffn.experts.w_gate_EFD"]
    assert len({tuple(w.flatten().tolist()) for w in stack_EFD}) == 60


def test_every_parameter_is_set_whatever_it_held() -> None:
    config = tiny_config(engram=tiny_engram(), n_streams=2)
    model = tiny_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    init_weights(model, seed=0)
    expected = weights(config)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(moe=None),
        tiny_config(),
        tiny_config(engram=tiny_engram(), n_streams=4),
        replace(tiny_config(), d_model=128, vocab_size=1000),
    ],
    ids=["dense", "moe", "engram, four streams", "wide"],
)
def test_the_first_loss_is_log_v(config: ModelConfig) -> None:
    text = tokens_without_bos(16, 65, vocab_size=config.vocab_size)
    loss = tiny_model(config)(text[:, :-1], text[:, 1:]).item()
    assert loss == pytest.approx(math.log(config.vocab_size), rel=0.02)


def test_initialisation_leaves_the_global_generator_alone() -> None:
    model = tiny_model(BACKBONE)
    before = torch.get_rng_state()
    init_weights(model, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_initial_weights_do_not_depend_on_the_global_seed() -> None:
    torch.manual_seed(1)
    one = weights(BACKBONE)
    torch.manual_seed(2)
    other = weights(BACKBONE)
    assert all(torch.equal(one[name], other[name]) for name in one)


LATENT_QUERY = MLAConfig(
    n_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, q_lora_rank=96
)
WIDE = ModelConfig(
    vocab_size=512,
    d_model=256,
    n_layers=8,
    n_dense_layers=1,
    d_ff=512,
    mla=LATENT_QUERY,
    moe=MoEConfig(n_routed_experts=4, top_k=2, d_expert=128, d_shared=128),
    engram=EngramConfig(layer_ids=(0,), tables=tiny_tables(d_mem=256, n_slots=((211, 223, 227, 229),))),
    n_streams=2,
)
"""Eight layers: what writes to the residual shrinks by sqrt(2 * 8) = 4."""
WRITER = 1 / 4


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed_VD", 256**-0.5),
        ("head_VD", 1 / 256),
        ("blocks.0.engram.tables.table_SP", 0.02),
        ("blocks.0.engram.w_key_MDQ", 256**-0.5),
        ("blocks.0.engram.w_value_DQ", 256**-0.5 * WRITER),
        ("blocks.0.attention.q_down.weight", 256**-0.5),
        ("blocks.0.attention.q.weight", 96**-0.5),
        ("blocks.0.attention.kv_down.weight", 256**-0.5),
        ("blocks.0.attention.kv_up.weight", 64**-0.5),
        ("blocks.0.attention.out.weight", 128**-0.5 * WRITER),
        ("blocks.0.ffn.gate.weight", 256**-0.5),
        ("blocks.0.ffn.up.weight", 256**-0.5),
        ("blocks.0.ffn.down.weight", 512**-0.5 * WRITER),
        ("blocks.1.ffn.router.router_ED", 256**-0.5),
        ("blocks.1.ffn.experts.w_gate_EFD", 256**-0.5),
        ("blocks.1.ffn.experts.w_down_EDF", 128**-0.5 * WRITER),
        ("blocks.1.ffn.shared.down.weight", 128**-0.5 * WRITER),
        ("blocks.1.residual_ffn.stream_phi", 512**-0.5),
    ],
)
def test_spreads_are_those_the_docstring_states(name: str, std: float) -> None:
    """Within four standard errors of the sample's spread."""
    weight = wide_weights()[name]
    assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())


@cache
def wide_weights() -> dict[str, torch.Tensor]:
    return weights(WIDE)


def test_gains_are_one_and_the_convolution_is_zero() -> None:
    for name, weight in wide_weights().items():
        if name.endswith("gain"):
            assert (weight == 1).all(), name
    assert (wide_weights()["blocks.0.engram.conv.conv_JMD"] == 0).all()
