"""Move sparse capacity from experts to memory at equal P_tot and P_act (paper, section 3.1, Eq. 7). No torch.

A backbone is the pure MoE of rho = 1. `allocate` keeps top_k + round(rho * (n_routed - top_k)) experts and spends what
the others held on table rows. Two accounting modes:

    paper    only the numbers of experts and of slots change, as in the paper. The memory's projections, gate and
             convolution make P_act a little larger than at rho = 1; the excess is reported, not hidden.
    strict   the shared experts of every layer narrow (or widen) by what the memory module costs (and the smaller
             router saves), so that P_act and FLOPs per token are equal as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sympy import nextprime, prevprime

from engram.config import EngramConfig, ModelConfig, MoEConfig, OverEncodingConfig, TableConfig
from engram.counting import count_params, forward_flops_per_token

Mode = Literal["paper", "strict"]
Memory = EngramConfig | OverEncodingConfig

P_TOT_TOLERANCE = 0.001
P_ACT_TOLERANCE = 0.005
FLOPS_TOLERANCE = 0.005
SPARSITY_TOLERANCE = 0.1
MOST_EXPERTS = 1 << 16


def n_routed_at(backbone: ModelConfig, rho: float) -> int:
    """Routed experts that stay at `rho`; gives the paper's 46 of 106, 43 of 99 and 55 of 72.

    Raises:
        ValueError: rho is outside [0, 1], or the backbone has no experts or none to spare.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is a share of the sparse capacity and lies in [0, 1], not {rho}")
    moe = _moe(backbone)
    if moe.n_routed_experts == moe.top_k:
        raise ValueError(f"every token uses all {moe.top_k} experts: only n_routed_experts above top_k can give way")
    return moe.top_k + round(rho * (moe.n_routed_experts - moe.top_k))


def realised_rho(backbone: ModelConfig, config: ModelConfig) -> float:
    """rho after rounding to whole experts: (n_routed - top_k) / (n_routed of the backbone - top_k)."""
    full, here = _moe(backbone), _moe(config)
    spare = full.n_routed_experts - full.top_k
    return (here.n_routed_experts - here.top_k) / spare if spare else 1.0


def allocate(backbone: ModelConfig, memory: Memory, rho: float, mode: Mode = "paper") -> ModelConfig:
    """Return the config with `rho` of the backbone's sparse capacity in experts and the rest in memory.

    Args:
        backbone: pure MoE; its P_tot, and in `strict` mode its P_act, are matched.
        memory: template; its `tables.n_slots` is replaced by distinct primes.
        rho: 1 gives the backbone itself, 0 leaves only the top_k experts that every token uses.
        mode: what is held equal, see the module's docstring.

    Raises:
        ValueError: no such allocation exists; says what would be possible.
    """
    if backbone.memory is not None:
        raise ValueError("the backbone of rho = 1 must be a pure MoE: take engram or over_encoding out of it")
    n_routed = n_routed_at(backbone, rho)
    if n_routed == _moe(backbone).n_routed_experts:
        return backbone
    config, rows = _without_rows(backbone, memory, n_routed, mode)
    n_tables, least = _n_tables(memory), _least_rows(memory)
    if rows < least:
        raise ValueError(
            f"rho={rho} leaves {max(rows, 0):,} rows for {n_tables} tables, whose distinct primes need {least:,}: "
            f"{_largest_possible(backbone, memory, mode, n_routed)}"
        )
    config = _with_memory(config, memory, _spread(_prime_sizes(rows, n_tables), memory))
    target = count_params(backbone).P_tot
    error = count_params(config).P_tot / target - 1
    if abs(error) > P_TOT_TOLERANCE:
        raise ValueError(
            f"rho={rho}: the closest prime tables miss P_tot={target:,} by {error:+.2%}: "
            f"take a narrower d_mem (a row has {memory.tables.d_row} values) or more hash heads"
        )
    return config


