"""Frozen dataclasses that say what a model is and how it is optimised. No torch, no files.

Layers are counted from 0 in code; the paper counts from 1 (its layers 2 and 15 are our 1 and 14).
Every class checks itself when it is built, so that a wrong value is refused before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.1)."""

    n_heads: int
    kv_lora_rank: int
    """Width of the latent that keys and values share."""
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    """Width of the query latent; None projects queries straight from the hidden state."""

    def __post_init__(self) -> None:
        _require(self.qk_rope_head_dim % 2 == 0, f"RoPE turns pairs: {self.qk_rope_head_dim=} must be even")
        sizes = (self.n_heads, self.kv_lora_rank, self.qk_rope_head_dim, self.v_head_dim)
        _require(min(sizes) > 0 and self.qk_nope_head_dim >= 0, f"attention widths must be positive: {self}")


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention; `n_kv_heads == n_heads` is ordinary multi-head attention."""

    n_heads: int
    n_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        _require(self.head_dim % 2 == 0, f"RoPE turns pairs: {self.head_dim=} must be even")
        _require(
            self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads == 0,
            f"{self.n_heads=} must be a multiple of {self.n_kv_heads=}",
        )


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """DeepSeekMoE: shared and fine-grained routed experts, sigmoid scores, loss-free balancing."""

    n_routed_experts: int
    top_k: int
    d_expert: int
    """Hidden width of one routed expert."""
    d_shared: int
    """Hidden width of the shared experts together: n_shared_experts * d_expert unless `strict` narrowed it."""
    route_scale: float = 1.0
    """Factor on the normalised routing weights."""

    def __post_init__(self) -> None:
        _require(self.top_k >= 1 and self.d_expert >= 1 and self.d_shared >= 0, f"MoE sizes must be positive: {self}")
        _require(
            self.n_routed_experts >= self.top_k,
            f"{self.n_routed_experts=} is below {self.top_k=}: every token needs top_k experts",
        )


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Hashed n-gram tables and how text reaches them (paper, sections 2.2 and 4.1)."""

    d_mem: int
    """Width of what one token reads in one layer: all orders and heads concatenated."""
    ngram_orders: tuple[int, ...] = (2, 3)
    n_hash_heads: int = 8
    """Tables per order (K in the paper)."""
    hash_seed: int = 0
    pad_id: int = 2
    """Token that stands before the first position (2 in DeepSeek's tokenizer and in ours)."""
    compress_tokens: bool = True
    """Hash canonical tokens (case, accents and spaces folded) instead of raw ones."""
    stop_at_documents: bool = True
    """n-grams and convolution see nothing before the document's start. The paper's demo crosses documents."""
    n_slots: tuple[tuple[int, ...], ...] = ()
    """Rows of every table: one tuple a memory layer, ordered by n-gram order, then hash head. Prime and
    distinct over the model; all 1 is the `module-only` control. Empty: a template that allocation sizes."""
    lookup: Literal["text", "random"] = "text"
    """`random` is the `random-ids` control: rows are drawn at random, whatever the text."""

    def __post_init__(self) -> None:
        _require(
            len(self.ngram_orders) > 0 and min(self.ngram_orders) >= 2 and self.n_hash_heads >= 1,
            f"n-gram orders start at 2 and need a hash head: {self.ngram_orders=}, {self.n_hash_heads=}",
        )
        _require(
            tuple(sorted(set(self.ngram_orders))) == self.ngram_orders,
            f"{self.ngram_orders=} must rise without repeats",
        )
        _require(
            self.d_mem > 0 and self.d_mem % self.n_lookups == 0,
            f"{self.d_mem=} must be a multiple of orders x heads = {self.n_lookups}",
        )
        # YAML readers hand inner tuples over as lists, which would break equality and hashing.
        object.__setattr__(self, "n_slots", tuple(tuple(rows) for rows in self.n_slots))
        for rows in self.n_slots:
            _require(
                len(rows) == self.n_lookups and min(rows) >= 1,
                f"each layer needs {self.n_lookups} tables of at least one row, not {rows}",
            )

    @property
    def n_lookups(self) -> int:
        """Rows that one token reads in one layer (G)."""
        return len(self.ngram_orders) * self.n_hash_heads

    @property
    def d_row(self) -> int:
        """Width of one row (P)."""
        return self.d_mem // self.n_lookups

    @property
    def n_rows(self) -> int:
        """Rows of all tables of all layers."""
        return sum(map(sum, self.n_slots))


@dataclass(frozen=True, kw_only=True)
class EngramConfig:
    """Gated n-gram memory inside a few layers (paper, section 2)."""

    layer_ids: tuple[int, ...]
    tables: TableConfig
    gate: Literal["signed_sqrt", "sigmoid", "none"] = "signed_sqrt"
    """`sigmoid` is Eq. 4 as printed; `signed_sqrt` is what DeepSeek's code computes; `none` always opens."""
    conv_kernel: int = 4
    """Taps of the short convolution (Eq. 5); 0 leaves it out, as DeepSeek-V4.1 does."""
    one_stream: bool | None = None
    """True is the ablation without multi-branch fusion (section 6.2): one gate and one output, on the state that
    attention reads, in place of one a residual stream. None, which keeps the names of older runs, is False."""

    def __post_init__(self) -> None:
        _require(len(self.layer_ids) > 0, "Engram needs at least one layer in layer_ids")
        _require(
            tuple(sorted(set(self.layer_ids))) == self.layer_ids and self.layer_ids[0] >= 0,
            f"{self.layer_ids=} must rise without repeats from 0",
        )
        _require(
            len(self.tables.n_slots) in (0, len(self.layer_ids)),
            f"n_slots lists {len(self.tables.n_slots)} layers, layer_ids {len(self.layer_ids)}",
        )
        _require(self.conv_kernel >= 0, f"{self.conv_kernel=} must not be negative")

    def n_streams(self, of_backbone: int) -> int:
        """Residual streams that the memory gates and writes, of a backbone with `of_backbone`."""
        return 1 if self.one_stream else of_backbone


