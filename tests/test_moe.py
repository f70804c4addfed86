"""If these fail, fast experts compute another function than the plain loop, or the router is not DeepSeek-V3's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor

from engram.config import MoEConfig
from engram.moe import MoE, RoutedExperts, Router, SwiGLU, experts_grouped, experts_loop, fast_way
from engram.padded_experts import experts_padded

N, D, E, K, WIDTH = 50, 16, 12, 3, 8


def sizes(**changes: Any) -> MoEConfig:
    return MoEConfig(**{"n_routed_experts": E, "top_k": K, "d_expert": WIDTH, "d_shared": 20} | changes)


def noise(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5


def expert_operands(ids_NK: Tensor, n_experts: int = E, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, weights, gate, up and down, all leaves that want gradients."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()

    n, k = ids_NK.shape
    g_NK = torch.rand(n, k, generator=generator).requires_grad_()
    experts = draw(n_experts, WIDTH, D, scale=0.25), draw(n_experts, WIDTH, D, scale=0.25)
    return [draw(n, D), g_NK, *experts, draw(n_experts, D, WIDTH, scale=0.35)]


def spread_ids(n_experts: int = E, k: int = K) -> Tensor:
    return torch.rand(N, n_experts, generator=torch.Generator().manual_seed(2)).topk(k).indices


LOADS = {
    "spread": spread_ids(),
    "empty experts": torch.tensor([[2, 7, 9]]).expand(N, -1),
    "one expert gets all": torch.stack([torch.full((N,), 5), torch.arange(N) % 5, 6 + torch.arange(N) % 6], dim=1),
    "every expert is chosen": torch.stack([torch.randperm(K) for _ in range(N)]),
    "one token": torch.tensor([[11, 0, 4]]),
    "top 1": spread_ids(k=1),
}


def outputs_and_gradients(function: Any, operands: list[Tensor], ids_NK: Tensor) -> list[Tensor]:
    x_ND, g_NK, *weights = operands
    y_ND = function(x_ND, g_NK, ids_NK, *weights)
    direction = torch.randn(y_ND.shape, generator=torch.Generator().manual_seed(4)).to(y_ND.dtype)
    return [y_ND, *torch.autograd.grad((y_ND * direction).sum(), operands)]


FAST = [experts_grouped, experts_padded]


@pytest.mark.parametrize("function", FAST)
@pytest.mark.parametrize("load", LOADS)
def test_fast_experts_equal_the_loop(load: str, function: Any) -> None:
    ids_NK = LOADS[load]
    n_experts = K if load == "every expert is chosen" else E
    operands = expert_operands(ids_NK, n_experts)
    fast = outputs_and_gradients(function, operands, ids_NK)
    slow = outputs_and_gradients(experts_loop, operands, ids_NK)
    for here, there in zip(fast, slow, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", FAST)
def test_fast_experts_in_bf16_are_near_the_loop_in_fp32(function: Any) -> None:
    """Products of bf16 operands: outputs and gradients within 2 percent of their norm."""
    ids_NK = LOADS["spread"]
    rough = outputs_and_gradients(function, expert_operands(ids_NK, dtype=torch.bfloat16), ids_NK)
    exact = outputs_and_gradients(experts_loop, expert_operands(ids_NK), ids_NK)
    for here, there in zip(rough, exact, strict=True):
        assert (here.float() - there).norm() < 0.02 * there.norm()


@pytest.mark.parametrize("function", FAST)
def test_experts_no_token_chose_get_zero_gradients(function: Any) -> None:
    ids_NK = LOADS["empty experts"]
    *_, gate, up, down = outputs_and_gradients(function, expert_operands(ids_NK), ids_NK)
    for gradient in (gate, up, down):
        assert set(gradient.flatten(1).any(1).nonzero().flatten().tolist()) == {2, 7, 9}


def test_grouped_products_are_for_bf16_on_gpus_alone() -> None:
    assert fast_way("cuda", torch.bfloat16) is experts_grouped
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.bfloat16), ("cpu", torch.float32)):
        assert fast_way(device, dtype) is experts_padded


def test_padding_is_little_and_padded_products_are_few_however_uneven_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """From equal loads to an expert that most tokens choose: a call's worth of rows for each expert at most."""
    import engram.padded_experts as padded

    monkeypatch.setattr(padded, "CALL_FLOPS", 18 * 64 * 32 * 8)  # eight rows
    gate_EFD = torch.empty(64, 32, 64)
    for power in (0.0, 0.5, 1.0, 2.0):
        chances_E = (1.0 + torch.arange(64)) ** -power
        ids_NK = torch.multinomial(chances_E.expand(2048, -1), 4, generator=torch.Generator().manual_seed(3))
        chunks, _, _ = padded._lay_out(ids_NK, gate_EFD, 1)
        assert sum(chunk.tokens_nA.numel() for chunk in chunks) < ids_NK.numel() + 8 * 64
        assert max(len(chunk.experts_n) for chunk in chunks) <= padded.CHUNK
        if power == 0:
            assert len(chunks) < 32


