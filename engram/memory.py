"""n-gram memory: Engram (paper, section 2) and OverEncoding, the paper's baseline.

    e_t = concat over orders n and heads k of E_{n,k}[z_{t,n,k}]                     Eq. 1-2
    k_t = W_K e_t,  v_t = W_V e_t                                                    Eq. 3
    alpha_t = sigmoid(<RMSNorm(h_t), RMSNorm(k_t)> / sqrt(d))                        Eq. 4
    Y = SiLU(Conv1D(RMSNorm(alpha v))) + alpha v                                     Eq. 5

With M residual streams, keys and norms are one per stream, tables and the value are shared (Eq. 6). Two deviations
from the printed text follow DeepSeek's own code: the gate's score passes a signed square root, and projections have no
bias. Eq. 4 as printed is `gate="sigmoid"`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import EngramConfig, OverEncodingConfig, TableConfig
from engram.decoding import LayerState
from engram.memory_gradients import causal_convolution, gate_score
from engram.norm import RMSNorm


class NgramTables(nn.Module):
    """The tables of one layer, stacked into one so that all lookups are one."""

    def __init__(self, config: TableConfig, layer: int) -> None:
        super().__init__()
        self.table_SP = nn.Parameter(torch.empty(sum(config.n_slots[layer]), config.d_row))
        self.first_row = 0
        self.sparse_grad = False
        """Set where the optimiser updates only the rows looked up."""

    def forward(self, rows_BTG: Tensor) -> Tensor:
        """Return e_BTQ, the concatenated rows; Q = G * P = d_mem."""
        return F.embedding(rows_BTG, self.table_SP, sparse=self.sparse_grad).flatten(-2)


class ShortConvolution(nn.Module):
    """Depthwise, causal and dilated: y_t = sum_j w_j * x_{t - j * dilation}. Zero at initialisation."""

    def __init__(self, n_streams: int, d_model: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.conv_JMD = nn.Parameter(torch.empty(kernel, n_streams, d_model))

    def forward(self, x_BTMD: Tensor, documents_BT: Tensor | None) -> Tensor:
        return causal_convolution(x_BTMD, self.conv_JMD, self.dilation, documents_BT)


class Engram(nn.Module):
    """One memory layer: look up, gate by the hidden state, convolve. `engram.initialise` fills its parameters.

    Args:
        config: of all memory layers.
        layer: which of them this is: an index into `config.layer_ids`, not a number of a block.
        d_model: width D of the hidden states.
        n_streams: residual streams M; 1 is a plain residual.
        norm_eps: of its three norms.

    Raises:
        ValueError: the tables of this layer have no sizes.
    """

    def __init__(
        self, config: EngramConfig, layer: int, *, d_model: int, n_streams: int = 1, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        if not 0 <= layer < len(config.tables.n_slots):
            raise ValueError(
                f"layer={layer} has no tables, n_slots sizes {len(config.tables.n_slots)} layers: set tables.n_slots"
            )
        M, D, Q = n_streams, d_model, config.tables.d_mem
        self.gate = config.gate
        self.tables = NgramTables(config.tables, layer)
        self.w_value_DQ = nn.Parameter(torch.empty(D, Q))
        if self.gate != "none":
            self.w_key_MDQ = nn.Parameter(torch.empty(M, D, Q))
            self.norm_query = RMSNorm(M, D, eps=norm_eps)
            self.norm_key = RMSNorm(M, D, eps=norm_eps)
        self.conv = None
        if config.conv_kernel > 0:
            self.norm_conv = RMSNorm(M, D, eps=norm_eps)
            self.conv = ShortConvolution(M, D, config.conv_kernel, dilation=max(config.tables.ngram_orders))

    def forward(
        self, h_BTMD: Tensor, rows_BTG: Tensor, documents_BT: Tensor | None, past: LayerState | None = None
    ) -> Tensor:
        """Return what is added to every stream, [B, T, M, D].

        Args:
            h_BTMD: residual streams before attention; with `one_stream` the one state that attention reads.
            rows_BTG: row ids from `NgramHasher`.
            documents_BT: document numbers that the convolution must not cross; None lets it. With a past, also of
                the tokens before that the convolution reaches.
            past: what was read before, where text comes in chunks.
        """
        # Eq. 1-2
        e_BTQ = self.tables(rows_BTG)

        # Eq. 3, the value shared by all streams
        v_BT1D = F.linear(e_BTQ, self.w_value_DQ)[:, :, None]

        # Eq. 4 and 6
        u_BTMD = v_BT1D.expand_as(h_BTMD) if self.gate == "none" else self._gate(h_BTMD, e_BTQ) * v_BT1D

        # Eq. 5
        if self.conv is None:
            return u_BTMD
        x_BTMD = self.norm_conv(u_BTMD)
        if past is None:
            y_BTMD = self.conv(x_BTMD, documents_BT)
        else:
            y_BTMD = self.conv(past.with_inputs(x_BTMD), documents_BT)[:, -x_BTMD.shape[1] :]
        return F.silu(y_BTMD) + u_BTMD

    def _gate(self, h_BTMD: Tensor, e_BTQ: Tensor) -> Tensor:
        """alpha [B, T, M, 1]."""
        k_BTMD = F.linear(e_BTQ, self.w_key_MDQ.flatten(0, 1)).unflatten(-1, h_BTMD.shape[2:])
        s_BTM1 = gate_score(h_BTMD, k_BTMD, self.norm_query.gain, self.norm_key.gain, self.norm_query.eps)
        if self.gate == "signed_sqrt":
            # The clamp keeps the root's gradient finite at zero, as in the demo and in DeepSeek-V4.1.
            s_BTM1 = s_BTM1.sign() * s_BTM1.abs().clamp_min(1e-6).sqrt()
        return s_BTM1.sigmoid().to(h_BTMD.dtype)


class OverEncoding(nn.Module):
    """n-gram embeddings averaged into the input embedding: (E[x_t] + sum_n W_n e_{t,n}) / (1 + number of orders).

    The tables, hash and budget are Engram's, so that the two differ only in where and how memory enters.
    """

    def __init__(self, config: OverEncodingConfig, d_model: int) -> None:
        super().__init__()
        n_orders = len(config.tables.ngram_orders)
        self.tables = NgramTables(config.tables, layer=0)
        self.w_up_ODQ = nn.Parameter(torch.empty(n_orders, d_model, config.tables.d_mem // n_orders))

    def forward(self, x_BTD: Tensor, rows_BTG: Tensor) -> Tensor:
        n_orders, d_model, _ = self.w_up_ODQ.shape
        # Side by side, the W_n are one matrix over the concatenated orders: their sum is one product.
        w_DQ = self.w_up_ODQ.transpose(0, 1).reshape(d_model, -1)
        return (x_BTD + F.linear(self.tables(rows_BTG), w_DQ)) / (1 + n_orders)
