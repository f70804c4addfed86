"""If these fail, runs that are compared saw different text, damaged data is trained on, or a refusal does not help.

Reading of shards: order, validation and damage, on real text and on a stream of counted tokens (token t is number t),
where every batch can be written down by hand. test_corpus.py holds how shards are built.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_study import VOCAB, build_shards

from experiments.settings import UserError
from experiments.shards import Shards, TrainOrder, check_vocab, valid_batches

FILES = ("train.bin", "valid.bin", "tokenizer.json", "token_bytes.npy")


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def copy(real: Shards, tmp_path: Path) -> Path:
    """The real shards, to be damaged."""
    return shutil.copytree(real.path, tmp_path / real.path.name)


def counted_shards(path: Path, n_train: int = 1000, n_valid: int = 200) -> Shards:
    """Shards whose tokens count upwards, written by hand; validation goes on where training ends."""
    path.mkdir()
    splits, first = {}, 0
    for split, n in (("train", n_train), ("valid", n_valid)):
        raw = np.arange(first, first + n, dtype=np.uint16).tobytes()
        (path / f"{split}.bin").write_bytes(raw)
        sha256 = hashlib.sha256(raw).hexdigest()
        splits[split] = {"documents": 1, "tokens": n, "bytes": 2 * n, "sha256": sha256}
        first += n
    manifest = {"corpus": "counted", "vocab_size": first, "bos_id": 0, "dtype": "uint16"}
    (path / "manifest.json").write_text(json.dumps(manifest | {"splits": splits, "files": {}}))
    return Shards(path)


@pytest.fixture
def counted(tmp_path: Path) -> Shards:
    return counted_shards(tmp_path / "counted")


def numbers(order: TrainOrder, n_batches: int, n_sequences: int) -> list[int]:
    """Which samples the first batches take, of counted shards: their first tokens say it."""
    batches = [order.batch(step, n_sequences) for step in range(n_batches)]
    return [int(row[0]) // order.seq_len for batch in batches for row in batch]


# Order


def test_inputs_and_targets_are_neighbours_in_the_stream(counted: Shards) -> None:
    batch = TrainOrder(counted, 16, seed=0).batch(3, 8)
    assert batch.shape == (8, 17)
    assert batch.dtype == np.int64
    np.testing.assert_array_equal(batch[:, 1:], batch[:, :-1] + 1)
    assert set(batch[:, 0] % 16) == {0}


def test_samples_of_real_text_are_pieces_of_it(real: Shards) -> None:
    stream = np.asarray(real.tokens("train"), dtype=np.int64)
    order = TrainOrder(real, 64, seed=4)
    pieces = {tuple(stream[i : i + 65].tolist()) for i in range(0, len(stream) - 64, 64)}
    assert all(tuple(row) in pieces for step in range(20) for row in order.batch(step, 16).tolist())


@pytest.mark.parametrize("n_sequences", [1, 7, 62, 100])
def test_every_sample_comes_once_an_epoch_however_batches_lie_across_epochs(n_sequences: int, counted: Shards) -> None:
    """Of 1000 tokens, 62 samples of 16 and their last targets; the last seven tokens are never seen."""
    order = TrainOrder(counted, 16, seed=0)
    assert order.n_samples == 62
    seen = numbers(order, 4 * 62 // n_sequences + 1, n_sequences)
    for epoch in range(len(seen) // 62):
        assert sorted(seen[epoch * 62 : (epoch + 1) * 62]) == list(range(62))
    assert max(Counter(seen).values()) - min(Counter(seen).values()) <= 1


def test_permutations_differ_between_epochs_seeds_and_data(counted: Shards, tmp_path: Path) -> None:
    epochs = numbers(TrainOrder(counted, 16, seed=0), 3, 62)
    other_seed = numbers(TrainOrder(counted, 16, seed=1), 1, 62)
    other_data = numbers(TrainOrder(counted_shards(tmp_path / "other", n_valid=201), 16, seed=0), 1, 62)
    orders = [tuple(epochs[i * 62 : (i + 1) * 62]) for i in range(3)] + [tuple(other_seed), tuple(other_data)]
    assert len(set(orders)) == 5
    assert tuple(range(62)) not in orders
    # Two shuffles share about one place of 62; more than eight would happen once in a million.
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) <= 8


def test_a_batch_does_not_depend_on_what_was_asked_before(real: Shards) -> None:
    order = TrainOrder(real, 1024, seed=2)
    steps = [step % 40 for step in range(0, 40 * 7, 7)]  # out of order, over epochs
    assert 2 * order.n_samples < 40 * 16, "two epochs at least"
    jumping = {step: order.batch(step, 16) for step in steps}
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    straight = TrainOrder(real, 1024, seed=2)
    for step in range(40):
        np.testing.assert_array_equal(straight.batch(step, 16), jumping[step])


def test_batches_of_another_size_take_the_same_samples(real: Shards) -> None:
    order = TrainOrder(real, 16, seed=3)
    np.testing.assert_array_equal(order.batch(5, 8), np.concatenate([order.batch(step, 4) for step in (10, 11)]))


def test_the_order_of_known_data_is_what_it_always_was(counted: Shards) -> None:
    """Published runs can be trained again only as long as this holds: a change needs a new `schema` of RunSpec."""
    assert counted.hash.startswith("b092e3dd199c")
    assert numbers(TrainOrder(counted, 16, seed=0), 1, 12) == [0, 9, 18, 59, 26, 47, 40, 13, 5, 53, 6, 46]
    assert numbers(TrainOrder(counted, 100, seed=3), 2, 9) == [3, 2, 1, 6, 5, 4, 7, 0, 8, 4, 1, 7, 2, 3, 5, 8, 0, 6]


def test_epochs_count_whole_sequences(counted: Shards) -> None:
    assert TrainOrder(counted, 16, seed=0).epochs(62 * 16 * 2) == 2.0
    assert TrainOrder(counted, 16, seed=0).epochs(62 * 8) == 0.5


@pytest.mark.parametrize(("seq_len", "n_samples"), [(999, 1), (500, 1), (499, 2), (333, 3), (1, 999)])
def test_a_sample_needs_its_last_target(seq_len: int, n_samples: int, counted: Shards) -> None:
    order = TrainOrder(counted, seq_len, seed=0)
    assert order.n_samples == n_samples
    assert order.batch(0, n_samples).max() == n_samples * seq_len


def test_data_shorter_than_a_sequence_are_refused_with_both_lengths(counted: Shards) -> None:
    with pytest.raises(UserError, match=r"1,000 training tokens, less than one sequence of 1000"):
        TrainOrder(counted, 1000, seed=0)


# Validation


@pytest.mark.parametrize("n_sequences", [1, 3, 6, 50])
def test_validation_takes_the_same_first_tokens_in_batches_of_any_size(n_sequences: int, counted: Shards) -> None:
    batches = valid_batches(counted, 110, 16, n_sequences)
    rows = np.concatenate(batches)
    np.testing.assert_array_equal(rows[:, :-1].ravel(), np.arange(1000, 1096))
    np.testing.assert_array_equal(rows[:, 1:].ravel(), np.arange(1001, 1097))
    assert [len(batch) for batch in batches[:-1]] == [n_sequences] * (len(batches) - 1)


def test_too_few_validation_tokens_are_refused_with_the_number_to_use(counted: Shards) -> None:
    with pytest.raises(
        UserError, match=r"200 validation tokens, 4,096 are asked for: set train\.eval_tokens to .* 192"
    ):
        valid_batches(counted, 4096, 16, 4)
    assert sum(batch[:, 1:].size for batch in valid_batches(counted, 192, 16, 4)) == 192
    with pytest.raises(UserError, match="at most 192"):
        valid_batches(counted, 208, 16, 4)


# What the shards say


def test_shards_describe_themselves(real: Shards, counted: Shards) -> None:
    assert counted.describe() == (
        "1,000 training tokens (0.0 MB, 1 documents), 200 validation tokens, vocabulary 1,200"
    )
    assert real.vocab_size == VOCAB == len(real.token_bytes)
    assert f"{len(real.tokens('train')):,} training tokens" in real.describe()
    text = real.tokenizer.decode(np.asarray(real.tokens("valid")[:400]).tolist(), skip_special_tokens=True)
    assert int(real.token_bytes[np.asarray(real.tokens("valid")[:400])].sum()) == len(text.encode())


def test_a_model_may_have_a_larger_vocabulary_than_the_tokenizer_but_no_smaller_one(counted: Shards) -> None:
    check_vocab(counted, 1200)
    check_vocab(counted, 1201)
    with pytest.raises(UserError, match=r"has 1,200 tokens, the model only 1,199: set backbone\.vocab_size=1200"):
        check_vocab(counted, 1199)


def test_the_hash_follows_what_decides_the_tokens_and_nothing_else(copy: Path, real: Shards) -> None:
    edit(copy, lambda m: m.update(corpus="elsewhere", made_with={"python": "4"}, sources=[]))
    assert Shards(copy).hash == real.hash
    edit(copy, lambda m: m["splits"]["valid"].update(sha256="0" * 64))
    assert Shards(copy).hash != real.hash


def test_shards_are_read_only_and_not_read_whole(counted: Shards) -> None:
    stream = counted.tokens("train")
    assert isinstance(stream, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        stream[0] = 1


# Damage


def truncate(path: Path, split: str = "train") -> None:
    raw = (path / f"{split}.bin").read_bytes()
    (path / f"{split}.bin").write_bytes(raw[: len(raw) // 2])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (truncate, r"train\.bin has [\d,]+ bytes instead of [\d,]+"),
        (lambda path: truncate(path, "valid"), r"valid\.bin has [\d,]+ bytes instead of"),
        (lambda path: (path / "train.bin").unlink(), r"train\.bin has 0 bytes"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text(""), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("{}"), "manifest.json is damaged"),
        (lambda path: edit(path, lambda m: m["splits"].pop("valid")), "damaged .*valid"),
        (lambda path: edit(path, lambda m: m["splits"]["train"].update(tokens="many")), "damaged"),
        (lambda path: edit(path, lambda m: m["splits"]["train"].update(tokens=1)), "instead of 2"),
        (lambda path: edit(path, lambda m: m.update(dtype="uint32")), "bytes instead of"),
        (lambda path: edit(path, lambda m: m.update(dtype="uint7")), "damaged .*uint7"),
        (lambda path: edit(path, lambda m: m.update(bos_id=None)), "damaged"),
    ],
    ids=[
        *("train cut", "valid cut", "no train", "list", "binary", "empty", "torn", "bare"),
        *("no split", "words", "fewer", "wider", "dtype", "no bos"),
    ],
)
def test_damage_is_refused_when_shards_are_opened_with_a_remedy_that_works(
    harm: Callable[[Path], None], said: str, copy: Path
) -> None:
    harm(copy)
    with pytest.raises(UserError, match=said) as error:
        Shards(copy)
    assert str(error.value).endswith(f"delete {copy} and run `python -m experiments data` again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("harm", [shutil.rmtree, lambda path: (path / "manifest.json").unlink()], ids=["all", "one"])
def test_shards_that_were_never_finished_are_to_be_built(harm: Callable[[Path], None], copy: Path) -> None:
    harm(copy)
    with pytest.raises(UserError, match=r"no shards in .*manifest\.json.*build them with `python -m experiments data`"):
        Shards(copy)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_verifying_finds_one_flipped_byte_anywhere(name: str, place: float, copy: Path) -> None:
    raw = bytearray((copy / name).read_bytes())
    raw[round(place * (len(raw) - 1))] ^= 0xFF
    (copy / name).write_bytes(raw)
    with pytest.raises(UserError, match=rf"{name} is not what the manifest says: delete"):
        Shards(copy).verify()


@pytest.mark.parametrize("name", FILES[2:])
def test_a_missing_tokenizer_or_byte_table_is_refused_when_shards_are_opened(name: str, copy: Path) -> None:
    (copy / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is damaged \(it is not there\): delete .* again$"):
        Shards(copy)


@pytest.mark.parametrize("name", FILES[2:])
@pytest.mark.parametrize("harm", ["empty", "cut"])
def test_a_broken_tokenizer_or_byte_table_is_refused_by_name_when_it_is_used(harm: str, name: str, copy: Path) -> None:
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(b"" if harm == "empty" else raw[:-7])
    shards = Shards(copy)
    for use in (shards.verify, lambda: shards.token_bytes if name == "token_bytes.npy" else shards.tokenizer):
        with pytest.raises(UserError, match=rf"{name} is .*: delete .* again$") as error:
            use()
        assert "\n" not in str(error.value)


def test_a_vocabulary_size_that_was_edited_is_found_before_a_token_is_scored(copy: Path) -> None:
    edit(copy, lambda m: m.update(vocab_size=VOCAB - 1))
    with pytest.raises(UserError, match=r"token_bytes\.npy is damaged \(320 tokens instead of 319\)"):
        Shards(copy).token_bytes  # noqa: B018