@pytest.mark.parametrize("function", [*FAST, experts_loop])
def test_renumbering_the_experts_changes_nothing(function: Any) -> None:
    ids_NK = LOADS["spread"]
    x_ND, g_NK, *weights = expert_operands(ids_NK)
    order = torch.randperm(E, generator=torch.Generator().manual_seed(5))
    renumbered = order.argsort()[ids_NK]
    before = function(x_ND, g_NK, ids_NK, *weights)
    after = function(x_ND, g_NK, renumbered, *(w[order] for w in weights))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["fast", "loop"])
def test_experts_equal_transformers(backend: str) -> None:
    """DeepseekV3Experts with equal weights: outputs and gradients within 1e-5."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    ours = RoutedExperts(D, sizes())
    ours.backend = backend  # type: ignore[assignment]
    noise(ours)
    oracle = DeepseekV3Experts(
        DeepseekV3Config(hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=WIDTH)
    )
    oracle.gate_up_proj.data = torch.cat((ours.w_gate_EFD, ours.w_up_EFD), dim=1).detach().clone()
    oracle.down_proj.data = ours.w_down_EDF.detach().clone()
    ids_NK, x_ND, g_NK = spread_ids(), torch.randn(N, D), torch.rand(N, K)
    y_ours, y_oracle = ours(x_ND, g_NK, ids_NK), oracle(x_ND, ids_NK, g_NK)
    near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y_ours, y_oracle, **near)
    y_ours.square().sum().backward()
    y_oracle.square().sum().backward()
    gate_up = torch.cat((ours.w_gate_EFD.grad, ours.w_up_EFD.grad), dim=1)
    torch.testing.assert_close(gate_up, oracle.gate_up_proj.grad, **near)
    torch.testing.assert_close(ours.w_down_EDF.grad, oracle.down_proj.grad, **near)


def by_expert(weights_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """Weights [N, E]: the order in which a token's experts are listed means nothing."""
    return torch.zeros(len(ids_NK), E).scatter(-1, ids_NK, weights_NK)


