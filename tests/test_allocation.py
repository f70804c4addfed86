"""If these fail, the points of a sweep are not equal in parameters or compute, and its curve means nothing."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from conftest import tiny_config
from sympy import isprime

from engram.allocation import Mode, allocate, dense, module_only, n_routed_at, prime_slots, realised_rho, with_rows
from engram.config import EngramConfig, GQAConfig, MLAConfig, ModelConfig, MoEConfig, OverEncodingConfig, TableConfig
from engram.counting import count_params, forward_flops_per_token

LAPTOP = ModelConfig(
    vocab_size=4096,
    d_model=64,
    n_layers=4,
    n_dense_layers=1,
    d_ff=256,
    mla=MLAConfig(n_heads=4, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16),
    moe=MoEConfig(n_routed_experts=102, top_k=6, d_expert=32, d_shared=64),
)
SMALL = EngramConfig(layer_ids=(1, 2), tables=TableConfig(d_mem=64, n_hash_heads=2))
LARGE = ModelConfig(
    vocab_size=129_280,
    d_model=1280,
    n_layers=12,
    n_dense_layers=1,
    d_ff=9728,
    n_streams=4,
    mla=MLAConfig(
        n_heads=16, q_lora_rank=960, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    moe=MoEConfig(n_routed_experts=106, top_k=6, d_expert=1216, d_shared=2432),
)
WIDE = EngramConfig(layer_ids=(1, 5), tables=TableConfig(d_mem=1280))
GROUPED = replace(LAPTOP, mla=None, gqa=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=16), n_streams=2)
PAIRS = {
    "laptop": (LAPTOP, SMALL),
    "laptop, gqa, two streams": (GROUPED, SMALL),
    "laptop, bare memory": (LAPTOP, replace(SMALL, gate="none", conv_kernel=0)),
    "laptop, over-encoding": (LAPTOP, OverEncodingConfig(tables=SMALL.tables)),
    "paper": (LARGE, WIDE),
}
RHOS = (0.0, 0.25, 0.4, 0.5, 0.75, 0.8, 0.9, 0.95)
MODES: tuple[Mode, ...] = ("paper", "strict")


def check_point(backbone: ModelConfig, config: ModelConfig, mode: Mode) -> None:
    """Budgets equal within the promised shares; primes prime and distinct over the model."""
    here, there = count_params(config), count_params(backbone)
    assert here.P_tot == pytest.approx(there.P_tot, rel=0.001)
    if mode == "strict":
        assert here.P_act == pytest.approx(there.P_act, rel=0.005)
        flops = forward_flops_per_token(backbone, 256)
        assert forward_flops_per_token(config, 256) == pytest.approx(flops, rel=0.005)
    assert config.memory is not None
    slots = list(itertools.chain.from_iterable(config.memory.tables.n_slots))
    assert all(isprime(rows) for rows in slots)
    assert len(set(slots)) == len(slots)
    assert len(slots) == len(config.memory.layer_ids) * config.memory.tables.n_lookups


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PAIRS)
def test_every_point_of_a_sweep_has_the_backbones_budget(name: str, mode: Mode) -> None:
    backbone, memory = PAIRS[name]
    for rho in RHOS:
        config = allocate(backbone, memory, rho, mode)
        check_point(backbone, config, mode)
        assert config.moe is not None
        assert config.moe.n_routed_experts == n_routed_at(backbone, rho)


@pytest.mark.parametrize("name", PAIRS)
def test_paper_mode_changes_nothing_but_experts_and_memory(name: str) -> None:
    backbone, memory = PAIRS[name]
    config = allocate(backbone, memory, 0.5)
    assert backbone.moe is not None
    assert config.moe is not None
    same = replace(backbone.moe, n_routed_experts=config.moe.n_routed_experts)
    assert replace(config, engram=None, over_encoding=None, moe=same) == replace(backbone, moe=same)
    assert config.moe.d_shared == backbone.moe.d_shared
    assert config.memory is not None
    assert replace(config.memory, tables=memory.tables) == memory
    assert replace(config.memory.tables, n_slots=()) == memory.tables


def test_strict_mode_changes_the_shared_width_as_well_and_nothing_else() -> None:
    paper, strict = allocate(LAPTOP, SMALL, 0.5), allocate(LAPTOP, SMALL, 0.5, "strict")
    assert paper.moe is not None
    assert strict.moe is not None
    assert strict.moe.d_shared < paper.moe.d_shared
    assert replace(strict.moe, d_shared=paper.moe.d_shared) == paper.moe
    assert replace(strict, moe=paper.moe, engram=paper.engram) == paper


def test_paper_mode_leaves_an_excess_of_active_parameters_that_the_module_explains() -> None:
    """Projections, gate, convolution and rows read, less the router's lost experts."""
    config = allocate(LAPTOP, SMALL, 0.8)
    excess = count_params(config).P_act - count_params(LAPTOP).P_act
    module = 2 * (2 * 64 * 64 + 2 * 64 + 5 * 64) + 2 * 64
    assert excess == module - 3 * 64 * (102 - n_routed_at(LAPTOP, 0.8))