@dataclass(frozen=True, kw_only=True)
class OverEncodingConfig:
    """n-gram embeddings averaged into the input embedding: the paper's baseline (Huang 2025a)."""

    tables: TableConfig

    def __post_init__(self) -> None:
        _require(len(self.tables.n_slots) in (0, 1), "OverEncoding has one set of tables, at the input")

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """The input counts as layer 0 when multipliers are drawn."""
        return (0,)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole language model. Exactly one of `mla` and `gqa`; `moe=None` makes every layer dense."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_ff: int
    """Hidden width of the SwiGLU in dense layers."""
    n_dense_layers: int = 0
    """Leading layers with a dense FFN; the others hold experts if there is a `moe`."""
    mla: MLAConfig | None = None
    gqa: GQAConfig | None = None
    moe: MoEConfig | None = None
    engram: EngramConfig | None = None
    over_encoding: OverEncodingConfig | None = None
    n_streams: int = 1
    """Residual streams M of the hyper-connections; 1 is a plain residual without extra parameters."""
    sinkhorn_iters: int = 20
    bos_id: int = 0
    """Token that begins every document; the memory's windows stop there."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require((self.mla is None) != (self.gqa is None), "set exactly one of mla and gqa")
        _require(
            min(self.vocab_size, self.d_model, self.n_layers, self.n_streams, self.sinkhorn_iters) >= 1,
            f"sizes must be positive: {self}",
        )
        _require(0 <= self.n_dense_layers <= self.n_layers, f"{self.n_dense_layers=} is outside 0..{self.n_layers}")
        _require(self.n_moe_layers == self.n_layers or self.d_ff >= 1, f"dense layers need a width: {self.d_ff=}")
        _require(0 <= self.bos_id < self.vocab_size, f"{self.bos_id=} is no token of {self.vocab_size=}")
        if self.moe is not None:
            _require(self.n_moe_layers > 0, f"all {self.n_layers} layers are dense: lower n_dense_layers or drop moe")
            _require(
                self.d_model % 8 == 0 and self.moe.d_expert % 8 == 0,
                f"grouped products want rows of 16 bytes: make {self.d_model=} and d_expert={self.moe.d_expert} "
                "multiples of 8",
            )
        _require(self.engram is None or self.over_encoding is None, "choose one of engram and over_encoding")
        _require(self.memory is None or self.memory.tables.n_slots != (), "the memory has no sizes: set tables.n_slots")
        if self.engram is not None:
            _require(
                self.engram.layer_ids[-1] < self.n_layers,
                f"Engram layer {self.engram.layer_ids[-1]} is beyond the last, {self.n_layers - 1} (counted from 0)",
            )

    @property
    def memory(self) -> EngramConfig | OverEncodingConfig | None:
        """Whatever holds n-gram tables, if anything does."""
        return self.engram or self.over_encoding

    @property
    def n_moe_layers(self) -> int:
        return 0 if self.moe is None else self.n_layers - self.n_dense_layers

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's FFN is a mixture of experts."""
        return self.moe is not None and layer >= self.n_dense_layers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisers and schedule (paper, section 4.1 and Table 5). One setting for all arms of a study."""

    lr: float
    """Peak learning rate of Muon (scaled to AdamW's RMS) and AdamW."""
    matrices: Literal["muon", "adamw"] = "muon"
    tables: Literal["dense", "lazy", "rowwise"] = "lazy"
    """Adam over all rows, over the rows looked up, or over those with one second moment a row."""
    table_dtype: Literal["bf16"] | None = None
    """`bf16` stores rows and moments in half the memory, rows rounded at random; None is fp32. Not with `dense`."""
    table_lr_mult: float = 5.0
    weight_decay: float = 0.1
    """Decoupled; not applied to tables, norms, biases and other vectors."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    muon_momentum: float = 0.95
    grad_clip: float = 1.0
    """Largest global gradient norm, tables included; 0 turns clipping off."""
    schedule: Literal["step", "cosine", "wsd"] = "step"
    warmup_frac: float = 0.02
    """Share of the steps that warms up linearly."""
    final_lr_frac: float = 0.1
    """Learning rate at the end of `cosine` and `wsd`, as a share of the peak. `step` ends at 0.1 by definition."""
    wsd_decay_frac: float = 0.2
    router_bias_gamma: float = 0.001
    """Step of the loss-free balancing bias (Wang 2024a)."""

    def __post_init__(self) -> None:
        _require(
            self.lr > 0 and self.table_lr_mult > 0,
            f"learning rates must be positive: {self.lr=}, {self.table_lr_mult=}",
        )
        _require(
            self.table_dtype is None or self.tables != "dense",
            "dense Adam has no bf16 form: take tables=lazy or rowwise, or leave table_dtype out",
        )
        _require(
            all(0 <= beta < 1 for beta in self.adam_betas) and 0 <= self.muon_momentum < 1,
            f"averages need weights in [0, 1): {self.adam_betas=}, {self.muon_momentum=}",
        )
        _require(
            0 <= self.warmup_frac < 1 and 0 < self.wsd_decay_frac <= 1, f"schedule shares must lie in [0, 1): {self}"
        )
        _require(
            min(self.grad_clip, self.weight_decay, self.final_lr_frac, self.router_bias_gamma) >= 0 < self.adam_eps,
            f"must not be negative: {self.grad_clip=}, {self.weight_decay=}, {self.final_lr_frac=}, "
            f"{self.router_bias_gamma=}, and {self.adam_eps=} must be positive",
        )
