"""If these fail, some parameter trains under another rule than the paper's, or a resumed run leaves its path.

The model is a real one with every kind of parameter. Clipping is held against `torch.nn.utils.clip_grad_norm_` on dense
gradients; the optimisers themselves are tested in test_muon.py and test_table_adam.py.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import EngramConfig, GQAConfig, MLAConfig, ModelConfig, MoEConfig, OptimConfig, TableConfig
from engram.initialise import init_weights
from engram.moe import Router
from engram.optim import Optimizers, build_optimizers, group_by_role, needs_sparse_grad, role, update_router_biases
from engram.transformer import Transformer

TABLES = ["dense", "lazy", "rowwise"]


def tiny_model(**changes: Any) -> Transformer:
    """A model with every kind of parameter: MLA, experts, two streams, n-gram tables."""
    tables = TableConfig(d_mem=8, n_hash_heads=1, n_slots=((13, 17),))
    fields: dict[str, Any] = {
        "vocab_size": 32,
        "d_model": 16,
        "n_layers": 2,
        "d_ff": 32,
        "n_dense_layers": 1,
        "mla": MLAConfig(n_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8),
        "moe": MoEConfig(n_routed_experts=4, top_k=2, d_expert=8, d_shared=8),
        "engram": EngramConfig(layer_ids=(1,), tables=tables),
        "n_streams": 2,
    }
    model = Transformer(ModelConfig(**(fields | changes)), compressed_V=np.arange(32))
    init_weights(model, seed=0)
    return model


def ready(**changes: Any) -> tuple[Transformer, Optimizers]:
    config = OptimConfig(lr=0.01, **changes)
    model = tiny_model()
    model.set_sparse_tables(needs_sparse_grad(config))
    return model, build_optimizers(model, config)


def backward(model: Transformer, batch: int) -> None:
    tokens_BT = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(batch))
    model(tokens_BT[:, :-1], tokens_BT[:, 1:]).backward()


def train(model: Transformer, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizers.clip(1.0)
        optimizers.step(lr_factor=1 / (1 + step))
        optimizers.zero_grad()


# Roles


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blocks.1.engram.tables.table_SP", (30, 4), "table"),
        ("over_encoding.tables.table_SP", (1, 4), "table"),
        ("embed_VD", (32, 16), "embedding"),
        ("head_VD", (32, 16), "embedding"),
        ("blocks.1.ffn.router.router_ED", (4, 16), "embedding"),
        ("blocks.0.residual_ffn.stream_phi", (8, 32), "embedding"),
        ("blocks.0.residual_ffn.stream_bias", (8,), "vector"),
        ("blocks.0.residual_ffn.stream_alpha", (3,), "vector"),
        ("norm_out.gain", (16,), "vector"),
        ("blocks.1.engram.norm_key.gain", (2, 16), "vector"),
        ("blocks.1.engram.conv.conv_JMD", (4, 2, 16), "vector"),
        ("blocks.0.attention.kv_down.weight", (12, 16), "matrix"),
        ("blocks.1.engram.w_value_DQ", (16, 8), "matrix"),
        ("blocks.1.engram.w_key_MDQ", (2, 16, 8), "matrix"),
        ("blocks.1.ffn.experts.w_gate_EFD", (4, 8, 16), "matrix"),
        ("over_encoding.w_up_ODQ", (2, 16, 4), "matrix"),
    ],
)
def test_a_parameter_has_the_role_its_name_and_shape_say(name: str, shape: tuple[int, ...], expected: str) -> None:
    assert role(name, shape) == expected


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tables.table_SP", (2, 13, 4)),
        ("tables.table_SP", (13,)),
        ("embed_VD", (32,)),
        ("router.router_ED", (2, 4, 16)),
        ("conv.conv_JMD", (4, 16)),
        ("norm.gain", (2, 2, 16)),
        ("experts.w_gate_EFD", (2, 4, 8, 16)),
        ("unheard_of", (4, 8, 16)),
        ("temperature", ()),
    ],
)
def test_a_shape_that_no_rule_knows_is_refused_by_name(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"no rule says how to update {name} of shape"):
        role(name, shape)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("tables", TABLES)
def test_every_parameter_is_in_exactly_one_group(matrices: str, tables: str) -> None:
    model, optimizers = ready(matrices=matrices, tables=tables)
    assert Counter(map(id, optimizers.parameters())) == Counter(map(id, model.parameters()))


def test_a_model_without_memory_or_experts_has_an_optimiser_for_every_parameter() -> None:
    gqa = GQAConfig(n_heads=2, n_kv_heads=1, head_dim=8)
    model = tiny_model(mla=None, gqa=gqa, moe=None, engram=None, n_streams=1)
    optimizers = build_optimizers(model, OptimConfig(lr=0.01))
    assert Counter(map(id, optimizers.parameters())) == Counter(map(id, model.parameters()))


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_weight_decay_shrinks_matrices_and_embeddings_and_nothing_else(matrices: str) -> None:
    model, optimizers = ready(matrices=matrices, tables="dense", weight_decay=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(lr_factor=0.5)
    for name, p in model.named_parameters():
        decayed = role(name, p.shape) in ("matrix", "embedding")
        expected = before[name] * (1 - 0.5 * 0.01 * 0.3) if decayed else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tables", TABLES)
def test_tables_learn_five_times_as_fast_as_embeddings(tables: str) -> None:
    # Adam's first step is lr * sign(gradient) wherever the gradient is far above eps.
    model, optimizers = ready(tables=tables, weight_decay=0.0)
    groups = group_by_role(model)
    before = [groups["table"][0].detach().clone(), groups["embedding"][0].detach().clone()]
    for p in (groups["table"][0], groups["embedding"][0]):
        p.grad = torch.ones_like(p)
    if needs_sparse_grad(OptimConfig(lr=1.0, tables=tables)):  # type: ignore[arg-type]
        groups["table"][0].grad = torch.ones_like(groups["table"][0]).to_sparse(1)
    optimizers.step(lr_factor=0.5)
    torch.testing.assert_close(groups["table"][0].detach(), before[0] - 0.5 * 0.01 * 5, rtol=0, atol=1e-6)
    torch.testing.assert_close(groups["embedding"][0].detach(), before[1] - 0.5 * 0.01, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tables", "moves"), [("dense", True), ("lazy", False), ("rowwise", False)])
def test_only_dense_tables_move_rows_that_the_batch_did_not_look_up(tables: str, moves: bool) -> None:
    model, optimizers = ready(tables=tables)
    table_SP = group_by_role(model)["table"][0]

    def step(ids: list[int]) -> None:
        F.embedding(torch.tensor(ids), table_SP, sparse=tables != "dense").sum().backward()
        optimizers.step(1.0)
        optimizers.zero_grad()

    step([3, 5])
    before = table_SP[3].detach().clone()
    step([5, 7])
    assert torch.equal(table_SP[3], before) != moves


# All together


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
@pytest.mark.parametrize("tables", ["lazy", "dense"])
def test_clipping_equals_torch_on_dense_gradients(tables: str, max_norm: float) -> None:
    # rtol 1e-4: torch divides by the norm plus 1e-6.
    ours, optimizers = ready(tables=tables)
    theirs = tiny_model()
    for model in (ours, theirs):
        backward(model, 0)
        backward(model, 1)
    expected = float(nn.utils.clip_grad_norm_(theirs.parameters(), max_norm))
    assert optimizers.clip(max_norm) == pytest.approx(expected, rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(dense_gradient(p), dense_gradient(q), rtol=1e-4, atol=1e-8)


def dense_gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.to_dense().clone()


@contextmanager
def unchanged_gradients(model: nn.Module) -> Iterator[None]:
    before = [dense_gradient(p) for p in model.parameters()]
    yield
    for p, gradient in zip(model.parameters(), before, strict=True):
        # Not to the bit: coalescing may add repeated rows in another order.
        torch.testing.assert_close(dense_gradient(p), gradient, rtol=1e-5, atol=1e-8, equal_nan=True)


def test_clipping_at_zero_only_measures() -> None:
    model, optimizers = ready()
    backward(model, 0)
    with unchanged_gradients(model):
        assert optimizers.clip(0.0) > 0.1


def test_a_norm_that_is_not_finite_is_reported_and_gradients_are_left_alone() -> None:
    model, optimizers = ready()
    backward(model, 0)
    assert model.norm_out.gain.grad is not None
    model.norm_out.gain.grad[0] = float("nan")
    with unchanged_gradients(model):
        assert math.isnan(optimizers.clip(0.05))


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
@pytest.mark.parametrize("tables", TABLES)
def test_a_resumed_optimiser_continues_bit_for_bit(matrices: str, tables: str) -> None:
    whole, optimizers = ready(matrices=matrices, tables=tables)
    train(whole, optimizers, range(3))
    file = io.BytesIO()
    remembered = {name: optimizers.state_of(p) for name, p in whole.named_parameters()}
    torch.save({"model": whole.state_dict(), "optimizers": remembered}, file)
    train(whole, optimizers, range(3, 6))

    resumed, new_optimizers = ready(matrices=matrices, tables=tables)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    for name, parameter in resumed.named_parameters():
        for what, value in saved["optimizers"][name].items():
            new_optimizers.restore(parameter, what, value)
    train(resumed, new_optimizers, range(3, 6))
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_steps_learning_rates_are_the_peaks_times_the_factor_whatever_came_before() -> None:
    _, optimizers = ready(tables="dense")
    for factor in (0.25, 0.5):
        optimizers.step(factor)
        rates = {group["lr"] for optimizer in optimizers.optimizers for group in optimizer.param_groups}
        assert rates == {0.01 * factor, 0.01 * 5 * factor}


def test_zero_grad_drops_dense_and_sparse_gradients() -> None:
    model, optimizers = ready()
    backward(model, 0)
    optimizers.zero_grad()
    assert all(p.grad is None for p in model.parameters())


# Loss-free balancing


def router(load: list[float]) -> Router:
    made = Router(8, MoEConfig(n_routed_experts=len(load), top_k=1, d_expert=4, d_shared=0))
    made.load_E.copy_(torch.tensor(load))
    return made


def test_biases_fall_above_the_mean_load_and_rise_below_by_gamma() -> None:
    one = router([9.0, 1.0, 5.0, 5.0])
    one.bias_E.fill_(0.5)
    update_router_biases(nn.ModuleList([nn.Linear(2, 2), one]), gamma=0.01)
    torch.testing.assert_close(one.bias_E, torch.tensor([0.49, 0.51, 0.5, 0.5]), rtol=1e-6, atol=0)


def test_each_router_is_balanced_by_its_own_mean_and_counts_anew() -> None:
    routers = nn.ModuleList([router([2.0, 0.0]), router([100.0, 200.0])])
    update_router_biases(routers, gamma=0.01)
    biases = torch.stack([each.get_buffer("bias_E") for each in routers])
    torch.testing.assert_close(biases, torch.tensor([[-0.01, 0.01], [0.01, -0.01]]))
    assert all(each.get_buffer("load_E").count_nonzero() == 0 for each in routers)


def test_biases_even_out_a_lopsided_router() -> None:
    # At the default step, whose size sets how much the load still jitters in the end.
    torch.manual_seed(0)
    lopsided = router([0.0] * 8)
    nn.init.normal_(lopsided.router_ED)
    x_ND = torch.randn(512, 8) + 1  # a common direction: without biases a few experts take most tokens
    lopsided(x_ND)
    assert lopsided.load_E.max() > 3 * lopsided.load_E.mean()
    for _ in range(1000):
        update_router_biases(lopsided, OptimConfig(lr=1.0).router_bias_gamma)
        lopsided(x_ND)
    assert lopsided.load_E.max() < 1.2 * lopsided.load_E.mean()
