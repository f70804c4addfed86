"""If these fail, tokens read other rows than the paper's hash says, or tables are used with a hash they never saw."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import BOS, compressed_vocabulary, tiny_engram, tiny_tables

from engram.config import EngramConfig, TableConfig
from engram.hashing import HashSpec, NgramHasher, _split_mix

THREE_ORDERS = EngramConfig(
    layer_ids=(0, 3, 7),
    tables=TableConfig(
        d_mem=18,
        ngram_orders=(2, 3, 5),
        n_hash_heads=3,
        hash_seed=11,
        n_slots=(
            (101, 103, 107, 109, 113, 127, 131, 137, 139),
            (149, 151, 157, 163, 167, 173, 179, 181, 191),
            (193, 197, 199, 211, 223, 227, 229, 233, 239),
        ),
    ),
)


GOLDEN_MULTIPLIERS = (
    (949203457676829153, 59949125229827907, 445414481183620465),
    (838774276221860879, 638038608439546039, 383007267126509345),
)
GOLDEN_ROWS = [
    [
        [20, 55, 97, 118],
        [29, 64, 96, 118],
        [28, 57, 97, 123],
        [26, 51, 87, 127],
        [19, 65, 82, 129],
        [20, 55, 97, 118],
        [21, 34, 83, 130],
        [14, 61, 96, 124],
    ],
    [
        [27, 64, 146, 211],
        [44, 78, 111, 185],
        [24, 67, 127, 190],
        [34, 80, 102, 184],
        [17, 56, 113, 206],
        [27, 64, 146, 211],
        [11, 49, 152, 201],
        [46, 53, 150, 187],
    ],
]
"""Rows of the text 1 4 5 6 9 | 1 8 8 (two documents) in two layers, from a script of Python integers."""


def text_with_documents(length: int = 60) -> list[int]:
    """Random tokens with documents that begin at 0, 7, 8 and 30."""
    tokens = torch.randint(BOS + 1, 64, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    for start in (0, 7, 8, 30):
        tokens[start] = BOS
    return tokens


def slow_rows(tokens: list[int], spec: HashSpec, tables: TableConfig, stop: bool) -> list[list[list[int]]]:
    """Position after position in Python's integers, which cannot overflow: [layer][position][lookup]."""
    n_heads = tables.n_hash_heads
    layers = []
    for multipliers, sizes in zip(spec.multipliers, spec.n_slots, strict=True):
        positions = []
        for t in range(len(tokens)):
            rows = []
            for i, order in enumerate(tables.ngram_orders):
                mix = 0
                for back in range(order):
                    crossed = stop and BOS in tokens[max(0, t - back + 1) : t + 1]
                    inside = t >= back and not crossed
                    canonical = int(spec.compressed_V[tokens[t - back]]) if inside else spec.pad_id
                    mix ^= canonical * multipliers[back]
                assert 0 <= mix < 2**63
                for head in range(i * n_heads, (i + 1) * n_heads):
                    rows.append(sum(sizes[:head]) + mix % sizes[head])
            positions.append(rows)
        layers.append(positions)
    return layers


def documents(tokens_BT: torch.Tensor) -> torch.Tensor:
    return (tokens_BT == BOS).cumsum(-1)


@pytest.mark.parametrize("memory", [tiny_engram(), THREE_ORDERS], ids=["two orders", "three orders"])
@pytest.mark.parametrize("stop", [True, False], ids=["stop", "cross"])
@pytest.mark.parametrize("compress", [True, False], ids=["canonical", "raw"])
def test_rows_equal_a_slow_python_version(memory: EngramConfig, stop: bool, compress: bool) -> None:
    memory = replace(memory, tables=replace(memory.tables, compress_tokens=compress))
    spec = HashSpec.build(memory, compressed_vocabulary())
    tokens = text_with_documents()
    tokens_BT = torch.tensor([tokens, tokens[::-1]])
    rows = NgramHasher(memory, spec)(tokens_BT, documents(tokens_BT) if stop else None)
    for b, text in enumerate(tokens_BT.tolist()):
        expected = slow_rows(text, spec, memory.tables, stop)
        assert [layer[b].tolist() for layer in rows] == expected