def test_rho_1_is_the_backbone_itself() -> None:
    for mode in MODES:
        assert allocate(LAPTOP, SMALL, 1.0, mode) == LAPTOP
    assert realised_rho(LAPTOP, LAPTOP) == 1.0


def test_rho_0_leaves_the_experts_every_token_uses() -> None:
    config = allocate(LAPTOP, SMALL, 0.0)
    assert config.moe is not None
    assert config.moe.n_routed_experts == config.moe.top_k
    assert count_params(config).P_moe_sparse == 0
    assert realised_rho(LAPTOP, config) == 0.0


@pytest.mark.parametrize(
    ("full", "rho", "expected"),
    [(106, 0.40, 46), (99, 0.40, 43), (72, 0.743, 55), (106, 0.85, 91), (99, 0.849, 85)],
)
def test_expert_counts_are_the_papers(full: int, rho: float, expected: int) -> None:
    backbone = tiny_config(moe=MoEConfig(n_routed_experts=full, top_k=6, d_expert=8, d_shared=8))
    assert n_routed_at(backbone, rho) == expected


def test_realised_rho_is_the_share_of_spare_experts() -> None:
    config = allocate(LARGE, WIDE, 0.512)
    assert realised_rho(LARGE, config) == pytest.approx(0.51)


def random_requests(n: int) -> Iterator[tuple[ModelConfig, EngramConfig | OverEncodingConfig, float]]:
    rng = random.Random(0)
    for _ in range(n):
        d_model, n_layers = 8 * rng.randint(16, 64), rng.randint(3, 16)
        backbone = ModelConfig(
            vocab_size=4096,
            d_model=d_model,
            n_layers=n_layers,
            n_dense_layers=rng.randint(0, 1),
            d_ff=4 * d_model,
            n_streams=rng.choice((1, 4)),
            gqa=GQAConfig(n_heads=4, n_kv_heads=2, head_dim=32),
            moe=MoEConfig(
                n_routed_experts=rng.randint(16, 128),
                top_k=rng.randint(1, 8),
                d_expert=8 * rng.randint(4, d_model // 8),
                d_shared=3 * d_model,  # room for the module in strict mode
            ),
        )
        heads, orders = rng.choice((1, 2, 4, 8)), rng.choice(((2,), (2, 3), (2, 3, 4)))
        tables = TableConfig(d_mem=heads * len(orders) * rng.choice((4, 8)), ngram_orders=orders, n_hash_heads=heads)
        layers = tuple(sorted(rng.sample(range(n_layers), rng.choice((1, 2)))))
        memory = rng.choice((EngramConfig(layer_ids=layers, tables=tables), OverEncodingConfig(tables=tables)))
        yield backbone, memory, rng.choice((0.0, 0.9, rng.uniform(0, 0.95)))


@pytest.mark.parametrize("mode", MODES)
def test_random_backbones_are_matched_as_well(mode: Mode) -> None:
    n_matched = 0
    for backbone, memory, rho in random_requests(200):
        config = allocate(backbone, memory, rho, mode)
        if config != backbone:
            check_point(backbone, config, mode)
            n_matched += 1
    assert n_matched > 150


def test_primes_are_the_demos() -> None:
    """From 646,400 on: layer 1 takes 646403 to 646523 and 646537 to 646619, layer 15 goes on to 646879."""
    primes = prime_slots(646_400, 32)
    assert [primes[i] for i in (0, 7, 8, 15, 16, 31)] == [646403, 646523, 646537, 646619, 646631, 646879]
    assert all(isprime(p) for p in primes)
    assert not any(isprime(n) for n in range(646_400, 646_880) if n not in primes)


def test_dense_has_the_backbones_active_parameters_and_no_experts() -> None:
    """Within half a unit of the FFN's width in all layers."""
    for backbone in (LAPTOP, GROUPED, LARGE):
        config = dense(backbone)
        counts = count_params(config)
        assert config.moe is None
        assert counts.P_sparse == 0
        error = counts.P_tot - count_params(backbone).P_act
        assert abs(error) <= 3 * backbone.d_model * backbone.n_layers / 2
        assert counts.P_act == pytest.approx(count_params(backbone).P_act, rel=0.005)


@pytest.mark.parametrize("mode", MODES)
def test_module_only_keeps_all_experts_and_has_no_memory(mode: Mode) -> None:
    config = module_only(LAPTOP, SMALL, mode)
    counts = count_params(config)
    assert config.moe is not None
    assert config.moe.n_routed_experts == 102
    assert counts.P_engram == 0
    assert counts.tables == 2 * 64
    if mode == "strict":
        assert counts.P_act == pytest.approx(count_params(LAPTOP).P_act, rel=0.005)


def test_with_rows_changes_the_rows_alone() -> None:
    config = allocate(LAPTOP, SMALL, 0.5)
    larger = with_rows(config, 100_000)
    assert larger.memory is not None
    assert config.engram is not None
    assert larger.memory.tables.n_rows == pytest.approx(100_000, abs=60)
    assert replace(larger, engram=config.engram) == config


@pytest.mark.parametrize("rho", [-0.1, 1.01, float("nan")])
def test_a_rho_outside_0_to_1_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match=rf"lies in \[0, 1\], not {rho}"):
        allocate(LAPTOP, SMALL, rho)


