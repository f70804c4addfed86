"""If these fail, models see the future or other documents, or cannot learn at all, and no loss can be believed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import BOS, VOCAB, awake_model, tiny_config, tiny_engram, tiny_model, tiny_tables, tokens_without_bos
from torch import Tensor

from engram.config import GQAConfig, MLAConfig, ModelConfig, OverEncodingConfig
from engram.memory import Engram
from engram.moe import RoutedExperts
from engram.transformer import Transformer

GQA_HEADS: dict[str, Any] = {"mla": None, "gqa": GQAConfig(n_heads=4, n_kv_heads=2, head_dim=8)}
LATENT_QUERY = MLAConfig(
    n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=16
)
OVER_ENCODING = OverEncodingConfig(tables=tiny_tables(n_slots=((31, 37, 41, 43),)))
CONFIGS = {
    "dense": tiny_config(moe=None),
    "moe": tiny_config(),
    "gqa": tiny_config(**GQA_HEADS),
    "query latent": tiny_config(mla=LATENT_QUERY),
    "four streams": tiny_config(n_streams=4),
    "engram": tiny_config(engram=tiny_engram()),
    "engram, four streams": tiny_config(engram=tiny_engram(), n_streams=4),
    "engram, no gate, no convolution": tiny_config(engram=tiny_engram(gate="none", conv_kernel=0)),
    "engram, gqa, dense": tiny_config(engram=tiny_engram(gate="sigmoid"), moe=None, **GQA_HEADS),
    "over-encoding": tiny_config(over_encoding=OVER_ENCODING),
}
T, CHANGED = 24, 9


def with_plain_experts(model: Transformer) -> Transformer:
    """Grouped products may round a token's sum differently when its neighbours change experts."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.backend = "loop"
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_token_changes_nothing_before_it_and_everything_after(name: str) -> None:
    """Logits before the change agree within 1e-5 of values of size one; all later ones move by far more."""
    model = with_plain_experts(awake_model(CONFIGS[name]))
    tokens_BT = tokens_without_bos(2, T)
    before = model(tokens_BT)
    tokens_BT[:, CHANGED] = (tokens_BT[:, CHANGED] + 20) % VOCAB
    difference_T = (model(tokens_BT) - before).abs().amax((0, 2))
    scale = before.abs().mean()
    assert difference_T[:CHANGED].max() < 1e-5 * scale
    assert difference_T[CHANGED:].min() > 1e-3 * scale


def memory_output(config: ModelConfig, tokens_BT: Tensor) -> Tensor:
    """What the first layer's Engram adds; it sees embeddings, n-grams and its own convolution, no attention."""
    model = awake_model(config)
    caught: list[Tensor] = []
    layer = model.get_submodule("blocks.0.engram")
    assert isinstance(layer, Engram)
    layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
    model(tokens_BT)
    return caught[0]


def two_pasts() -> tuple[Tensor, Tensor]:
    """Texts that differ up to position 9, where both begin the same document."""
    one, other = tokens_without_bos(2, T, seed=0), tokens_without_bos(2, T, seed=1)
    one[:, CHANGED] = BOS
    other[:, CHANGED:] = one[:, CHANGED:]
    return one, other


@pytest.mark.parametrize("n_streams", [1, 4])
def test_memory_sees_nothing_before_its_document(n_streams: int) -> None:
    config = tiny_config(engram=tiny_engram(), n_streams=n_streams)
    here, there = (memory_output(config, tokens_BT) for tokens_BT in two_pasts())
    assert torch.equal(here[:, CHANGED:], there[:, CHANGED:])
    assert not torch.equal(here[:, :CHANGED], there[:, :CHANGED])


def test_memory_crosses_documents_where_the_switch_is_off() -> None:
    """Windows reach the two tokens before; the convolution of dilation 3 carries them 9 further, and no more."""
    config = tiny_config(engram=tiny_engram(tables=tiny_tables(stop_at_documents=False)))
    here, there = (memory_output(config, tokens_BT) for tokens_BT in two_pasts())
    moved_T = (here != there).flatten(2).any(-1).any(0)
    assert moved_T[CHANGED : CHANGED + 11].all()
    assert not moved_T[CHANGED + 11 :].any()


