"""If these fail, Engram computes something else than the paper's section 2, or lets text leak backwards or across
documents, or OverEncoding is no fair baseline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, tiny_engram, tiny_model, tiny_tables
from torch import Tensor, nn

from engram.config import OverEncodingConfig
from engram.counting import count_params
from engram.memory import Engram, NgramTables, OverEncoding, ShortConvolution

B, T, M, D, Q = 2, 17, 4, 32, 16


def random_(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fill(module: nn.Module, scale: float = 0.5) -> None:
    """Put noise into every parameter: gains near one, all others around zero."""
    for i, (name, parameter) in enumerate(module.named_parameters()):
        noise = scale * random_(*parameter.shape, seed=i)
        parameter.data = 1 + noise if name.endswith("gain") else noise


def engram_layer(n_streams: int = M, layer: int = 0, **changes: Any) -> Engram:
    module = Engram(tiny_engram(**changes), layer, d_model=D, n_streams=n_streams)
    fill(module)
    return module


def some_rows(seed: int = 0) -> Tensor:
    return torch.randint(0, 31, (B, T, 4), generator=torch.Generator().manual_seed(seed))


class GivenRows(nn.Module):
    """Stands where the oracle hashes: returns the rows that our tables gave."""

    rows_BTQ: Tensor

    def forward(self, input_ids: Tensor, cache: None) -> Tensor:
        return self.rows_BTQ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_engram_equals_the_transformers_ple_layer(dtype: torch.dtype) -> None:
    """Outputs and gradients of Qwen4ExpTextPLELayer with equal weights; within 1e-5 in fp32 and 1e-5 in fp64,
    where the oracle's norm stays in fp32."""
    pytest.importorskip("transformers")
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    ours = engram_layer().to(dtype)
    oracle = Qwen4ExpTextPLELayer(
        Qwen4ExpTextConfig(
            hidden_size=D,
            hc_count=M,
            ple_embed_dim=Q,
            ple_layer_ids=[1],
            ngram_size=3,
            heads_per_ngram=2,
            ngram_vocab_size_base=31,
            num_hidden_layers=4,
            rms_norm_eps=1e-6,
            eos_token_id=0,
        ),
        layer_idx=0,
        ple_layer_index=0,
    ).to(dtype)
    assert ours.conv is not None
    oracle.ple_embedding = given = GivenRows()
    with torch.no_grad():
        oracle.key_proj.weight.copy_(ours.w_key_MDQ.flatten(0, 1))
        oracle.value_proj.weight.copy_(ours.w_value_DQ)
        # Its gain is 1 + weight; its first tap is the oldest.
        oracle.norm_key.weight.copy_(ours.norm_key.gain.flatten() - 1)
        oracle.norm_query.weight.copy_(ours.norm_query.gain.flatten() - 1)
        oracle.norm_conv.weight.copy_(ours.norm_conv.gain.flatten() - 1)
        oracle.conv1d.weight.copy_(ours.conv.conv_JMD.flip(0).flatten(1).T[:, None])

    h_BTMD, rows_BTG = random_(B, T, M, D, seed=50).to(dtype), some_rows()
    h_ours, h_oracle = h_BTMD.clone().requires_grad_(), h_BTMD.clone().requires_grad_()
    given.rows_BTQ = e_BTQ = ours.tables(rows_BTG).detach().requires_grad_()

    y_ours = ours(h_ours, rows_BTG, None)
    y_oracle = oracle(h_oracle.flatten(2), torch.zeros(B, T, dtype=torch.long), None).unflatten(-1, (M, D))
    torch.testing.assert_close(y_ours, y_oracle, rtol=1e-5, atol=1e-5)

    direction = random_(B, T, M, D, seed=51).to(dtype)
    (y_ours * direction).sum().backward()
    (y_oracle * direction).sum().backward()
    near: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(h_ours.grad, h_oracle.grad, **near)
    pairs = [
        (ours.w_key_MDQ.grad.flatten(0, 1), oracle.key_proj.weight.grad),
        (ours.w_value_DQ.grad, oracle.value_proj.weight.grad),
        (ours.norm_key.gain.grad.flatten(), oracle.norm_key.weight.grad),
        (ours.norm_query.gain.grad.flatten(), oracle.norm_query.weight.grad),
        (ours.norm_conv.gain.grad.flatten(), oracle.norm_conv.weight.grad),
        (ours.conv.conv_JMD.grad.flip(0).flatten(1).T[:, None], oracle.conv1d.weight.grad),
        (ours.tables.table_SP.grad, table_grad(e_BTQ.grad, rows_BTG, ours.tables.table_SP)),
    ]
    for here, there in pairs:
        assert there.abs().max() > 0.1
        torch.testing.assert_close(here, there, **near)


