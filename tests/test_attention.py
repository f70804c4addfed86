"""If these fail, attention is not DeepSeek-V3's MLA or Llama's GQA, or sees the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_config
from torch import Tensor, nn

from engram.attention import GQA, MLA, build_attention, rope_angles, rope_width, rotate
from engram.config import GQAConfig, MLAConfig, ModelConfig

B, T, D = 2, 13, 32
NEAR: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order."""


def attention_and_angles(config: ModelConfig, theta: float = 10_000.0) -> tuple[MLA | GQA, Tensor]:
    torch.manual_seed(0)
    module = build_attention(config)
    for name, parameter in module.named_parameters():
        if name.endswith("gain"):
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape)
    return module, rope_angles(T, rope_width(config), theta, torch.device("cpu"))


def causal_mask() -> Tensor:
    return torch.full((T, T), float("-inf")).triu(1)[None, None]


def compare(ours: nn.Module, angles_TC: Tensor, oracle: nn.Module, names: dict[str, str], rotary: nn.Module) -> None:
    """Copy the weights over, then compare outputs and the gradients of the input and of every weight."""
    here, there = dict(ours.named_parameters()), dict(oracle.named_parameters())
    assert set(names) == set(here)
    assert set(names.values()) == set(there)
    for name, other in names.items():
        there[other].data.copy_(here[name])
    x_ours = torch.randn(B, T, D).requires_grad_()
    x_oracle = x_ours.detach().clone().requires_grad_()
    y_ours = ours(x_ours, angles_TC)
    y_oracle, _ = oracle(x_oracle, rotary(x_oracle, torch.arange(T)[None]), causal_mask())
    torch.testing.assert_close(y_ours, y_oracle, **NEAR)
    direction = torch.randn_like(y_ours)
    (y_ours * direction).sum().backward()
    (y_oracle * direction).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_oracle.grad, **NEAR)
    for name, other in names.items():
        assert there[other].grad.abs().max() > 1e-3
        torch.testing.assert_close(here[name].grad, there[other].grad, **NEAR, msg=name)


@pytest.mark.parametrize("q_lora_rank", [None, 24], ids=["straight queries", "query latent"])
@pytest.mark.parametrize("nope", [8, 0], ids=["with nope", "all rotary"])
def test_mla_equals_deepseek_v3(q_lora_rank: int | None, nope: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

    widths: dict[str, Any] = {
        "kv_lora_rank": 16,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": 6,
        "v_head_dim": 12,
        "q_lora_rank": q_lora_rank,
    }
    module, angles_TC = attention_and_angles(tiny_config(mla=MLAConfig(n_heads=4, **widths)), theta=500.0)
    config = DeepseekV3Config(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_interleave=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
        **widths,
    )
    names = {
        "kv_down.weight": "kv_a_proj_with_mqa.weight",
        "norm_kv.gain": "kv_a_layernorm.weight",
        "kv_up.weight": "kv_b_proj.weight",
        "out.weight": "o_proj.weight",
    }
    if q_lora_rank is None:
        names |= {"q.weight": "q_proj.weight"}
    else:
        names |= {
            "q_down.weight": "q_a_proj.weight",
            "norm_q.gain": "q_a_layernorm.weight",
            "q.weight": "q_b_proj.weight",
        }
    compare(module, angles_TC, DeepseekV3Attention(config, layer_idx=0), names, DeepseekV3RotaryEmbedding(config))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_gqa_equals_llama(n_kv_heads: int) -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    gqa = GQAConfig(n_heads=4, n_kv_heads=n_kv_heads, head_dim=10)
    module, angles_TC = attention_and_angles(tiny_config(mla=None, gqa=gqa))
    config = LlamaConfig(
        hidden_size=D,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        head_dim=10,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )
    names = {f"{name}.weight": f"{name}_proj.weight" for name in "qkv"}
    names |= {"out.weight": "o_proj.weight"}
    compare(module, angles_TC, LlamaAttention(config, layer_idx=0), names, LlamaRotaryEmbedding(config))


GQA_CONFIG = tiny_config(mla=None, gqa=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=8))


@pytest.mark.parametrize("config", [tiny_config(), GQA_CONFIG], ids=["mla", "gqa"])
def test_a_changed_token_changes_nothing_before_it_and_something_after(config: ModelConfig) -> None:
    module, angles_TC = attention_and_angles(config)
    x_BTD = torch.randn(B, T, D)
    before = module(x_BTD, angles_TC)
    x_BTD[:, 6] += 1
    after = module(x_BTD, angles_TC)
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=0, atol=1e-6)
    assert ((after - before)[:, 6:].abs().amax((0, 2)) > 1e-3).all()


def test_rotation_equals_multiplication_of_complex_numbers() -> None:
    x_BTHC = torch.randn(B, T, 3, 8, dtype=torch.float64)
    angles_TC = rope_angles(T, 8, 10_000.0, torch.device("cpu"))
    numbers = torch.complex(x_BTHC[..., :4], x_BTHC[..., 4:])
    turned = numbers * torch.polar(torch.ones(T, 1, 4, dtype=torch.float64), angles_TC[:, None].double())
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x_BTHC, angles_TC), expected, rtol=1e-6, atol=1e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    angles_TC = rope_angles(200, 8, 10_000.0, torch.device("cpu"))
    q, k = torch.randn(1, 1, 1, 8).expand(1, 200, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 200, 1, 8)
    scores_TT = torch.einsum("bthc,bshc->ts", rotate(q, angles_TC), rotate(k, angles_TC))
    for distance in (0, 1, 17):
        along = scores_TT.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=1e-4)
    assert (scores_TT.diagonal(-17)[0] - scores_TT.diagonal(0)[0]).abs() > 1e-2


def test_attention_under_bf16_autocast_is_near_fp32() -> None:
    """bf16 keeps 8 bits: 2 percent of the output's size."""
    module, angles_TC = attention_and_angles(tiny_config())
    x_BTD = torch.randn(B, T, D)
    exact = module(x_BTD, angles_TC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = module(x_BTD, angles_TC)
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()