def module_only(backbone: ModelConfig, memory: Memory, mode: Mode = "paper") -> ModelConfig:
    """The control that has Engram's module but no memory: all experts of rho = 1, tables of one row.

    Tells how much of a gain is compute and parameters of the module rather than memory.
    """
    config = _with_memory(backbone, memory, _one_row_each(memory))
    return _match_active(config, backbone) if mode == "strict" else config


def dense(backbone: ModelConfig) -> ModelConfig:
    """The dense model of the backbone's P_act: one FFN width in all layers, no experts."""
    narrow = replace(backbone, moe=None, n_dense_layers=backbone.n_layers, d_ff=1)
    spare = count_params(backbone).P_act - count_params(narrow).P_tot
    return replace(narrow, d_ff=1 + round(spare / (3 * backbone.d_model * backbone.n_layers)))


def with_sparsity(backbone: ModelConfig, ratio: float) -> ModelConfig:
    """The pure MoE of the same widths and top_k whose P_tot / P_act is nearest to `ratio`, by its number of experts.

    P_act moves a little too, since a router has a row per expert: the ratio is solved for, not P_tot.

    Args:
        backbone: pure MoE.
        ratio: P_tot / P_act; the paper holds it near 10.

    Raises:
        ValueError: no number of experts comes within a tenth of it; names what is possible.
    """
    moe = _moe(backbone)

    def at(n_routed: int) -> tuple[ModelConfig, float]:
        config = replace(backbone, moe=replace(moe, n_routed_experts=n_routed))
        counts = count_params(config)
        return config, counts.P_tot / counts.P_act

    least = moe.top_k + 1
    low, high = least, 2 * least
    while at(high)[1] < ratio and high < MOST_EXPERTS:
        low, high = high, 2 * high
    while high - low > 1:  # the ratio rises with the number of experts
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[1] < ratio else (low, middle)
    config, nearest = min((at(low), at(high)), key=lambda pair: abs(pair[1] - ratio))
    if abs(nearest / ratio - 1) > SPARSITY_TOLERANCE:
        raise ValueError(
            f"no number of routed experts gives P_tot / P_act = {ratio:g}: this backbone reaches {at(least)[1]:.2f} "
            f"to {at(MOST_EXPERTS)[1]:.2f}, and {nearest:.2f} at the nearest"
        )
    return config


def with_rows(config: ModelConfig, n_rows: int) -> ModelConfig:
    """The same model with tables of `n_rows` rows in all (as near as primes allow); P_tot changes.

    Raises:
        ValueError: the config has no memory, or fewer rows than tables are asked for.
    """
    memory = config.memory
    if memory is None:
        raise ValueError("the model has no memory whose rows could change")
    n_tables, least = _n_tables(memory), _least_rows(memory)
    if n_rows < least:
        raise ValueError(
            f"{n_rows} rows are too few for {n_tables} tables of distinct primes: ask for at least {least}"
        )
    return _with_memory(config, memory, _spread(_prime_sizes(n_rows, n_tables), memory))


def prime_slots(first: int, n_tables: int) -> tuple[int, ...]:
    """The `n_tables` consecutive primes from `first` on: the demo's search, which keeps all tables distinct."""
    primes = [int(nextprime(first - 1))]
    while len(primes) < n_tables:
        primes.append(int(nextprime(primes[-1])))
    return tuple(primes)


def _n_tables(memory: Memory) -> int:
    return len(memory.layer_ids) * memory.tables.n_lookups


def _least_rows(memory: Memory) -> int:
    """Rows of the smallest distinct primes."""
    return sum(prime_slots(2, _n_tables(memory)))