@pytest.mark.parametrize("length", [1, 2, 4])
def test_texts_shorter_than_a_window_are_padded(length: int) -> None:
    spec = HashSpec.build(THREE_ORDERS, compressed_vocabulary())
    tokens = text_with_documents()[1 : 1 + length]
    rows = NgramHasher(THREE_ORDERS, spec)(torch.tensor([tokens]), None)
    assert [layer[0].tolist() for layer in rows] == slow_rows(tokens, spec, THREE_ORDERS.tables, stop=False)


def test_ids_of_a_fixed_text_never_change() -> None:
    """Golden numbers, worked out apart from this package; another hash would make every stored table noise."""
    memory = tiny_engram(layer_ids=(1, 14))
    spec = HashSpec.build(memory, np.array([0, 1, 2, 3, 4, 4, 5, 5, 6, 7], dtype=np.int64))
    assert spec.multipliers == GOLDEN_MULTIPLIERS
    assert spec.pad_id == 2
    tokens_BT = torch.tensor([[1, 4, 5, 6, 9, 1, 8, 8]])
    rows = NgramHasher(memory, spec)(tokens_BT, documents(tokens_BT))
    assert [layer[0].tolist() for layer in rows] == GOLDEN_ROWS


def test_multipliers_follow_the_demo_formula() -> None:
    n_compressed = 1000
    memory = tiny_engram(layer_ids=(1, 15), tables=tiny_tables(hash_seed=5))
    spec = HashSpec.build(memory, np.arange(n_compressed))
    for layer_id, multipliers in zip((1, 15), spec.multipliers, strict=True):
        half_bound = max(1, ((2**63 - 1) // n_compressed) // 2)
        drawn = np.random.default_rng(5 + 10007 * layer_id).integers(0, half_bound, size=3, dtype=np.int64)
        assert multipliers == tuple(int(r) * 2 + 1 for r in drawn)
        assert all(m % 2 == 1 and m * (n_compressed - 1) < 2**63 for m in multipliers)


def test_stopping_at_documents_makes_a_document_independent_of_what_precedes_it() -> None:
    spec = HashSpec.build(THREE_ORDERS, compressed_vocabulary())
    hasher = NgramHasher(THREE_ORDERS, spec)
    document = text_with_documents()[30:]
    packed = torch.tensor([text_with_documents()])
    alone = hasher(torch.tensor([document]), None)
    stopped = hasher(packed, documents(packed))
    crossed = hasher(packed, None)
    for here, there, over in zip(alone, stopped, crossed, strict=True):
        assert torch.equal(here, there[:, 30:])
        assert not torch.equal(here[:, :4], over[:, 30:34])
        assert torch.equal(here[:, 4:], over[:, 34:])


def test_each_table_is_read_only_in_its_own_rows() -> None:
    spec = HashSpec.build(THREE_ORDERS, compressed_vocabulary())
    tokens_BT = torch.randint(0, 64, (4, 500), generator=torch.Generator().manual_seed(0))
    for rows_BTG, sizes in zip(NgramHasher(THREE_ORDERS, spec)(tokens_BT, None), spec.n_slots, strict=True):
        ends = torch.tensor(sizes).cumsum(0)
        assert (rows_BTG >= ends - torch.tensor(sizes)).all()
        assert (rows_BTG < ends).all()


def test_tables_of_one_row_are_always_read_at_that_row() -> None:
    memory = tiny_engram(tables=tiny_tables(n_slots=((1,) * 4, (1,) * 4)))
    hasher = NgramHasher(memory, HashSpec.build(memory, compressed_vocabulary()))
    tokens_BT = torch.tensor([text_with_documents()])
    for rows_BTG in hasher(tokens_BT, None):
        assert torch.equal(rows_BTG, torch.arange(4).expand_as(rows_BTG))


def random_rows(tokens_BT: torch.Tensor, draws: list[int], seed: int = 0) -> list[torch.Tensor]:
    memory = tiny_engram(tables=tiny_tables(lookup="random", hash_seed=seed))
    hasher = NgramHasher(memory, HashSpec.build(memory, compressed_vocabulary()))
    rows: list[torch.Tensor] = hasher(tokens_BT, None, torch.tensor(draws))
    return rows


def test_random_lookups_ignore_the_text_and_repeat_for_the_same_draws() -> None:
    one, other = torch.zeros(2, 30, dtype=torch.long), torch.tensor([text_with_documents()[:30]] * 2)
    for a, b in zip(random_rows(one, draws=[7, 8]), random_rows(other, draws=[7, 8]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("draws", "seed"), [([9, 10], 0), ([7, 8], 1)], ids=["draws", "seed"])
def test_random_lookups_differ_for_another_draw_or_hash_seed(draws: list[int], seed: int) -> None:
    tokens_BT = torch.zeros(2, 30, dtype=torch.long)
    for a, b in zip(random_rows(tokens_BT, draws=[7, 8]), random_rows(tokens_BT, draws, seed), strict=True):
        assert (a != b).float().mean() > 0.9


def test_random_lookups_do_not_depend_on_how_a_batch_is_split() -> None:
    tokens_BT = torch.zeros(4, 30, dtype=torch.long)
    whole = random_rows(tokens_BT, draws=[5, 6, 7, -1])
    parts = [random_rows(tokens_BT[i : i + 2], draws) for i, draws in ((0, [5, 6]), (2, [7, -1]))]
    for layer, rows_BTG in enumerate(whole):
        assert torch.equal(rows_BTG, torch.cat([part[layer] for part in parts]))


def test_split_mix_gives_the_published_sequence() -> None:
    """The first outputs of SplitMix64 from state 1234567, as in Vigna's and other reference implementations."""
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + i * golden) % 2**64 for i in range(3)]
    signed = [state - 2**64 if state >= 2**63 else state for state in states]
    outputs = [int(v) % 2**64 for v in _split_mix(torch.tensor(signed))]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_random_lookups_spread_evenly_over_each_table() -> None:
    tokens_BT = torch.zeros(40, 500, dtype=torch.long)
    for rows_BTG, sizes in zip(random_rows(tokens_BT, draws=list(range(40))), tiny_tables().n_slots, strict=True):
        counts = torch.bincount(rows_BTG.flatten(), minlength=sum(sizes)).split(sizes)
        for n, size in zip(counts, sizes, strict=True):
            assert n.sum() == 20_000
            chi2 = ((n - 20_000 / size) ** 2 / (20_000 / size)).sum()
            assert chi2 < 2 * size  # mean size - 1, standard deviation sqrt(2 size): four of them or more


def test_random_lookups_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    random_rows(torch.zeros(2, 30, dtype=torch.long), draws=[7, 8])
    assert torch.equal(before, torch.get_rng_state())


def test_a_spec_survives_a_checkpoint_that_may_hold_only_weights() -> None:
    spec = HashSpec.build(THREE_ORDERS, compressed_vocabulary())
    buffer = io.BytesIO()
    torch.save(spec.state(), buffer)
    buffer.seek(0)
    back = HashSpec.from_state(torch.load(buffer, weights_only=True))
    spec.check_same(back)
    assert back.multipliers == spec.multipliers
    assert back.n_slots == spec.n_slots
    assert back.pad_id == spec.pad_id
    assert np.array_equal(back.compressed_V, spec.compressed_V)


@pytest.mark.parametrize(
    ("part", "value", "stored_text", "here_text"),
    [
        ("compressed_V", np.arange(64), "64 canonical ids for 64 tokens", "32 canonical ids for 64 tokens"),
        ("multipliers", ((3, 5, 7), (9, 11, 13)), "(3, 5, 7)", None),
        ("n_slots", ((2, 3, 5, 7), (11, 13, 17, 19)), "(2, 3, 5, 7)", "(31, 37, 41, 43)"),
        ("pad_id", 6, "stored 6", "now 1"),
    ],
)
def test_a_mismatch_names_the_part_and_both_values(
    part: str, value: object, stored_text: str, here_text: str | None
) -> None:
    spec = HashSpec.build(tiny_engram(), compressed_vocabulary())
    stored = replace(spec, **{part: value})
    with pytest.raises(ValueError, match=part) as error:
        spec.check_same(stored)
    assert stored_text in str(error.value)
    assert (here_text or str(spec.multipliers)) in str(error.value)


def test_vocabularies_of_equal_size_that_merge_other_tokens_are_told_apart() -> None:
    spec = HashSpec.build(tiny_engram(), compressed_vocabulary())
    swapped = spec.compressed_V.copy()
    swapped[[10, 20]] = swapped[[20, 10]]
    with pytest.raises(ValueError, match="compressed_V"):
        spec.check_same(replace(spec, compressed_V=swapped))