def test_each_memory_layer_reads_its_own_rows() -> None:
    model = tiny_model(tiny_config(engram=tiny_engram()))
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Engram):
            module.register_forward_hook(lambda m, inputs, output, name=name: seen.update({name: inputs[1]}))
    tokens_BT = tokens_without_bos(2, T)
    model(tokens_BT)
    assert model.hasher is not None
    rows = model.hasher(tokens_BT, None)
    assert set(seen) == {"blocks.0.engram", "blocks.2.engram"}
    assert torch.equal(seen["blocks.0.engram"], rows[0])
    assert torch.equal(seen["blocks.2.engram"], rows[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_the_cross_entropy_of_the_logits(name: str) -> None:
    model = awake_model(CONFIGS[name])
    text = tokens_without_bos(3, T + 1)
    tokens_BT, targets_BT = text[:, :-1], text[:, 1:]
    expected = F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten())
    torch.testing.assert_close(model(tokens_BT, targets_BT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = awake_model(CONFIGS[name]).train()
    text = tokens_without_bos(8, 65)
    model(text[:, :-1], text[:, 1:]).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", ["dense", "moe", "engram, four streams", "over-encoding"])
def test_a_tiny_model_learns_a_batch_by_heart(name: str) -> None:
    """Below 0.1 nats (from ln 64 = 4.2) in 100 steps of plain Adam."""
    model = tiny_model(CONFIGS[name])
    text = tokens_without_bos(4, 17)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(text[:, :-1], text[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("name", ["moe", "engram, four streams"])
def test_loss_under_bf16_autocast_is_near_fp32(name: str) -> None:
    """At initial weights, within half a percent."""
    model = tiny_model(CONFIGS[name])
    text = tokens_without_bos(4, 33)
    exact = model(text[:, :-1], text[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(text[:, :-1], text[:, 1:])
    assert rough.item() == pytest.approx(exact.item(), rel=0.005)


def test_random_lookups_depend_on_the_draws_and_text_lookups_do_not() -> None:
    text = awake_model(tiny_config(engram=tiny_engram()))
    blind = awake_model(tiny_config(engram=tiny_engram(tables=tiny_tables(lookup="random"))))
    tokens_BT = tokens_without_bos(2, T)
    one, two = torch.tensor([1, 2]), torch.tensor([3, 4])
    assert torch.equal(text(tokens_BT, draws_B=one), text(tokens_BT, draws_B=two))
    assert torch.equal(blind(tokens_BT, draws_B=one), blind(tokens_BT, draws_B=one))
    assert not torch.allclose(blind(tokens_BT, draws_B=one), blind(tokens_BT, draws_B=two), atol=1e-3)


def test_sparse_table_gradients_leave_loss_and_all_gradients_alone() -> None:
    text = tokens_without_bos(2, T + 1)
    gradients = []
    for sparse in (False, True):
        model = awake_model(tiny_config(engram=tiny_engram()))
        model.set_sparse_tables(sparse)
        model(text[:, :-1], text[:, 1:]).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    dense, sparse_ = gradients
    assert [n for n, g in sparse_.items() if g is not None and g.is_sparse] == [
        "blocks.0.engram.tables.table_SP",
        "blocks.2.engram.tables.table_SP",
    ]
    for name, gradient in dense.items():
        other = sparse_[name]
        assert other is not None
        torch.testing.assert_close(other.to_dense() if other.is_sparse else other, gradient)


def test_equal_weights_and_text_give_bitwise_equal_losses() -> None:
    text = tokens_without_bos(4, 33)
    losses = [tiny_model(CONFIGS["engram, four streams"])(text[:, :-1], text[:, 1:]).item() for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("compressed", "got"), [(None, "none"), (VOCAB - 1, "63")])
def test_a_memory_without_canonical_ids_for_every_token_is_refused(compressed: int | None, got: str) -> None:
    ids = None if compressed is None else torch.arange(compressed).numpy()
    with pytest.raises(ValueError, match=rf"all {VOCAB} tokens, got {got}"):
        Transformer(tiny_config(engram=tiny_engram()), ids)


def test_a_pad_token_outside_the_vocabulary_is_refused() -> None:
    config = tiny_config(engram=tiny_engram(tables=tiny_tables(pad_id=VOCAB)))
    with pytest.raises(ValueError, match="pad_id=64"):
        tiny_model(config)


def test_a_bos_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="bos_id=64"):
        replace(tiny_config(), bos_id=VOCAB)


def test_without_fusion_a_single_stream_computes_the_same() -> None:
    """x + E(x) + attention(x + E(x)), in one sub-layer or in two: the switch concerns several streams only."""
    tokens = tokens_without_bos(2, 12)
    losses = []
    for one_stream in (None, True):
        model = awake_model(tiny_config(engram=tiny_engram(one_stream=one_stream)))
        losses.append(model(tokens[:, :-1], tokens[:, 1:]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_without_fusion_memory_is_read_and_written_where_attention_is() -> None:
    """With H_pre that reads stream 0 alone and H_post that writes to stream 0 alone, no other stream gets memory."""
    config = tiny_config(n_streams=3, engram=tiny_engram(one_stream=True, layer_ids=(0, 1)))
    block = awake_model(config).blocks[0]
    residual = block.residual_attention
    with torch.no_grad():
        residual.stream_phi.zero_()
        residual.stream_bias[:6] = torch.tensor([20.0, -20, -20, 20, -20, -20])  # type: ignore[index]
        residual.stream_bias[6:] = (torch.eye(3) * 40).flatten()  # type: ignore[index]
    x_BTMD = torch.randn(2, 5, 3, config.d_model)
    rows_BTG = torch.randint(0, 31, (2, 5, 4))
    seen = []
    block.residual_ffn = torch.nn.Module()
    block.residual_ffn.forward = lambda x, _: seen.append(x) or x  # type: ignore[assignment]
    block(x_BTMD, torch.zeros(5, 4), rows_BTG, None)
    moved = (seen[0] - x_BTMD).abs().amax((0, 1, 3))
    assert moved[0] > 0.1
    assert moved[1:].max() < 1e-4


@pytest.mark.parametrize("n_streams", [1, 2])
def test_a_model_cast_to_bf16_stays_in_it_and_near_itself(n_streams: int) -> None:
    """As `from_pretrained(dtype=torch.bfloat16)` loads it; logits within 5 percent of their norm."""
    model = tiny_model(tiny_config(engram=tiny_engram(), n_streams=n_streams)).eval()
    tokens_BT = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens_BT)
        rough = model.bfloat16()(tokens_BT)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()
