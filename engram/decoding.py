"""What a model remembers between calls, so that text is read once and then continued token by token.

    attention        keys and values of all earlier slots, rotated
    n-gram windows   the last tokens and the documents they belong to
    convolution      its last inputs
    positions        tokens a sequence has read; padding counts none

A slot is a place in the batch's rectangle. Sequences of unequal length are padded on the left, so that all of them end
in the same slot; padding is never attended to, hashed or convolved. Reading in chunks of any length gives the same
logits as reading at once, up to the order in which attention sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.config import ModelConfig


class LayerState:
    """One block's past."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.keys_BSHC: Tensor | None = None
        self.values_BSHC: Tensor | None = None
        self.inputs_BRMD: Tensor | None = None
        """Last inputs of the memory's convolution."""
        self.mask_B1TS: Tensor | None = None
        """Slots that each new token may attend to; None where `causal` says it."""
        self.causal = True
        """The chunk is the beginning: attention within it is simply causal."""

    def with_keys(self, k_BTHC: Tensor, v_BTHC: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the chunk's keys and values; return those of all slots, S of them."""
        if self.keys_BSHC is not None and self.values_BSHC is not None:
            k_BTHC = torch.cat((self.keys_BSHC, k_BTHC), dim=1)
            v_BTHC = torch.cat((self.values_BSHC, v_BTHC), dim=1)
        self.keys_BSHC, self.values_BSHC = k_BTHC, v_BTHC
        return k_BTHC, v_BTHC

    def with_inputs(self, x_BTMD: Tensor) -> Tensor:
        """Keep the chunk's inputs of the convolution; return them behind those that it still reaches."""
        if self.inputs_BRMD is not None:
            x_BTMD = torch.cat((self.inputs_BRMD, x_BTMD), dim=1)
        self.inputs_BRMD = _last(x_BTMD, self.reach)
        return x_BTMD


class DecodeState:
    """A batch of sequences, as far as they have been read. Starts empty; `Transformer.forward` moves it on.

    Args:
        config: the model's.
        n_padding_B: slots of padding on each sequence's left, int64; None if there are none.
    """

    def __init__(self, config: ModelConfig, n_padding_B: Tensor | None = None) -> None:
        self.config = config
        self.n_padding_B = n_padding_B
        self.n_slots = 0
        """Slots read, padding included."""
        self.reach = _reach(config)
        self.layers = [LayerState(self.reach) for _ in range(config.n_layers)]
        self.positions_BT = torch.empty(0, 0, dtype=torch.int64)
        """Of the chunk's tokens; padding counts below zero."""
        self.tokens_BR = self.documents_BR = self.positions_BR = self.positions_BT
        """The chunk, behind the tokens before it that windows and convolution still reach."""
        self._document_B1: Tensor | None = None

    def read(self, tokens_BT: Tensor) -> None:
        """Take in the next chunk's tokens, before the model computes with them.

        Raises:
            ValueError: another number of sequences than before, or no token.
        """
        B, T = tokens_BT.shape
        if T == 0 or (self.n_slots and len(self.tokens_BR) != B):
            raise ValueError(f"the state holds {len(self.tokens_BR)} sequences, the chunk {B} of {T} tokens")
        slots_BT = torch.arange(self.n_slots, self.n_slots + T, device=tokens_BT.device).expand(B, T)
        self.positions_BT = slots_BT if self.n_padding_B is None else slots_BT - self.n_padding_B[:, None]
        documents_BT = self._documents(tokens_BT)
        fresh = self.n_slots == 0
        self.tokens_BR = self._behind(self.tokens_BR, tokens_BT, fresh)
        self.documents_BR = self._behind(self.documents_BR, documents_BT, fresh)
        self.positions_BR = self._behind(self.positions_BR, self.positions_BT, fresh)
        mask_B1TS = self._mask(slots_BT)
        for layer in self.layers:
            layer.mask_B1TS, layer.causal = mask_B1TS, fresh and mask_B1TS is None
        self.n_slots += T

    def select(self, sequences_B: Tensor) -> None:
        """Go on with these sequences, in this order, as beam search does."""

        def chosen(x: Tensor) -> Tensor:
            return x.index_select(0, sequences_B.to(x.device))

        for name in ("n_padding_B", "tokens_BR", "documents_BR", "positions_BR", "positions_BT", "_document_B1"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, chosen(x))
        for layer in self.layers:
            for name in ("keys_BSHC", "values_BSHC", "inputs_BRMD"):
                if (x := getattr(layer, name)) is not None:
                    setattr(layer, name, chosen(x))

    @property
    def n_bytes(self) -> int:
        """Memory that the past takes: keys, values and the convolution's inputs."""
        held = (x for layer in self.layers for x in (layer.keys_BSHC, layer.values_BSHC, layer.inputs_BRMD))
        return sum(x.numel() * x.element_size() for x in held if x is not None)

    def _documents(self, tokens_BT: Tensor) -> Tensor:
        """Number of each token's document as in training; padding is a document of its own, -1."""
        memory = self.config.memory
        if memory is not None and memory.tables.stop_at_documents:
            begins_BT = tokens_BT == self.config.bos_id
            if self.n_padding_B is not None:
                begins_BT = begins_BT & (self.positions_BT >= 0)
            documents_BT = begins_BT.cumsum(-1)
            if self._document_B1 is not None:
                documents_BT = documents_BT + self._document_B1
            self._document_B1 = documents_BT[:, -1:]
        else:
            documents_BT = torch.zeros_like(tokens_BT)
        return documents_BT if self.n_padding_B is None else documents_BT.masked_fill(self.positions_BT < 0, -1)

    def _behind(self, past_BR: Tensor, new_BT: Tensor, fresh: bool) -> Tensor:
        """The chunk behind what is still in reach of it."""
        # After a chunk R is reach + T: what the chunk before reached itself is dropped here.
        return new_BT if fresh else torch.cat((_last(past_BR, self.reach), new_BT), dim=1)

    def _mask(self, slots_BT: Tensor) -> Tensor | None:
        T = slots_BT.shape[1]
        if self.n_padding_B is None and (self.n_slots == 0 or T == 1):
            return None
        slots_S = torch.arange(self.n_slots + T, device=slots_BT.device)
        mask_BTS = slots_S <= slots_BT[:, :, None]
        if self.n_padding_B is not None:
            # Padding attends to itself, since a softmax over nothing would be no number.
            itself_BTS = slots_S == slots_BT[:, :, None]
            mask_BTS = mask_BTS & (slots_S >= self.n_padding_B[:, None, None]) | itself_BTS
        return mask_BTS[:, None]


def _reach(config: ModelConfig) -> int:
    """Earlier tokens that the memory still needs: for its windows, and for its dilated convolution."""
    if (memory := config.memory) is None:
        return 0
    longest = max(memory.tables.ngram_orders)
    taps = 0 if config.engram is None else config.engram.conv_kernel
    return max(longest - 1, (taps - 1) * longest)


def _last(x_BS: Tensor, n: int) -> Tensor:
    return x_BS[:, max(0, x_BS.shape[1] - n) :]
