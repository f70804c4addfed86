"""A whole training step: forward, backward, clipping, update. Ours against transformers', and rho against rho."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.inputs import zipf_tokens
from benchmarks.rounds import Contender, Part, in_bf16, takes_bf16
from engram.allocation import allocate
from engram.config import EngramConfig, GQAConfig, ModelConfig, MoEConfig, OptimConfig, TableConfig
from engram.counting import count_params, train_flops_per_token
from engram.initialise import init_weights
from engram.optim import Optimizers, build_optimizers, needs_sparse_grad, update_router_biases
from engram.transformer import Transformer

LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Batch and backbone: sequences, their length, vocabulary, widths, layers, experts."""

    B: int
    T: int
    V: int
    D: int
    heads: int
    layers: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return (
            f"{self.B} x {self.T} tokens, vocabulary {self.V:,}, d {self.D}, {self.layers} layers of "
            f"{self.E} experts of {self.F}, k {self.K}"
        )

    def config(self) -> ModelConfig:
        """OLMoE's form in our terms: grouped-query attention, experts in every layer, none of them shared."""
        return ModelConfig(
            vocab_size=self.V,
            d_model=self.D,
            n_layers=self.layers,
            d_ff=self.F,
            gqa=GQAConfig(n_heads=self.heads, n_kv_heads=self.heads, head_dim=self.D // self.heads),
            moe=MoEConfig(n_routed_experts=self.E, top_k=self.K, d_expert=self.F, d_shared=0),
        )


CPU = Shape(B=8, T=512, V=16_384, D=256, heads=4, layers=4, F=128, E=106, K=6)
# The width, experts and vocabulary of paper-2e20, on fewer layers.
GPU = Shape(B=8, T=2048, V=129_280, D=1280, heads=16, layers=4, F=1216, E=106, K=6)


def against_transformers_part(device: torch.device, shape: Shape | None = None, *, bf16: bool | None = None) -> Part:
    """rho = 1 against `OlmoeForCausalLM` of equal shape with fused AdamW. Autocast to bf16 on GPUs."""
    shape = shape or (CPU if device.type == "cpu" else GPU)
    bf16 = takes_bf16(device, bf16)
    config, adamw = shape.config(), OptimConfig(lr=LR, matrices="adamw")
    gap = count_params(config).total
    flops = train_flops_per_token(config, shape.T) * shape.B * shape.T
    return Part(
        name=in_bf16("model-step", bf16),
        what=f"training step at rho = 1{', bf16' if bf16 else ''}: {shape}",
        target=3.0 if device.type == "cpu" else 1.5,
        at_least=True,
        contenders={
            "engram, AdamW": lambda: _ours(config, adamw, shape, device, bf16=bf16),
            "transformers OlmoeForCausalLM, grouped_mm": lambda: _olmoe(shape, device, bf16=bf16),
        },
        flops=flops,
        note=f"{gap / 1e6:.1f}M parameters and {flops / 1e12:.3f} TFLOP a step; the two route differently (sigmoid and "
        "softmax), so their outputs are not compared, but their experts are in the first line",
    )


def optimiser_part(device: torch.device, shape: Shape | None = None) -> Part:
    """What Muon adds to the same step."""
    shape = shape or (CPU if device.type == "cpu" else GPU)
    config = shape.config()
    return Part(
        name="muon-step",
        what=f"training step with Muon against AdamW: {shape}",
        target=float("inf"),
        at_least=False,
        contenders={
            "Muon": lambda: _ours(config, OptimConfig(lr=LR), shape, device),
            "AdamW": lambda: _ours(config, OptimConfig(lr=LR, matrices="adamw"), shape, device),
        },
        note="no target: the two train different models. The iteration's cost does not depend on the tokens of a step",
    )


def memory_part(device: torch.device, shape: Shape | None = None) -> Part:
    """rho = 0.75 against rho = 1, both in strict accounting: equal parameters, active parameters and FLOPs."""
    shape = shape or (CPU if device.type == "cpu" else GPU)
    backbone = replace(shape.config(), n_dense_layers=1, d_ff=4 * shape.D)
    assert backbone.moe is not None
    backbone = replace(backbone, moe=replace(backbone.moe, d_shared=2 * shape.F))
    tables = TableConfig(d_mem=shape.D // 2, n_hash_heads=4)
    memory = EngramConfig(layer_ids=(1, shape.layers // 2), tables=tables)
    strict = allocate(backbone, memory, 0.75, "strict")
    optim = OptimConfig(lr=LR)
    return Part(
        name="rho-step",
        what=f"training step at rho = 0.75 (strict) against rho = 1: {shape}",
        target=1.05 if device.type == "cpu" else 1.03,
        at_least=False,
        contenders={
            "rho = 0.75": lambda: _ours(strict, optim, shape, device),
            "rho = 1": lambda: _ours(backbone, optim, shape, device),
        },
        note="with Muon and the lazy table optimiser, as the studies train",
    )


def _ours(
    config: ModelConfig, optim: OptimConfig, shape: Shape, device: torch.device, *, bf16: bool | None = None
) -> Contender:
    bf16 = takes_bf16(device, bf16)
    model = Transformer(config, np.arange(config.vocab_size) if config.memory else None).to(device)
    model.set_sparse_tables(needs_sparse_grad(optim))
    init_weights(model, seed=0)
    optimizers = build_optimizers(model, optim, muon_dtype=torch.bfloat16 if bf16 else torch.float32)
    ids = zipf_tokens(shape.V, shape.B, shape.T + 1).to(device)

    def run() -> None:
        training_step(model, optimizers, ids, bf16=bf16)
        update_router_biases(model, optim.router_bias_gamma)

    return Contender(run)


def training_step(model: Transformer, optimizers: Optimizers, ids: Tensor, *, bf16: bool) -> Tensor:
    """Forward, backward, clipping and update as the studies do them; return the loss."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        loss: Tensor = model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    optimizers.clip(CLIP)
    optimizers.step(1.0)
    optimizers.zero_grad()
    return loss.detach()


def _olmoe(shape: Shape, device: torch.device, *, bf16: bool) -> Contender:
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=shape.V,
        hidden_size=shape.D,
        intermediate_size=shape.F,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_experts=shape.E,
        num_experts_per_tok=shape.K,
        max_position_embeddings=shape.T,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model: nn.Module = OlmoeForCausalLM(config).to(device)
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    forward: Callable[..., object] = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    ids = zipf_tokens(shape.V, shape.B, shape.T).to(device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss: Tensor = forward(input_ids=ids, labels=ids).loss  # type: ignore[attr-defined]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Contender(run)