def table_grad(e_grad_BTQ: Tensor, rows_BTG: Tensor, table_SP: Tensor) -> Tensor:
    """Gradient of the table from that of the rows read."""
    return torch.zeros_like(table_SP).index_add(0, rows_BTG.flatten(), e_grad_BTQ.reshape(-1, table_SP.shape[1]))


def slow_gate(module: Engram, h: Tensor, e: Tensor, stream: int) -> float:
    """Eq. 4 for one token and one stream, with plain sums."""
    key = module.w_key_MDQ[stream] @ e

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean() + 1e-6).sqrt() * gain

    score = normed(h, module.norm_query.gain[stream]) @ normed(key, module.norm_key.gain[stream]) / D**0.5
    if module.gate == "signed_sqrt":
        score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
    return float(1 / (1 + torch.exp(-score)))


@pytest.mark.parametrize("gate", ["signed_sqrt", "sigmoid", "none"])
def test_gate_equals_equation_4_per_token_and_stream(gate: str) -> None:
    module = engram_layer(gate=gate, conv_kernel=0)
    h_BTMD, rows_BTG = random_(B, T, M, D), some_rows()
    with torch.no_grad():
        y_BTMD = module(h_BTMD, rows_BTG, None)
        for t, m in ((0, 0), (5, 2), (16, 3)):
            e = torch.cat([module.tables.table_SP[row] for row in rows_BTG[1, t]])
            alpha = 1.0 if gate == "none" else slow_gate(module, h_BTMD[1, t, m], e, m)
            torch.testing.assert_close(y_BTMD[1, t, m], alpha * (module.w_value_DQ @ e), rtol=1e-4, atol=1e-5)


def test_gate_has_finite_gradients_where_the_score_is_zero() -> None:
    module = engram_layer(conv_kernel=0)
    h_BTMD = torch.zeros(B, T, M, D, requires_grad=True)
    module(h_BTMD, some_rows(), None).sum().backward()
    assert h_BTMD.grad is not None
    assert h_BTMD.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("length", [1, 3, 4, 9, 10, 40])
def test_convolution_equals_torchs_depthwise_dilated_one(length: int) -> None:
    conv = ShortConvolution(M, D, kernel=4, dilation=3)
    fill(conv)
    x_BTMD = random_(B, length, M, D)
    x_BCT = F.pad(x_BTMD.flatten(2).transpose(1, 2), (9, 0))
    weight = conv.conv_JMD.flip(0).flatten(1).T[:, None]
    expected = F.conv1d(x_BCT, weight, dilation=3, groups=M * D).transpose(1, 2).unflatten(-1, (M, D))
    torch.testing.assert_close(conv(x_BTMD, None), expected, rtol=1e-5, atol=1e-5)


