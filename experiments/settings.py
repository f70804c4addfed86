"""What a run is (RunSpec, hashed), how it is run (Runtime, never hashed), and what a budget holds.

Frozen dataclasses that refuse impossible values. `experiments.loading` reads them from YAML and from command lines.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from engram.config import EngramConfig, ModelConfig, OptimConfig
from experiments.grid import Grid


class UserError(Exception):
    """A mistake the user can mend: one line, exit code 2, no traceback."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text a budget trains on. `experiments.corpus` turns it into shards with a manifest."""

    corpus: str = "python"
    """A named source (see `python -m experiments data --help`), or the path of a file or folder of text."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-level BPE of `vocab_size` on the corpus; else a path or a hub name."""
    vocab_size: int = 4096
    max_bytes: int = 0
    """Upper bound on the training text in bytes; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision, evaluation and optimiser of a run: the same for every arm of a study."""

    tokens: int
    batch_tokens: int
    """Tokens of one optimiser step."""
    seq_len: int
    optim: OptimConfig
    precision: Literal["bf16", "fp32"] = "bf16"
    """`bf16` is autocast: fp32 weights, bf16 matrix products, Muon's among them."""
    eval_tokens: int = 131_072
    """Validation tokens, always the same ones, in whole sequences."""
    eval_every: int = 0
    """Steps between validations; 0 validates at the end only."""

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.batch_tokens % self.seq_len != 0:
            raise ValueError(f"{self.batch_tokens=} must be a multiple of {self.seq_len=}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"{self.tokens=} is less than one step of {self.batch_tokens=}")
        if self.eval_tokens < self.seq_len:
            raise ValueError(f"{self.eval_tokens=} is less than one sequence of {self.seq_len=}")
        if self.eval_every < 0:
            raise ValueError(f"{self.eval_every=} must be a number of steps, or 0 for the end only")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


SCHEMA = 2
"""Of runs: raised when a change of code changes results for an equal spec."""


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that decides a run's result, and nothing else. Its hash is the run's name."""

    seed: int
    model: ModelConfig
    train: TrainConfig
    data: str
    """sha256 of the data manifest."""
    schema: int = SCHEMA
    replicate: int | None = None
    """Tells runs apart that should be equal: the same seed once more. None, the first, is not hashed."""

    @property
    def run_id(self) -> str:
        """`r` and ten hex digits; the letter keeps YAML and OmegaConf from reading the name as a number."""
        return "r" + hashlib.sha256(canonical(self).encode()).hexdigest()[:10]


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a run is for: written beside the spec, never hashed, so that suites can share runs."""

    budget: str
    budget_hash: str | None = None
    """Of what the budget held (`Budget.content`): one name may be given other numbers. None in older labels."""
    arm: str
    """allocation, dense, module-only, random-ids, over-encoding, engram, or ablation."""
    mode: Literal["paper", "strict"] = "paper"
    rho_target: float | None = None
    rho: float | None = None
    """Realised: (n_routed - top_k) / (n_routed at rho 1 - top_k)."""
    suite: str | None = None
    """Set by `runs_of`; None in what was written before there were several suites."""
    variant: str | None = None
    """The point's name where arm and rho do not tell it: `layer-2`, `no-gate`, `slots-10x`."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One line of a suite."""

    spec: RunSpec
    labels: Labels


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where and how runs are worked on; never changes which run it is."""

    runs_dir: str = "results/runs"
    data_dir: str = "data"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 0
    """Runs trained side by side; 0 is one per GPU, or one per core."""
    threads: int = 1
    """CPU threads of one run. Two runs of one thread beat one run of two at laptop sizes."""
    processes: int = 1
    """Processes that train one run together on this machine, each on a GPU or on `threads` of its cores."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """For several processes: `ddp` if the model fits a device, `fsdp` splits it over all. Tables are split in both."""
    table_device: Literal["same", "cpu"] = "same"
    """`cpu` keeps n-gram tables and their optimiser's state in host memory and brings the rows of a step to the device.
    The losses are the same; the tables may be as large as the machine's memory."""
    micro_batch_tokens: int = 0
    """Tokens of one forward and backward of one process; 0 takes all of its share of the step's batch."""
    checkpoint_every_s: float = 60.0

    def check_tables(self, optim: OptimConfig, processes: int) -> None:
        """Whether tables can be stored as asked.

        Raises:
            UserError: several processes, or an optimiser that moves every row.
        """
        if processes > 1 and (self.table_device == "cpu" or optim.table_dtype is not None):
            raise UserError(
                f"runtime.table_device={self.table_device} and optim.table_dtype={optim.table_dtype} take one process: "
                "several split the tables among them, so leave both out or set runtime.processes=1"
            )
        if self.table_device == "cpu" and optim.tables == "dense":
            raise UserError(
                "runtime.table_device=cpu takes train.optim.tables=lazy or rowwise: dense moves every row at each step "
                "(the ablation `dense-adam` is left out with grid.ablations=[...])"
            )

    def micro_sequences(self, train: TrainConfig, processes: int) -> int:
        """Sequences of one forward pass of one of `processes`.

        Raises:
            UserError: the processes cannot share a step's batch, or a micro-batch holds no whole sequences.
        """
        sequences = train.batch_tokens // train.seq_len
        if sequences % processes != 0:
            raise UserError(
                f"{processes} processes cannot share {sequences} sequences a step: take a divisor of {sequences}"
            )
        if self.micro_batch_tokens % train.seq_len != 0:
            raise UserError(
                f"runtime.micro_batch_tokens={self.micro_batch_tokens} must be a multiple of seq_len={train.seq_len}"
            )
        own = sequences // processes
        return min(self.micro_batch_tokens // train.seq_len or own, own)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A named study: backbone at rho = 1, memory template, training length, and the grid."""

    name: str
    about: str
    backbone: ModelConfig
    engram: EngramConfig
    """Template: tables.n_slots stays empty, allocation sizes it."""
    train: TrainConfig
    data: DataConfig
    rhos: tuple[float, ...]
    suite: str = "allocation"
    """What `plan` and `launch` take when no suite is named."""
    seeds: tuple[int, ...] = (0, 1)
    controls: tuple[Literal["dense", "module-only", "random-ids", "strict", "over-encoding"], ...] = (
        "dense",
        "module-only",
        "random-ids",
        "strict",
    )
    """Arms that the allocation suite runs beside the curve."""
    control_rho: float = 0.8
    """rho of `random-ids`, `strict` and `over-encoding`, and of the Engram of `baselines`."""
    large_memory_factor: float = 3.2
    """Slots of the larger Engram of `baselines` (Engram-40B holds 3.2 times Engram-27B's)."""
    grid: Grid = field(default_factory=Grid)
    """What the other suites vary."""
    flops_per_s: float = 320e12
    """Sustained speed that `plan` turns FLOPs into hours with: 40 percent of 800 TFLOP/s, or a CPU core's."""
    runtime: Runtime = field(default_factory=Runtime)

    @property
    def content(self) -> str:
        """Hash of what all runs of a study share, whatever a suite varies from there: backbone, memory, training."""
        shared = {"backbone": asdict(self.backbone), "engram": asdict(self.engram), "train": asdict(self.train)}
        return hashlib.sha256(canonical(shared).encode()).hexdigest()[:10]

    def __post_init__(self) -> None:
        if self.backbone.moe is None or self.backbone.memory is not None:
            raise ValueError("a budget's backbone is the pure MoE of rho = 1: it needs moe and no memory")
        if bad := [rho for rho in self.rhos if not 0 <= rho <= 1]:
            raise ValueError(f"rhos must lie in [0, 1], not {bad}")
        if self.data.tokenizer == "bpe" and self.data.vocab_size > self.backbone.vocab_size:
            taken, room = self.data.vocab_size, self.backbone.vocab_size
            raise ValueError(f"data.vocab_size={taken} tokens do not fit into backbone.vocab_size={room}")
        if not 0 <= self.engram.tables.pad_id < self.backbone.vocab_size:
            raise ValueError(f"engram.tables.pad_id={self.engram.tables.pad_id} is no token of the vocabulary")
        if not self.seeds or not self.rhos:
            raise ValueError(f"seeds={list(self.seeds)}, rhos={list(self.rhos)}: give at least one of each")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)}: a seed is a number from 0 on")
        if not 0 <= self.control_rho < 1:
            raise ValueError(f"{self.control_rho=} must lie in [0, 1): at 1 there is no memory to control")
        if self.flops_per_s <= 0 or self.large_memory_factor <= 0:
            raise ValueError(f"{self.flops_per_s=} and {self.large_memory_factor=} must be positive")
        if endless := {key: value for key, value in _floats(asdict(self)) if not math.isfinite(value)}:
            raise ValueError(f"numbers must be finite, not {', '.join(f'{k}={v}' for k, v in endless.items())}")


def _floats(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float inside, with the dotted path that leads to it."""
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _floats(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floats(inner, key)


def canonical(value: Any) -> str:
    """One string per meaning: keys sorted, None dropped, so that a new optional field keeps old names."""
    plain = asdict(value) if not isinstance(value, dict) else value
    return json.dumps(_without_none(plain), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_none(v) for v in value]
    return value