def _prime_sizes(n_rows: int, n_tables: int) -> tuple[int, ...]:
    """Distinct primes whose sum is as near to `n_rows` as primes lie: consecutive ones, but for the last.

    Consecutive primes alone move in steps of their whole span, which at a few hundred rows a table is more than
    0.1 percent of P_tot.
    """
    low, high = 2, max(3, n_rows // n_tables)
    while low < high:  # the largest start whose sum does not exceed n_rows
        middle = (low + high + 1) // 2
        if sum(prime_slots(middle, n_tables)) <= n_rows:
            low = middle
        else:
            high = middle - 1
    *first, last = prime_slots(low, n_tables)
    rest = n_rows - sum(first)
    above = int(nextprime(rest - 1))
    below = int(prevprime(rest + 1)) if rest > last else last
    return (*first, min(below, above, key=lambda prime: abs(prime - rest)))


def _spread(sizes: tuple[int, ...], memory: Memory) -> tuple[tuple[int, ...], ...]:
    G = memory.tables.n_lookups
    return tuple(sizes[start : start + G] for start in range(0, len(sizes), G))


def _one_row_each(memory: Memory) -> tuple[tuple[int, ...], ...]:
    return ((1,) * memory.tables.n_lookups,) * len(memory.layer_ids)


def _with_memory(config: ModelConfig, memory: Memory, n_slots: tuple[tuple[int, ...], ...]) -> ModelConfig:
    tables: TableConfig = replace(memory.tables, n_slots=n_slots)
    if isinstance(memory, EngramConfig):
        return replace(config, engram=replace(memory, tables=tables))
    return replace(config, over_encoding=replace(memory, tables=tables))


def _without_rows(backbone: ModelConfig, memory: Memory, n_routed: int, mode: Mode) -> tuple[ModelConfig, int]:
    """The config with tables of one row, and how many rows would bring it to the backbone's P_tot."""
    config = replace(backbone, moe=replace(_moe(backbone), n_routed_experts=n_routed))
    config = _with_memory(config, memory, _one_row_each(memory))
    if mode == "strict":
        config = _match_active(config, backbone)
    counts = count_params(config)
    missing = count_params(backbone).P_tot - (counts.P_tot - counts.tables)
    return config, round(missing / memory.tables.d_row)


def _match_active(config: ModelConfig, backbone: ModelConfig) -> ModelConfig:
    """Narrow the shared experts until P_act is the backbone's."""
    moe = _moe(config)
    target = count_params(backbone).P_act
    per_width = 3 * config.d_model * config.n_moe_layers
    excess = count_params(config).P_act - target
    d_shared = moe.d_shared - round(excess / per_width)
    if d_shared < 0:
        raise ValueError(
            f"strict mode: the memory module costs {excess:,} active parameters, more than the shared experts hold "
            f"({moe.d_shared * per_width:,}): take a smaller d_mem or fewer memory layers, or widen d_shared to at "
            f"least {round(excess / per_width)}"
        )
    config = replace(config, moe=replace(moe, d_shared=d_shared))
    error = count_params(config).P_act / target - 1
    if abs(error) > P_ACT_TOLERANCE:
        raise ValueError(f"strict mode: one unit of d_shared is {per_width:,} parameters, P_act is off by {error:+.2%}")
    # Without attention scores, which are equal, the difference is largest.
    error = forward_flops_per_token(config, 0) / forward_flops_per_token(backbone, 0) - 1
    if abs(error) > FLOPS_TOLERANCE:
        raise ValueError(
            f"strict mode: at equal P_act, FLOPs per token are off by {error:+.2%}, since rows, norms and convolution "
            "have parameters but no products: widen d_model or take fewer memory layers or a shorter convolution"
        )
    return config


def _largest_possible(backbone: ModelConfig, memory: Memory, mode: Mode, n_routed: int) -> str:
    """What to ask for instead of `n_routed` experts, which leave too few rows."""
    moe = _moe(backbone)
    for fewer in range(n_routed - 1, moe.top_k - 1, -1):
        try:
            _, rows = _without_rows(backbone, memory, fewer, mode)
        except ValueError:  # strict mode cannot match this one
            continue
        if rows >= _least_rows(memory):
            rho = (fewer - moe.top_k) / (moe.n_routed_experts - moe.top_k)
            return f"rho={rho:.3f} ({fewer} experts) is the largest below 1 that this memory allows"
    return "this memory is too large for the backbone at any rho; take a smaller d_mem or fewer layers"


def _moe(config: ModelConfig) -> MoEConfig:
    if config.moe is None:
        raise ValueError("allocation needs a backbone with experts: set moe")
    return config.moe
