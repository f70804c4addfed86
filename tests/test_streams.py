"""If these fail, the residual streams are not mHC, or M = 1 is not the ordinary residual that it is compared with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import tiny_config, tiny_model
from torch import Tensor

from engram.initialise import init_weights
from engram.streams import HyperConnection, PlainResidual, build_residual

B, T, D = 2, 11, 32


def connection(n_streams: int = 4, seed: int = 0, noise: float = 0.5) -> HyperConnection:
    module = build_residual(tiny_config(n_streams=n_streams))
    assert isinstance(module, HyperConnection)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = noise * torch.randn(parameter.shape, generator=generator)
    module.stream_phi.data /= module.stream_phi.shape[1] ** 0.5
    return module


def sublayer() -> Callable[[Tensor], Tensor]:
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(9)) / D**0.5
    return lambda x_BTD: torch.tanh(x_BTD @ weight)


@pytest.mark.parametrize("n_streams", [2, 4])
def test_connection_equals_deepseek_v4(n_streams: int) -> None:
    """Reading, writing and mixing as in DeepseekV4DecoderLayer: outputs and gradients within 1e-5 in fp32."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    ours, f = connection(n_streams), sublayer()
    oracle = DeepseekV4HyperConnection(
        DeepseekV4Config(hidden_size=D, hc_mult=n_streams, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6)
    )
    pairs = [(ours.stream_phi, oracle.fn), (ours.stream_bias, oracle.base), (ours.stream_alpha, oracle.scale)]
    for here, there in pairs:
        there.data.copy_(here)
    x_ours = torch.randn(B, T, n_streams, D).requires_grad_()
    x_oracle = x_ours.detach().clone().requires_grad_()

    y_ours = ours(x_ours, f)
    post, comb, collapsed = oracle(x_oracle)
    y_oracle = post.unsqueeze(-1) * f(collapsed).unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x_oracle)
    near: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y_ours, y_oracle, **near)
    H_pre, H_post, H_res = ours.maps(x_ours)
    torch.testing.assert_close(H_post, post, **near)
    torch.testing.assert_close(H_res, comb, **near)
    torch.testing.assert_close((H_pre[..., None] * x_ours).sum(2), collapsed, **near)

    direction = torch.randn_like(y_ours)
    (y_ours * direction).sum().backward()
    (y_oracle * direction).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_oracle.grad, **near)
    for here, there in pairs:
        assert there.grad.abs().max() > 0.01
        torch.testing.assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-4)


def test_mixing_matrices_are_doubly_stochastic() -> None:
    """After 20 Sinkhorn rounds of scores of size one: rows within 1e-3, columns, normalised last, within 1e-5."""
    *_, H_res = connection(noise=1.0).maps(torch.randn(B, T, 4, D))
    assert (H_res >= 0).all()
    torch.testing.assert_close(H_res.sum(-1), torch.ones(B, T, 4), rtol=0, atol=1e-3)
    torch.testing.assert_close(H_res.sum(-2), torch.ones(B, T, 4), rtol=0, atol=1e-5)
    assert (H_res - 0.25).abs().max() > 0.2


def test_mixing_keeps_the_mean_of_the_streams() -> None:
    x_BTMD = torch.randn(B, T, 4, D)
    y_BTMD = connection()(x_BTMD, torch.zeros_like)
    torch.testing.assert_close(y_BTMD.mean(2), x_BTMD.mean(2), rtol=0, atol=1e-3)
    assert not torch.allclose(y_BTMD, x_BTMD, atol=0.1)


def test_one_stream_is_a_plain_residual_without_parameters() -> None:
    module, f = build_residual(tiny_config(n_streams=1)), sublayer()
    assert isinstance(module, PlainResidual)
    assert list(module.parameters()) == []
    x_BTMD = torch.randn(B, T, 1, D)
    assert torch.equal(module(x_BTMD, f)[:, :, 0], x_BTMD[:, :, 0] + f(x_BTMD[:, :, 0]))


def test_four_streams_start_as_a_plain_residual() -> None:
    """Equal streams stay equal and follow x + F(x) to one percent: alpha = 0.01 leaves a small input-dependence."""
    model = tiny_model(tiny_config(n_streams=4))
    module, f = model.get_submodule("blocks.0.residual_ffn"), sublayer()
    x_BTD = torch.randn(B, T, D)
    y_BTMD = module(x_BTD[:, :, None].expand(-1, -1, 4, -1), f)
    plain = x_BTD + f(x_BTD)
    for m in range(4):
        assert (y_BTMD[:, :, m] - plain).norm() < 0.01 * plain.norm()


def test_a_model_of_four_streams_starts_near_the_model_of_one() -> None:
    one, four = tiny_model(tiny_config()), tiny_model(tiny_config(n_streams=4))
    tokens_BT = torch.randint(0, 64, (B, T))
    a, b = one(tokens_BT), four(tokens_BT)
    assert (a - b).norm() < 0.05 * a.norm()


def test_streams_stay_in_fp32_under_autocast() -> None:
    """The residual is the model's memory over layers: mixing it in bf16 would round it twice a layer."""
    module = connection()
    x_BTMD = torch.randn(B, T, 4, D)
    exact = module(x_BTMD, torch.zeros_like)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = module(x_BTMD, torch.zeros_like)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=1e-6, atol=1e-6)


def test_connection_of_each_sublayer_is_its_own() -> None:
    model = tiny_model(tiny_config(n_streams=2))
    init_weights(model, seed=0)
    phis = [m.stream_phi for m in model.modules() if isinstance(m, HyperConnection)]
    assert len(phis) == 6
    assert all(not torch.equal(a, b) for i, a in enumerate(phis) for b in phis[:i])