def test_convolution_of_a_packed_sequence_is_that_of_each_document_alone() -> None:
    conv = ShortConvolution(M, D, kernel=4, dilation=3)
    fill(conv)
    x_BTMD, lengths = random_(B, T, M, D), (5, 1, 11)
    documents_BT = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(B, -1)
    alone = torch.cat([conv(x, None) for x in x_BTMD.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(conv(x_BTMD, documents_BT), alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(conv(x_BTMD, None), alone, atol=0.1)


def test_a_zero_convolution_adds_nothing() -> None:
    with_conv, without = engram_layer(), engram_layer(conv_kernel=0)
    without.load_state_dict(with_conv.state_dict(), strict=False)
    assert with_conv.conv is not None
    with_conv.conv.conv_JMD.data.zero_()
    h_BTMD, rows_BTG = random_(B, T, M, D), some_rows()
    assert torch.equal(with_conv(h_BTMD, rows_BTG, None), without(h_BTMD, rows_BTG, None))


def test_dilation_is_the_longest_order() -> None:
    tables = tiny_tables(ngram_orders=(2, 5))
    module = engram_layer(tables=tables)
    assert module.conv is not None
    h_BTMD = random_(1, T, M, D)
    rows_BTG = some_rows()[:1]
    before = module(h_BTMD, rows_BTG, None)
    rows_BTG[0, 0] += 1
    changed = (before != module(h_BTMD, rows_BTG, None)).any(-1).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [0, 5, 10, 15]


def test_each_layer_reads_its_own_number_of_rows() -> None:
    tables = tiny_tables()
    assert NgramTables(tables, 0).table_SP.shape == (31 + 37 + 41 + 43, 4)
    assert NgramTables(tables, 1).table_SP.shape == (47 + 53 + 59 + 61, 4)


def test_sparse_table_gradients_equal_dense_ones() -> None:
    tables = NgramTables(tiny_tables(), 0)
    fill(tables)
    direction, rows_BTG = random_(B, T, Q), some_rows()
    (tables(rows_BTG) * direction).sum().backward()
    dense = tables.table_SP.grad
    tables.table_SP.grad, tables.sparse_grad = None, True
    (tables(rows_BTG) * direction).sum().backward()
    sparse = tables.table_SP.grad
    assert dense is not None
    assert sparse is not None
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), dense)


def test_over_encoding_averages_embedding_and_projected_ngrams() -> None:
    tables = tiny_tables(n_slots=((31, 37, 41, 43),))
    module = OverEncoding(OverEncodingConfig(tables=tables), D)
    fill(module)
    x_BTD, rows_BTG = random_(B, T, D), some_rows()
    y_BTD = module(x_BTD, rows_BTG)
    for t in (0, 9):
        e = [module.tables.table_SP[row] for row in rows_BTG[1, t]]
        two, three = torch.cat(e[:2]), torch.cat(e[2:])
        expected = (x_BTD[1, t] + module.w_up_ODQ[0] @ two + module.w_up_ODQ[1] @ three) / 3
        torch.testing.assert_close(y_BTD[1, t], expected, rtol=1e-5, atol=1e-5)


def test_streams_share_tables_and_value_but_not_keys_norms_and_taps() -> None:
    one = dict(engram_layer(n_streams=1).named_parameters())
    four = dict(engram_layer(n_streams=4).named_parameters())
    shared = {name for name in one if one[name].shape == four[name].shape}
    assert shared == {"tables.table_SP", "w_value_DQ"}
    assert all(four[name].numel() == 4 * one[name].numel() for name in one.keys() - shared)


def test_engram_without_gate_and_convolution_is_a_linear_map_of_the_rows() -> None:
    module = engram_layer(gate="none", conv_kernel=0)
    assert {name for name, _ in module.named_parameters()} == {"tables.table_SP", "w_value_DQ"}
    h_BTMD, rows_BTG = random_(B, T, M, D), some_rows()
    y_BTMD = module(h_BTMD, rows_BTG, None)
    expected = (module.tables.table_SP[rows_BTG].flatten(2) @ module.w_value_DQ.T)[:, :, None].expand(B, T, M, D)
    torch.testing.assert_close(y_BTMD, expected, rtol=1e-5, atol=1e-5)


def test_without_fusion_one_gate_serves_all_streams_and_counts_as_one() -> None:
    config = tiny_config(n_streams=M, engram=tiny_engram(one_stream=True))
    model = tiny_model(config)
    assert model.get_parameter("blocks.0.engram.w_key_MDQ").shape == (1, D, Q)
    built = sum(p.numel() for p in model.parameters())
    assert built == count_params(config).total
    fused = count_params(tiny_config(n_streams=M, engram=tiny_engram())).memory_module
    assert count_params(config).memory_module < fused


def test_a_layer_cast_to_bf16_returns_bf16() -> None:
    h_BTMD = random_(B, T, M, D).bfloat16()
    assert engram_layer().bfloat16()(h_BTMD, some_rows(), None).dtype == torch.bfloat16
