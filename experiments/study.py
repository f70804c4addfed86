"""What a command was asked about: a suite of runs on a budget, and the data they train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from experiments.loading import DEFAULT_BUDGET, budget_names, load_budget
from experiments.settings import Budget, Run, UserError
from experiments.suites import SUITES, runs_of

NO_DATA = "not built"
"""Stands for the data's hash where runs are only counted."""


@dataclass(frozen=True)
class Study:
    """A suite on a budget."""

    suite: str
    budget: Budget

    def planned(self) -> list[Run]:
        """The runs as far as they can be told without data.

        Raises:
            UserError: a point of the grid cannot be allocated.
        """
        return runs_of(self.suite, self.budget, NO_DATA)

    def checked(self) -> list[Run]:
        """The same, if they can be run as the budget's runtime says.

        Raises:
            UserError: also where several processes cannot share a step, or tables cannot be stored as asked.
        """
        runs, runtime = self.planned(), self.budget.runtime
        for run in runs:
            runtime.check_tables(run.spec.train.optim, runtime.processes)
        runtime.micro_sequences(self.budget.train, runtime.processes)
        return runs


def parse_study(words: Sequence[str]) -> Study:
    """Read suite, budget and `key=value` changes from the words of a command line.

    Raises:
        UserError: a word is neither, or two of a kind.
    """
    overrides = tuple(word for word in words if "=" in word)
    suites = [word for word in words if word in SUITES]
    budgets = [word for word in words if "=" not in word and word not in SUITES]
    known = (*SUITES, *budget_names())
    unknown = [word for word in budgets if word not in known and not word.endswith((".yaml", ".yml"))]
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        raise UserError(
            f"{unknown[0]!r} is no suite ({', '.join(SUITES)}) and no budget ({', '.join(budget_names())}, or a YAML "
            f"file's path){f': did you mean {near[0]}?' if near else ''}"
        )
    if len(suites) > 1 or len(budgets) > 1:
        raise UserError(f"name one suite and one budget, not {' '.join(suites + budgets)}")
    budget = load_budget(budgets[0] if budgets else DEFAULT_BUDGET, overrides)
    return Study(suites[0] if suites else budget.suite, budget)


MANY_EPOCHS = 4
"""Text that is read more often teaches visibly less each time (Muennighoff et al. 2023, arXiv 2305.16264)."""


def repeats(study: Study, shards: Path) -> str | None:
    """What to say of runs that read their text many times over; None where they do not."""
    from experiments.shards import Shards

    text = Shards(shards).manifest["splits"]["train"]["tokens"]
    tokens = max(run.spec.train.tokens for run in study.planned())
    if tokens <= MANY_EPOCHS * text:
        return None
    return f"note: runs of up to {tokens:,} tokens read a text of {text:,} tokens {tokens / text:,.1f} times"


def runs_with_data(study: Study, *, build: bool) -> tuple[list[Run], Path]:
    """The suite's runs on its shards, which are built if asked; and where the shards lie.

    All that can be wrong with them is found here, before the first worker starts.

    Raises:
        UserError: a point cannot be allocated, the shards are missing and not to be built, or they do not fit.
    """
    from experiments.corpus import find, prepare
    from experiments.shards import Shards, check_vocab, valid_batches

    budget, data_dir = study.budget, Path(study.budget.runtime.data_dir)
    study.checked()  # what is impossible is refused before a corpus is read
    train = budget.train
    path = prepare(budget.data, data_dir) if build else find(budget.data, data_dir)
    if path is None:
        raise UserError(f"no data yet for {budget.name}: python -m experiments data {budget.name}")
    shards = Shards(path)
    check_vocab(shards, budget.backbone.vocab_size)
    valid_batches(shards, train.eval_tokens, train.seq_len, 1)
    backbone = replace(budget.backbone, bos_id=shards.bos_id)
    return runs_of(study.suite, replace(budget, backbone=backbone), shards.hash), path
