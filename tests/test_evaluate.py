"""If these fail, the losses and bits per byte that arms are compared by are wrong, or validating changes the training.

The reference is slow and independent: logits token by token in float64, and the length of the text itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import awake_model, tiny_config, tiny_engram, tiny_tables
from tiny_study import VOCAB, build_shards
from torch import Tensor

from engram.config import ModelConfig, OverEncodingConfig
from engram.moe import RoutedExperts, Router
from engram.transformer import Transformer
from experiments.evaluate import Validation, validate
from experiments.shards import Shards, valid_batches

T, TOKENS = 32, 32 * 22  # 22 sequences
RANDOM = tiny_engram(tables=tiny_tables(lookup="random"))
CONFIGS: dict[str, dict[str, Any]] = {
    "engram": {"engram": tiny_engram()},
    "streams": {"engram": tiny_engram(), "n_streams": 2},
    "random-ids": {"engram": RANDOM},
    "over-encoding": {"over_encoding": OverEncodingConfig(tables=tiny_tables(n_slots=((31, 37, 41, 43),)))},
    "dense": {"moe": None},
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return build_shards(tmp_path_factory.mktemp("evaluate"))


def config_of(arm: str) -> ModelConfig:
    return tiny_config(vocab_size=VOCAB, **CONFIGS[arm])


def with_plain_experts(model: Transformer) -> Transformer:
    """Grouped products may round a token's sum differently in another batch; the loop does as little as it can."""
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            module.backend = "loop"
    return model


def score(model: Transformer, shards: Shards, n_sequences: int, precision: str = "fp32") -> Validation:
    return validate(model, valid_batches(shards, TOKENS, T, n_sequences), shards.token_bytes, precision)


def nats_by_hand(model: Transformer, rows: npt.NDArray[np.int64]) -> float:
    """Sum of -log p over the tokens, in float64, a sequence at a time; sequence i draws the random rows of -1 - i."""
    total = 0.0
    with torch.no_grad():
        for i, row in enumerate(rows):
            ids = torch.from_numpy(row)[None]
            logits = model(ids[:, :-1], draws_B=torch.tensor([-1 - i]))[0].double()
            for logit_V, target in zip(logits, row[1:], strict=True):
                total -= float(logit_V[target] - torch.logsumexp(logit_V, 0))
    return total


@pytest.mark.parametrize("arm", CONFIGS)
def test_nats_and_bits_per_byte_are_those_of_a_slow_sum_over_the_text(arm: str, shards: Shards) -> None:
    """Within 1e-5: the fast path sums float32 losses over a batch before it goes on in float64."""
    model = with_plain_experts(awake_model(config_of(arm)))
    rows = np.concatenate(valid_batches(shards, TOKENS, T, 5))
    result = score(model, shards, 5)
    nats = nats_by_hand(model, rows)
    assert result.tokens == TOKENS == rows[:, 1:].size
    assert result.nats_per_token == pytest.approx(nats / TOKENS, rel=1e-5)
    assert result.nats_per_token > math.log(VOCAB), "noise must be worse than a guess, or the check is weak"
    # The targets are the stream from its second token on, so their text is the text without the first begin token's.
    text = shards.tokenizer.decode(rows[:, 1:].ravel().tolist(), skip_special_tokens=True)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_model_that_guesses_scores_the_logarithm_of_its_vocabulary(shards: Shards) -> None:
    model = awake_model(config_of("dense"))
    torch.nn.init.zeros_(model.head_VD)
    result = score(model, shards, 4)
    assert result.nats_per_token == pytest.approx(math.log(VOCAB), abs=1e-6)
    n_bytes = int(shards.token_bytes[np.concatenate(valid_batches(shards, TOKENS, T, 4))[:, 1:]].sum())
    assert result.bits_per_byte == pytest.approx(TOKENS * math.log2(VOCAB) / n_bytes, rel=1e-6)


@pytest.mark.parametrize("arm", CONFIGS)
def test_the_result_does_not_depend_on_the_batch_size(arm: str, shards: Shards) -> None:
    """To 1e-6 relative: sums in another order. For 4 and 5 the last batch is smaller, for 22 it is the only one."""
    model = with_plain_experts(awake_model(config_of(arm)))
    alone, *others = (score(model, shards, n) for n in (1, 4, 5, 22))
    for other in others:
        assert other.nats_per_token == pytest.approx(alone.nats_per_token, rel=1e-6)
        assert other.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)
        assert other.tokens == alone.tokens


