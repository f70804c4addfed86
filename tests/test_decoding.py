"""If these fail, generated text differs from what the model would say to the whole text: the past was kept wrongly."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import BOS, VOCAB, awake_model, tiny_config, tiny_engram, tiny_tables, tokens_without_bos
from test_transformer import CONFIGS, with_plain_experts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engram.config import ModelConfig
from engram.decoding import DecodeState
from engram.stored_tables import StoredTables, store_tables
from engram.transformer import Transformer

ARMS = CONFIGS | {
    "random lookups": tiny_config(engram=tiny_engram(tables=tiny_tables(lookup="random"))),
    "windows cross documents": tiny_config(engram=tiny_engram(tables=tiny_tables(stop_at_documents=False))),
    "without fusion, four streams": tiny_config(engram=tiny_engram(one_stream=True), n_streams=4),
    "order five, four streams": tiny_config(engram=tiny_engram(tables=tiny_tables(ngram_orders=(2, 5))), n_streams=4),
}
B, T = 3, 31
NEAR = {"rtol": 1e-4, "atol": 1e-4}
"""Of logits of size one to ten: attention over cached keys sums in another order."""


def text_of_documents(batch: int = B, length: int = T) -> Tensor:
    """Tokens with documents that begin at different places, one inside the convolution's reach of another."""
    tokens_BT = tokens_without_bos(batch, length)
    tokens_BT[0, [0, 7, 9, 20]] = BOS
    tokens_BT[1, 13] = BOS
    return tokens_BT


def plain(config: ModelConfig) -> Transformer:
    return with_plain_experts(awake_model(config))