def test_moe_equals_deepseek_v3() -> None:
    """Router (biased choice), experts and shared expert together: outputs and all gradients within 1e-5."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    ours = MoE(D, sizes(d_shared=2 * WIDTH, route_scale=2.5))
    noise(ours)
    oracle = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D,
            n_routed_experts=E,
            n_shared_experts=2,
            num_experts_per_tok=K,
            moe_intermediate_size=WIDTH,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=2.5,
        )
    )
    assert ours.shared is not None
    bias_E = 0.3 * torch.randn(E, generator=torch.Generator().manual_seed(6))
    ours.router.bias_E.copy_(bias_E)
    oracle.gate.e_score_correction_bias.copy_(bias_E)
    pairs = [
        (ours.router.router_ED, oracle.gate.weight),
        (ours.experts.w_down_EDF, oracle.experts.down_proj),
        (ours.shared.gate.weight, oracle.shared_experts.gate_proj.weight),
        (ours.shared.up.weight, oracle.shared_experts.up_proj.weight),
        (ours.shared.down.weight, oracle.shared_experts.down_proj.weight),
    ]
    for here, there in pairs:
        there.data.copy_(here)
    oracle.experts.gate_up_proj.data = torch.cat((ours.experts.w_gate_EFD, ours.experts.w_up_EFD), 1).detach().clone()
    x_ours = torch.randn(2, N // 2, D).requires_grad_()
    x_oracle = x_ours.detach().clone().requires_grad_()

    weights_NK, ids_NK = ours.router(x_ours.flatten(0, 1))
    _, oracle_weights_NK, oracle_ids_NK = oracle.gate(x_oracle)
    chosen = by_expert(weights_NK, ids_NK)
    torch.testing.assert_close(chosen, by_expert(oracle_weights_NK, oracle_ids_NK), rtol=1e-5, atol=1e-6)

    near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    y_ours, y_oracle = ours(x_ours), oracle(x_oracle)
    torch.testing.assert_close(y_ours, y_oracle, **near)
    direction = torch.randn_like(y_ours)
    (y_ours * direction).sum().backward()
    (y_oracle * direction).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_oracle.grad, **near)
    gate_up = torch.cat((ours.experts.w_gate_EFD.grad, ours.experts.w_up_EFD.grad), dim=1)
    torch.testing.assert_close(gate_up, oracle.experts.gate_up_proj.grad, **near)
    for here, there in pairs:
        assert there.grad.abs().max() > 1e-3
        torch.testing.assert_close(here.grad, there.grad, **near)


def router(**changes: Any) -> Router:
    module = Router(D, sizes(**changes))
    noise(module)
    return module


def test_weights_sum_to_the_route_scale() -> None:
    weights_NK, _ = router(route_scale=2.5)(torch.randn(N, D))
    torch.testing.assert_close(weights_NK.sum(-1), torch.full((N,), 2.5))


def test_bias_chooses_but_does_not_weigh() -> None:
    module, x_ND = router(), torch.randn(N, D)
    module.bias_E[4] = 10.0
    weights_NK, ids_NK = module(x_ND)
    assert (ids_NK == 4).any(-1).all()
    scores_NK = (x_ND @ module.router_ED.T).sigmoid().gather(-1, ids_NK)
    torch.testing.assert_close(weights_NK, scores_NK / scores_NK.sum(-1, keepdim=True))


def test_a_constant_bias_changes_nothing() -> None:
    module, x_ND = router(), torch.randn(N, D)
    before = by_expert(*module(x_ND))
    module.bias_E += 0.5
    torch.testing.assert_close(by_expert(*module(x_ND)), before)


def test_tokens_that_every_expert_scores_zero_get_finite_weights() -> None:
    module = router()
    module.router_ED.data.fill_(-1000.0)
    weights_NK, _ = module(torch.ones(N, D))
    assert weights_NK.isfinite().all()


def test_load_counts_every_choice_in_training_and_adds_up_over_batches() -> None:
    module, x_ND = router().train(), torch.randn(N, D)
    _, ids_NK = module(x_ND)
    module(x_ND)
    expected = [2.0 * int((ids_NK == e).sum()) for e in range(E)]
    assert module.load_E.tolist() == expected
    assert sum(expected) == 2 * N * K


def test_load_counters_stand_still_in_evaluation() -> None:
    module = router().eval()
    module(torch.randn(N, D))
    assert module.load_E.tolist() == [0.0] * E


def test_router_scores_in_fp32_under_autocast() -> None:
    module, x_ND = router(), torch.randn(N, D)
    exact = by_expert(*module(x_ND))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights_NK, ids_NK = module(x_ND)
    assert weights_NK.dtype == torch.float32
    torch.testing.assert_close(by_expert(weights_NK, ids_NK), exact)


def test_shared_experts_side_by_side_are_their_sum() -> None:
    wide, one, two = SwiGLU(D, 20), SwiGLU(D, 8), SwiGLU(D, 12)
    noise(wide)
    for part, columns in ((one, slice(0, 8)), (two, slice(8, 20))):
        part.gate.weight.data = wide.gate.weight[columns]
        part.up.weight.data = wide.up.weight[columns]
        part.down.weight.data = wide.down.weight[:, columns]
    x_ND = torch.randn(N, D)
    torch.testing.assert_close(wide(x_ND), one(x_ND) + two(x_ND), rtol=1e-5, atol=1e-6)


def test_a_layer_without_shared_experts_is_the_routed_sum_alone() -> None:
    module = MoE(D, sizes(d_shared=0))
    noise(module)
    x_BTD = torch.randn(2, N // 2, D)
    x_ND = x_BTD.flatten(0, 1)
    assert module.shared is None
    torch.testing.assert_close(module(x_BTD).flatten(0, 1), module.experts(x_ND, *module.router(x_ND)))


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 0.02)])
def test_backends_agree_inside_a_layer(autocast: bool, tolerance: float) -> None:
    """Relative to the norm."""
    module = MoE(D, sizes())
    noise(module)
    x_BTD = torch.randn(2, N // 2, D)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fast = module(x_BTD)
        module.experts.backend = "loop"
        plain = module(x_BTD)
    assert (fast - plain).norm() < tolerance * plain.norm()


@pytest.mark.parametrize("widths", [{"d_model": 36}, {"d_expert": 12}])
def test_widths_that_grouped_products_refuse_are_refused_in_the_config(widths: dict[str, int]) -> None:
    moe = sizes(d_expert=widths.get("d_expert", WIDTH))
    with pytest.raises(ValueError, match=rf"{next(iter(widths.values()))}.*multiples of 8"):
        tiny_config(d_model=widths.get("d_model", 32), moe=moe)


def test_experts_that_no_layer_would_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="lower n_dense_layers or drop moe"):
        tiny_config(n_dense_layers=3)