def test_random_rows_are_others_for_every_sequence_and_the_same_in_every_validation(shards: Shards) -> None:
    """Equal texts then score unequally, while a model that reads text scores them equally."""
    row = valid_batches(shards, T, T, 1)[0]
    blind, reading = (with_plain_experts(awake_model(config_of(arm))) for arm in ("random-ids", "engram"))

    def scores(model: Transformer, n: int) -> Validation:
        return validate(model, [np.repeat(row, n, 0)], shards.token_bytes, "fp32")

    assert scores(reading, 6).nats_per_token == pytest.approx(scores(reading, 1).nats_per_token, rel=1e-6)
    assert abs(scores(blind, 6).nats_per_token - scores(blind, 1).nats_per_token) > 1e-3
    assert scores(blind, 6) == scores(blind, 6)


def test_random_rows_of_validation_are_never_those_of_training(shards: Shards) -> None:
    model = awake_model(config_of("random-ids"))
    drawn: list[Tensor] = []
    assert model.hasher is not None
    model.hasher.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[2]))
    score(model, shards, 4)
    numbers = torch.cat(drawn)
    assert len(numbers.unique()) == len(numbers) == TOKENS // T
    assert (numbers < 0).all(), "training counts its sequences from 0 upwards"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arm", CONFIGS)
def test_validation_leaves_the_model_as_it_was(arm: str, training: bool, shards: Shards) -> None:
    """Mode, weights, load counters, balancing biases, gradients: nothing moves."""
    model = awake_model(config_of(arm)).train(training)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.load_E.copy_(torch.arange(len(router.load_E)))
        router.bias_E.uniform_(-0.1, 0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (arm == "dense") == (not any(name.endswith("load_E") for name in before))
    score(model, shards, 4)
    assert [module.training for module in model.modules()] == [training] * len(list(model.modules()))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_validation_scores_with_the_bias_that_training_has_moved(shards: Shards) -> None:
    model = awake_model(config_of("engram"))
    before = score(model, shards, 4)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.bias_E.copy_(torch.linspace(-2, 2, len(router.bias_E)))
    assert abs(score(model, shards, 4).nats_per_token - before.nats_per_token) > 1e-3


def test_bf16_is_close_to_fp32_and_is_not_fp32(shards: Shards) -> None:
    """Eight bits of mantissa: about a percent of a loss this large."""
    model = awake_model(config_of("engram"), scale=0.1)
    exact, rounded = score(model, shards, 4), score(model, shards, 4, "bf16")
    assert rounded.nats_per_token != exact.nats_per_token
    assert rounded.nats_per_token == pytest.approx(exact.nats_per_token, rel=0.01)
    assert next(iter(model.parameters())).dtype == torch.float32


def test_more_tokens_weigh_by_their_number(shards: Shards) -> None:
    """A last batch of one sequence counts one sequence, not one batch."""
    model = with_plain_experts(awake_model(config_of("engram")))
    rows = np.concatenate(valid_batches(shards, 5 * T, T, 5))
    nats = [validate(model, [row[None]], shards.token_bytes, "fp32").nats_per_token for row in rows]
    result = validate(model, [rows[:4], rows[4:]], shards.token_bytes, "fp32")
    assert result.nats_per_token == pytest.approx(sum(nats) / 5, rel=1e-6)


def test_tokens_of_no_text_cost_nats_but_no_bytes(shards: Shards) -> None:
    """Begin tokens are predicted too: they count in both losses, and stand for no byte."""
    model = with_plain_experts(awake_model(replace(config_of("dense"), bos_id=shards.bos_id)))
    row = valid_batches(shards, T, T, 1)[0].copy()
    plain = validate(model, [row], shards.token_bytes, "fp32")
    lost = int(shards.token_bytes[row[0, -1]])
    assert lost > 0
    row[0, -1] = shards.bos_id
    ended = validate(model, [row], shards.token_bytes, "fp32")
    n_bytes = int(shards.token_bytes[row[0, 1:]].sum())
    for result, text_bytes in ((plain, n_bytes + lost), (ended, n_bytes)):
        assert result.bits_per_byte == pytest.approx(result.nats_per_token * T / math.log(2) / text_bytes, rel=1e-9)