def test_a_backbone_without_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone with experts: set moe"):
        allocate(dense(LAPTOP), SMALL, 0.5)


def test_a_backbone_without_spare_experts_is_refused() -> None:
    assert LAPTOP.moe is not None
    backbone = replace(LAPTOP, moe=replace(LAPTOP.moe, n_routed_experts=6))
    with pytest.raises(ValueError, match="all 6 experts: only n_routed_experts above top_k"):
        allocate(backbone, SMALL, 0.5)


def test_experts_below_top_k_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n_routed_experts=5 is below self.top_k=6"):
        MoEConfig(n_routed_experts=5, top_k=6, d_expert=8, d_shared=8)


def test_a_backbone_that_already_has_a_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a pure MoE"):
        allocate(allocate(LAPTOP, SMALL, 0.5), SMALL, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_too_few_rows_are_refused_with_a_rho_that_works(mode: Mode) -> None:
    """The refusal's own advice is followed, and one expert more fails again."""
    assert LAPTOP.moe is not None
    backbone = replace(LAPTOP, moe=replace(LAPTOP.moe, d_shared=1024))
    memory = EngramConfig(layer_ids=(1, 2), tables=TableConfig(d_mem=256))
    with pytest.raises(ValueError, match=r"rho=(0\.\d+) \((\d+) experts\) is the largest below 1") as error:
        allocate(backbone, memory, 0.99, mode)
    experts = int(str(error.value).split("(")[-1].split()[0])
    check_point(backbone, allocate(backbone, memory, (experts - 6) / 96, mode), mode)
    with pytest.raises(ValueError, match=rf"\({experts} experts\) is the largest"):
        allocate(backbone, memory, (experts + 1 - 6) / 96, mode)


def test_a_memory_too_large_at_any_rho_is_refused() -> None:
    memory = EngramConfig(layer_ids=(1, 2), tables=TableConfig(d_mem=8192))
    with pytest.raises(ValueError, match="too large for the backbone at any rho; take a smaller d_mem or fewer layers"):
        allocate(LAPTOP, memory, 0.0)


def test_a_module_that_costs_more_than_the_shared_experts_is_refused_with_the_width_needed() -> None:
    memory = EngramConfig(layer_ids=(1, 2), tables=TableConfig(d_mem=256))
    with pytest.raises(ValueError, match=r"widen d_shared to at least (\d+)") as error:
        allocate(LAPTOP, memory, 0.5, "strict")
    assert LAPTOP.moe is not None
    wide = replace(LAPTOP, moe=replace(LAPTOP.moe, d_shared=int(str(error.value).split()[-1])))
    check_point(wide, allocate(wide, memory, 0.5, "strict"), "strict")


def test_rows_without_room_for_distinct_primes_are_refused() -> None:
    config = allocate(LAPTOP, SMALL, 0.5)
    with pytest.raises(ValueError, match="7 rows are too few for 8 tables of distinct primes: ask for at least 77"):
        with_rows(config, 7)
    least = with_rows(config, 77)
    assert least.memory is not None
    assert least.memory.tables.n_slots == ((2, 3, 5, 7), (11, 13, 17, 19))


def test_rows_of_a_model_without_memory_cannot_change() -> None:
    with pytest.raises(ValueError, match="no memory whose rows could change"):
        with_rows(LAPTOP, 1000)