def in_chunks(model: Transformer, tokens_BT: Tensor, sizes: list[int], n_padding_B: Tensor | None = None) -> Tensor:
    state = DecodeState(model.config, n_padding_B)
    assert sum(sizes) == tokens_BT.shape[1]
    return torch.cat([model(chunk_BT, state=state) for chunk_BT in tokens_BT.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("sizes", [[1] * T, [5, 1, 1, 1, 9, 2, 12], [30, 1]], ids=["tokens", "chunks", "prompt"])
@pytest.mark.parametrize("name", ARMS)
def test_reading_in_chunks_gives_the_logits_of_reading_at_once(name: str, sizes: list[int]) -> None:
    model, tokens_BT = plain(ARMS[name]), text_of_documents()
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(model, tokens_BT, sizes), model(tokens_BT), **NEAR)


@pytest.mark.parametrize("name", ARMS)
def test_the_first_chunk_is_computed_as_in_training_to_the_bit(name: str) -> None:
    model, tokens_BT = awake_model(ARMS[name]), text_of_documents()
    with torch.no_grad():
        assert torch.equal(model(tokens_BT, state=DecodeState(model.config)), model(tokens_BT))


@pytest.mark.parametrize("sizes", [[T], [4, 9, 1, 1, 16]], ids=["at once", "chunks"])
@pytest.mark.parametrize("name", ARMS)
def test_padding_on_the_left_changes_nothing(name: str, sizes: list[int]) -> None:
    """Each sequence of a padded batch against itself alone; one is padded beyond the first chunk."""
    model, text_BT = plain(ARMS[name]), text_of_documents()
    n_padding_B = torch.tensor([0, 3, 11])
    padded_BT = torch.full((B, T), BOS)  # the worst padding: a token that means something
    for row, n_padding in enumerate(n_padding_B.tolist()):
        padded_BT[row, n_padding:] = text_BT[row, : T - n_padding]
    draws_B = torch.arange(B)
    state = DecodeState(model.config, n_padding_B)
    with torch.no_grad():
        got = torch.cat([model(x, draws_B=draws_B, state=state) for x in padded_BT.split(sizes, dim=1)], dim=1)
        assert got.isfinite().all()
        for row, n_padding in enumerate(n_padding_B.tolist()):
            alone = model(text_BT[row : row + 1, : T - n_padding], draws_B=draws_B[row : row + 1])
            torch.testing.assert_close(got[row : row + 1, n_padding:], alone, **NEAR)


@pytest.mark.parametrize("lost", ["keys_BSHC", "inputs_BRMD", "tokens_BR", "documents_BR"])
def test_every_part_of_the_past_matters(lost: str) -> None:
    """The tests above could not fail if a part were never read: forgetting it moves the next logits."""
    model, tokens_BT = plain(ARMS["engram, four streams"]), text_of_documents()
    expected = model(tokens_BT)[:, -1]
    state = DecodeState(model.config)
    model(tokens_BT[:, :-1], state=state)
    if lost == "keys_BSHC":
        state.layers[1].keys_BSHC = torch.zeros_like(state.layers[1].keys_BSHC)  # type: ignore[arg-type]
    elif lost == "inputs_BRMD":
        state.layers[2].inputs_BRMD = torch.zeros_like(state.layers[2].inputs_BRMD)  # type: ignore[arg-type]
    elif lost == "tokens_BR":
        state.tokens_BR = (state.tokens_BR + 6) % VOCAB
    else:
        state.documents_BR = state.documents_BR + 1
    got = model(tokens_BT[:, -1:], state=state)[:, 0]
    assert (got - expected).abs().max() > 1e-2


def test_sequences_can_be_chosen_and_repeated_as_beam_search_does() -> None:
    model, tokens_BT = plain(ARMS["engram, four streams"]), text_of_documents()
    padding_B, order_B = torch.tensor([2, 0, 5]), torch.tensor([2, 0, 2])
    straight, turned = DecodeState(model.config, padding_B[order_B]), DecodeState(model.config, padding_B)
    with torch.no_grad():
        model(tokens_BT[order_B, :-1], state=straight)
        model(tokens_BT[:, :-1], state=turned)
        turned.select(order_B)
        last_B1 = tokens_BT[order_B, -1:]
        torch.testing.assert_close(model(last_B1, state=turned), model(last_B1, state=straight), **NEAR)


def test_the_past_of_the_memory_does_not_grow_with_the_text() -> None:
    """Three taps of dilation 3 reach nine tokens back, whatever was read."""
    model = plain(ARMS["engram"])
    state = DecodeState(model.config)
    for chunk_BT in tokens_without_bos(2, 60).split(6, dim=1):
        model(chunk_BT, state=state)
    assert state.tokens_BR.shape == (2, 9 + 6)
    inputs_BRMD, keys_BSHC = state.layers[0].inputs_BRMD, state.layers[0].keys_BSHC
    assert inputs_BRMD is not None
    assert keys_BSHC is not None
    assert inputs_BRMD.shape == (2, 9, 1, 32)
    assert keys_BSHC.shape[1] == state.n_slots == 60
    # fp32: three layers of 2 heads with 16 channels of keys and 12 of values; two convolutions
    assert state.n_bytes == 4 * (3 * 2 * 60 * 2 * (16 + 12) + 2 * 2 * 9 * 32)


def test_another_batch_is_refused() -> None:
    model = awake_model(replace(ARMS["moe"]))
    state = DecodeState(model.config)
    model(tokens_without_bos(2, 4), state=state)
    with pytest.raises(ValueError, match="holds 2 sequences, the chunk 3 of 4 tokens"):
        model(tokens_without_bos(3, 4), state=state)


def with_tables_in_host_memory(model: Transformer) -> Transformer:
    other = deepcopy(model)
    store_tables(other, torch.device("cpu"), torch.float32)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("name", [name for name, config in ARMS.items() if config.memory is not None])
def test_tables_in_host_memory_give_the_same_logits_to_the_bit(name: str) -> None:
    """A prompt and twelve tokens, each chosen from the logits before it: prefill, then decode with a cache."""
    near, prompt_BT = awake_model(ARMS[name]), text_of_documents()
    far = with_tables_in_host_memory(near)
    assert any(isinstance(module, StoredTables) for module in far.modules())
    states = DecodeState(near.config), DecodeState(near.config)
    chunk_BT = prompt_BT
    with torch.inference_mode():
        for _ in range(1 + 12):
            logits, others = (model(chunk_BT, state=s) for model, s in zip((near, far), states, strict=True))
            assert torch.equal(logits, others)
            chunk_BT = logits[:, -1:].argmax(-1)


class Sizes(TorchDispatchMode):
    """Shapes of all that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor)}
        return out


def test_a_call_brings_rows_and_never_the_table() -> None:
    """No operation returns anything with as many rows of a table's width as the table has; a copy of it would."""
    model = with_tables_in_host_memory(awake_model(ARMS["engram"]))
    tables = [module.table_SP for module in model.modules() if isinstance(module, StoredTables)]
    whole = {tuple(table_SP.shape) for table_SP in tables}
    state, tokens_BT = DecodeState(model.config), tokens_without_bos(1, 8)
    with torch.inference_mode(), Sizes() as sizes:
        for chunk_BT in tokens_BT.split([5, 1, 1, 1], dim=1):
            model(chunk_BT, state=state)
    width = tables[0].shape[1]
    brought = {rows for rows, *rest in sizes.shapes if rest == [width]}
    assert brought
    assert max(brought) <= 5 * 4  # tokens times tables a layer
    assert not whole & sizes.shapes
    with Sizes() as sizes:
        tables[0].to(torch.float64)
    assert whole & sizes.shapes


def test_a_model_that_moves_leaves_tables_in_host_memory_behind() -> None:
    model = with_tables_in_host_memory(awake_model(ARMS["engram"])).to("meta")
    places = {name.endswith("table_SP"): parameter.device.type for name, parameter in model.named_parameters()}
    assert places == {True: "cpu", False: "meta"}
