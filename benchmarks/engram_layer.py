"""The Engram layer, hashing included, forward and backward, against transformers' `Qwen4ExpTextPLELayer`.

That layer hashes as the paper does, with multipliers and primes of its own. We take them over into a HashSpec, so that
both read the same rows for the same text and their outputs must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import zipf_tokens
from benchmarks.rounds import Contender, Part, in_bf16, takes_bf16
from engram.config import EngramConfig, TableConfig
from engram.hashing import HashSpec, NgramHasher
from engram.memory import Engram

VOCAB, EOS = 32_768, 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sequences, their length, d_model, streams, width read by a token, rows of one table."""

    B: int
    T: int
    D: int
    M: int
    Q: int
    rows: int
    heads: int = 8


CPU = Shape(B=8, T=512, D=256, M=4, Q=256, rows=100_000)
GPU = Shape(B=32, T=1024, D=1024, M=4, Q=512, rows=1_000_000)


def engram_part(device: torch.device, shape: Shape | None = None, *, bf16: bool | None = None) -> Part:
    """Ours with gradients of the rows looked up, theirs with the dense gradient that it has. In bf16 on GPUs."""
    shape = shape or (CPU if device.type == "cpu" else GPU)
    bf16 = takes_bf16(device, bf16)
    work = _Work(shape, device, torch.bfloat16 if bf16 else torch.float32)
    total = 2 * shape.heads * shape.rows
    return Part(
        name=in_bf16("engram-layer", bf16),
        what=f"Engram layer, forward + backward{', bf16' if bf16 else ''}: {shape.B * shape.T} tokens, d {shape.D}, "
        f"{shape.M} streams, table {total / 1e6:.1f}M x {shape.Q // (2 * shape.heads)}",
        target=5.0 if device.type == "cpu" else 3.0,
        at_least=True,
        contenders={"engram": work.ours, "transformers Qwen4ExpTextPLELayer": work.theirs},
        # In bf16 their gradients are up to 2.1e-2 from those in fp32, ours 0.7e-2.
        tolerance=3e-2 if bf16 else 1e-4,
        note="ours sums its gradients over equal rows within the time; theirs fills a gradient as large as the table",
    )


@dataclass
class _Work:
    shape: Shape
    device: torch.device
    dtype: torch.dtype

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Streams [B, T, M, D], token ids [B, T] without a document's end, and the gradient to send back."""
        s = self.shape
        generator = torch.Generator().manual_seed(0)
        h, direction = (torch.randn(s.B, s.T, s.M, s.D, generator=generator) for _ in range(2))
        h += 0.5
        tokens = zipf_tokens(VOCAB, s.B, s.T)
        return h.to(self.device, self.dtype), tokens.to(self.device), direction.to(self.device, self.dtype)

    def build_theirs(self) -> Any:
        from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig
        from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

        s = self.shape
        config = Qwen4ExpTextConfig(
            vocab_size=VOCAB,
            hidden_size=s.D,
            hc_count=s.M,
            ple_embed_dim=s.Q,
            ple_layer_ids=[1],
            ngram_size=3,
            heads_per_ngram=s.heads,
            ngram_vocab_size_base=s.rows,
            num_hidden_layers=2,
            rms_norm_eps=1e-6,
            eos_token_id=EOS,
        )
        layer = Qwen4ExpTextPLELayer(config, layer_idx=0, ple_layer_index=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in layer.named_parameters():
                scale = 0.1 if "norm" in name or parameter.ndim == 1 else parameter.shape[-1] ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            # Keys and streams that all point one way: the gate's root has a gradient without bound at a score of zero,
            # where the last bit of a sum would decide what the gradients are.
            layer.key_proj.weight.add_(s.Q**-0.5)
            layer.ple_embedding.ngram_embedding.weight.abs_()
        return layer.to(self.device, self.dtype)

    def theirs(self) -> Contender:
        layer = self.build_theirs()
        h_BTMD, tokens_BT, direction_BTMD = self.inputs()
        h_BTMD.requires_grad_()
        last: list[Tensor] = []

        def run() -> None:
            h_BTMD.grad = None
            layer.zero_grad(set_to_none=True)
            y = layer(h_BTMD.flatten(2), tokens_BT, None)
            y.backward(direction_BTMD.flatten(2))
            last[:] = [y.detach().unflatten(-1, direction_BTMD.shape[2:])]

        def outputs() -> list[Tensor]:
            embedding = layer.ple_embedding
            table = embedding.ngram_embedding.weight.grad[: embedding.total_vocab_size]
            return [*last, h_BTMD.grad, layer.key_proj.weight.grad, layer.value_proj.weight.grad, table]

        return Contender(run, outputs)

    def ours(self) -> Contender:
        s = self.shape
        theirs = self.build_theirs()
        embedding = theirs.ple_embedding
        sizes = tuple(embedding.head_vocab_sizes)
        tables = TableConfig(d_mem=s.Q, n_hash_heads=s.heads, pad_id=EOS, compress_tokens=False, n_slots=(sizes,))
        engram = EngramConfig(layer_ids=(0,), tables=tables)
        layer = Engram(engram, 0, d_model=s.D, n_streams=s.M).to(self.device, self.dtype)
        layer.tables.sparse_grad = True
        assert layer.conv is not None
        with torch.no_grad():
            layer.w_key_MDQ.copy_(theirs.key_proj.weight.unflatten(0, (s.M, s.D)))
            layer.w_value_DQ.copy_(theirs.value_proj.weight)
            for norm, other in (
                (layer.norm_key, theirs.norm_key),
                (layer.norm_query, theirs.norm_query),
                (layer.norm_conv, theirs.norm_conv),
            ):
                norm.gain.copy_(1 + other.weight.view(s.M, s.D))
            layer.conv.conv_JMD.copy_(theirs.conv1d.weight[:, 0].T.flip(0).unflatten(1, (s.M, s.D)))
            layer.tables.table_SP.copy_(embedding.ngram_embedding.weight[: sum(sizes)])
        multipliers = (tuple(embedding.layer_multipliers.tolist()),)
        spec = HashSpec(compressed_V=np.arange(VOCAB), multipliers=multipliers, n_slots=(sizes,), pad_id=EOS)
        hasher = NgramHasher(engram, spec).to(self.device)
        del theirs, embedding
        h_BTMD, tokens_BT, direction_BTMD = self.inputs()
        h_BTMD.requires_grad_()
        last: list[Tensor] = []

        def run() -> None:
            h_BTMD.grad = None
            layer.zero_grad(set_to_none=True)
            y_BTMD = layer(h_BTMD, hasher(tokens_BT, None)[0], None)
            y_BTMD.backward(direction_BTMD)
            grad = layer.tables.table_SP.grad
            assert grad is not None
            layer.tables.table_SP.grad = grad.coalesce()
            last[:] = [y_BTMD.detach()]

        def outputs() -> list[Tensor]:
            grads = [layer.w_key_MDQ.grad, layer.w_value_DQ.grad, layer.tables.table_SP.grad]
            keys, values, table = (grad for grad in grads if grad is not None)
            assert h_BTMD.grad is not None
            return [*last, h_BTMD.grad, keys.flatten(0, 1), values, table.to_dense()]

        return Contender(run, outputs)
