"""The language model: blocks of Engram, attention and FFN over residual streams (paper, Fig. 1).

    H <- H + Engram(H)      in a few layers, before attention
    H <- H + Attention(H)
    H <- H + FFN(H)         dense in the leading layers, mixture of experts after

The model knows expert and slot counts; it does not know rho, files, devices or dtypes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.attention import build_attention, rope_angles, rope_angles_at, rope_width
from engram.config import ModelConfig
from engram.decoding import DecodeState, LayerState
from engram.hashing import HashSpec, NgramHasher
from engram.loss import cross_entropy
from engram.memory import Engram, NgramTables, OverEncoding
from engram.moe import MoE, SwiGLU
from engram.norm import RMSNorm
from engram.streams import build_residual


class Block(nn.Module):
    """One layer. Engram adds to every stream directly; attention and FFN read and write through the residual path."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.engram: Engram | None = None
        if (engram := config.engram) is not None and layer in engram.layer_ids:
            sizes = {"d_model": config.d_model, "n_streams": engram.n_streams(config.n_streams)}
            self.engram = Engram(engram, engram.layer_ids.index(layer), **sizes, norm_eps=config.norm_eps)
        self.fused = config.engram is None or not config.engram.one_stream
        self.norm_attention = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = build_attention(config)
        self.residual_attention = build_residual(config)
        self.norm_ffn = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn: MoE | SwiGLU
        if config.is_moe(layer):
            assert config.moe is not None
            self.ffn = MoE(config.d_model, config.moe)
        else:
            self.ffn = SwiGLU(config.d_model, config.d_ff)
        self.residual_ffn = build_residual(config)

    def forward(
        self,
        x_BTMD: Tensor,
        angles_TC: Tensor,
        rows_BTG: Tensor | None,
        documents_BT: Tensor | None,
        past: LayerState | None = None,
    ) -> Tensor:
        if self.engram is not None and self.fused:
            assert rows_BTG is not None
            x_BTMD = x_BTMD + self.engram(x_BTMD, rows_BTG, documents_BT, past)

        def attend(x_BTD: Tensor) -> Tensor:
            out_BTD: Tensor
            if self.engram is None or self.fused:
                out_BTD = self.attention(self.norm_attention(x_BTD), angles_TC, past)
                return out_BTD
            # Without fusion memory and attention share one H_pre and one H_post. With M = 1 that changes nothing.
            memory_BTD = self.engram(x_BTD[:, :, None], rows_BTG, documents_BT, past)[:, :, 0]
            out_BTD = memory_BTD + self.attention(self.norm_attention(x_BTD + memory_BTD), angles_TC, past)
            return out_BTD

        x_BTMD = self.residual_attention(x_BTMD, attend)
        out: Tensor = self.residual_ffn(x_BTMD, lambda x: self.ffn(self.norm_ffn(x)))
        return out


class Transformer(nn.Module):
    """Tokens in, logits or mean loss out.

    Args:
        config: the architecture.
        compressed_V: canonical token ids from `engram.hashing.compress_vocabulary`; needed with a memory.

    Raises:
        ValueError: the config has a memory and `compressed_V` is missing or of another length.
    """

    def __init__(self, config: ModelConfig, compressed_V: npt.NDArray[np.int64] | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.hasher: NgramHasher | None = None
        self.over_encoding: OverEncoding | None = None
        if config.memory is not None:
            if compressed_V is None or len(compressed_V) != config.vocab_size:
                size = "none" if compressed_V is None else len(compressed_V)
                raise ValueError(f"a memory needs canonical ids for all {config.vocab_size} tokens, got {size}")
            self.hasher = NgramHasher(config.memory, HashSpec.build(config.memory, compressed_V))
        if config.over_encoding is not None:
            self.over_encoding = OverEncoding(config.over_encoding, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_out = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    @property
    def hash_spec(self) -> HashSpec | None:
        """What must match before another model's tables may be loaded."""
        return None if self.hasher is None else self.hasher.spec

    def set_sparse_tables(self, sparse: bool) -> None:
        """Give tables sparse gradients, for optimisers that update only the rows looked up."""
        for module in self.modules():
            if isinstance(module, NgramTables):
                module.sparse_grad = sparse

    def hidden(self, tokens_BT: Tensor, draws_B: Tensor | None = None, state: DecodeState | None = None) -> Tensor:
        """Final hidden states [B, T, D], normed, before the head."""
        config = self.config
        if state is not None:
            state.read(tokens_BT)
        rows, documents_BT = self.look_ups(tokens_BT, draws_B, state)

        x_BTD = F.embedding(tokens_BT, self.embed_VD)
        if self.over_encoding is not None:
            x_BTD = self.over_encoding(x_BTD, rows[0])
        if state is None:
            angles_TC = rope_angles(tokens_BT.shape[1], rope_width(config), config.rope_theta, tokens_BT.device)
        else:
            angles_TC = rope_angles_at(state.positions_BT, rope_width(config), config.rope_theta)
        engram_layers = config.engram.layer_ids if config.engram else ()

        # All streams start as the embedding and are averaged at the end: for M = 1 an ordinary residual.
        x_BTMD = x_BTD[:, :, None].expand(-1, -1, config.n_streams, -1)
        for layer, block in enumerate(self.blocks):
            rows_BTG = rows[engram_layers.index(layer)] if layer in engram_layers else None
            past = None if state is None else state.layers[layer]
            x_BTMD = block(x_BTMD, angles_TC, rows_BTG, documents_BT, past)
        out: Tensor = self.norm_out(x_BTMD.mean(2))
        return out

    def look_ups(
        self, tokens_BT: Tensor, draws_B: Tensor | None = None, state: DecodeState | None = None
    ) -> tuple[list[Tensor], Tensor | None]:
        """What a text reads: row ids [B, T, G], one tensor a memory layer.

        Returns:
            Rows, and document numbers [B, T] where windows stop at documents; with a state, also of the tokens just
            before that the memory reaches.
        """
        if self.hasher is None:
            return [], None
        if state is not None:
            rows = self.hasher(state.tokens_BR, state.documents_BR, draws_B, state.positions_BR)
            return [rows_BRG[:, -tokens_BT.shape[1] :] for rows_BRG in rows], state.documents_BR
        stops = self.hasher.tables.stop_at_documents
        documents_BT = (tokens_BT == self.config.bos_id).cumsum(-1) if stops else None
        return self.hasher(tokens_BT, documents_BT, draws_B), documents_BT

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        draws_B: Tensor | None = None,
        state: DecodeState | None = None,
    ) -> Tensor:
        """Return logits [B, T, V], or with targets the mean cross-entropy in nats (a scalar).

        Args:
            tokens_BT: token ids.
            targets_BT: the tokens to predict at each position.
            draws_B: number of each sequence, which random rows depend on in the `random-ids` control.
            state: what was read before these tokens, which it then holds as well; None reads a whole text at once.
        """
        x_BTD = self.hidden(tokens_BT, draws_B, state)
        if targets_BT is None:
            return F.linear(x_BTD, self.head_VD)
        return cross_entropy(x_BTD.flatten(0, 1), self.head_VD, targets_BT.flatten())
