"""Parameters and FLOPs of a config in closed form. No torch: a whole grid is counted in milliseconds.

Definitions (paper, section 3.1): P_tot are the trainable parameters without vocabulary embedding and LM head, P_act
those a token uses, P_sparse = P_tot - P_act. A token uses top_k of the routed experts and one row of every table.
Tests hold these numbers against the built model to the last parameter, and FLOPs against torch's counter.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from engram.config import GQAConfig, MLAConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParamCounts:
    """Trainable parameters by group; properties give the paper's quantities."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    router: int
    shared_experts: int
    routed_experts: int
    routed_active: int
    """Of the routed experts, those one token uses."""
    memory_module: int
    """Projections, gate norms and convolution of the memory."""
    tables: int
    tables_active: int
    """Of the tables, the rows one token reads."""
    streams: int
    norms: int
    """The blocks' norms and the last one; attention's and the memory's own are counted with them."""

    @property
    def total(self) -> int:
        """Everything, vocabulary embedding and head included."""
        return sum(getattr(self, f.name) for f in fields(self) if not f.name.endswith("_active"))

    @property
    def P_vocab(self) -> int:
        return self.embedding + self.head

    @property
    def P_tot(self) -> int:
        return self.total - self.P_vocab

    @property
    def P_act(self) -> int:
        return self.P_tot - self.P_sparse

    @property
    def P_sparse(self) -> int:
        return self.P_moe_sparse + self.P_engram

    @property
    def P_moe_sparse(self) -> int:
        """Routed experts that a token does not use."""
        return self.routed_experts - self.routed_active

    @property
    def P_engram(self) -> int:
        """Table rows that a token does not read."""
        return self.tables - self.tables_active


def count_params(config: ModelConfig) -> ParamCounts:
    """Count the parameters of the model that `config` builds."""
    D, L, M = config.d_model, config.n_layers, config.n_streams
    moe, n_moe = config.moe, config.n_moe_layers
    expert = 3 * D * moe.d_expert if moe else 0
    memory = config.memory
    tables = memory.tables if memory else None
    return ParamCounts(
        embedding=config.vocab_size * D,
        head=config.vocab_size * D,
        attention=L * (_attention_matrices(config) + _attention_norms(config)),
        dense_ffn=(L - n_moe) * 3 * D * config.d_ff,
        router=n_moe * moe.n_routed_experts * D if moe else 0,
        shared_experts=n_moe * 3 * D * moe.d_shared if moe else 0,
        routed_experts=n_moe * moe.n_routed_experts * expert if moe else 0,
        routed_active=n_moe * moe.top_k * expert if moe else 0,
        memory_module=_memory_matrices(config) + _memory_vectors(config),
        tables=tables.n_rows * tables.d_row if tables else 0,
        tables_active=len(tables.n_slots) * tables.d_mem if tables else 0,
        streams=0 if M == 1 else 2 * L * (_stream_matrix(config) + M * (M + 2) + 3),
        norms=(2 * L + 1) * D,
    )


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Multiply-adds, counted as two operations, of all matrix products of one forward pass, per token.

    Attention scores are counted over the whole sequence, as torch's counter and Narayanan 2021 do, although half are
    masked. Look-ups, norms, activations and the depthwise convolution are no matrix products and count nothing.
    """
    D, L, M = config.d_model, config.n_layers, config.n_streams
    products = L * _attention_matrices(config) + L * seq_len * _score_width(config)
    if config.moe:
        moe, n_moe = config.moe, config.n_moe_layers
        products += n_moe * D * (moe.n_routed_experts + 3 * (moe.d_shared + moe.top_k * moe.d_expert))
    products += (L - config.n_moe_layers) * 3 * D * config.d_ff
    products += _memory_matrices(config)
    products += 0 if M == 1 else 2 * L * (_stream_matrix(config) + M * M * D)
    products += D * config.vocab_size
    return 2 * products


def train_flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Forward and backward; the backward of a product is two products of its size."""
    return 3 * forward_flops_per_token(config, seq_len)


def _attention_matrices(config: ModelConfig) -> int:
    D = config.d_model
    if isinstance(mla := config.mla, MLAConfig):
        q_in = D if mla.q_lora_rank is None else mla.q_lora_rank
        query = q_in * mla.n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
        query += 0 if mla.q_lora_rank is None else D * mla.q_lora_rank
        latent = D * (mla.kv_lora_rank + mla.qk_rope_head_dim)
        up = mla.kv_lora_rank * mla.n_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
        return query + latent + up + mla.n_heads * mla.v_head_dim * D
    gqa = config.gqa
    assert isinstance(gqa, GQAConfig)
    return 2 * D * gqa.head_dim * (gqa.n_heads + gqa.n_kv_heads)


def _attention_norms(config: ModelConfig) -> int:
    return config.mla.kv_lora_rank + (config.mla.q_lora_rank or 0) if config.mla else 0


def _score_width(config: ModelConfig) -> int:
    """Multiply-adds per pair of positions: q k^T and the weighted sum of values."""
    if mla := config.mla:
        return mla.n_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim)
    assert config.gqa is not None
    return 2 * config.gqa.n_heads * config.gqa.head_dim


def _memory_matrices(config: ModelConfig) -> int:
    if config.over_encoding:
        return config.d_model * config.over_encoding.tables.d_mem
    if (engram := config.engram) is None:
        return 0
    keys = 0 if engram.gate == "none" else engram.n_streams(config.n_streams)
    return len(engram.layer_ids) * (1 + keys) * config.d_model * engram.tables.d_mem


def _memory_vectors(config: ModelConfig) -> int:
    if (engram := config.engram) is None:
        return 0
    gate_norms = 0 if engram.gate == "none" else 2
    convolution = 0 if engram.conv_kernel == 0 else engram.conv_kernel + 1
    return len(engram.layer_ids) * (gate_norms + convolution) * engram.n_streams(config.n_streams) * config.d_model


def _stream_matrix(config: ModelConfig) -> int:
    M = config.n_streams
    return M * (M + 2) * M * config.d_model
