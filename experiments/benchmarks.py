"""Which benchmarks there are: the harness's task, shots, metric, and the groups that `eval --tasks` names.

    paper     Table 1's tasks that the harness has, with the paper's shots
    small     those that carry signal below a billion parameters, and bits per byte of held-out text by domain
    offline   those that can be scored from local files

What cannot be had is listed with its reason, so that a table can say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.settings import UserError

HARNESS = "0.4.13"
"""Version of lm-evaluation-harness that the tasks' names were checked against."""


@dataclass(frozen=True)
class Benchmark:
    """One line of a table of benchmarks."""

    task: str
    """The harness's task, group or tag; `bits_per_byte` is our own."""
    shots: int = 0
    metric: str = "acc"
    guess: float | None = None
    """What guessing scores where the model writes its answer; None if that is not known."""
    filter: str = ""
    """Which of the harness's filters of an answer counts; empty takes its first."""
    missing: str = ""
    """Why it cannot be scored anywhere; empty if it can."""

    @property
    def name(self) -> str:
        return f"{self.task}_{self.shots}shot" if self.shots else self.task


TEXT = Benchmark("bits_per_byte", metric="bits_per_byte")
"""Held-out text, every domain for itself. Not a task of the harness; computed from the model's own tokens."""

_RUNS_CODE = "runs code that the model wrote: use the harness itself, with --confirm_run_unsafe_code"
_NOT_THERE = "the harness has no such task"

SMALL = (
    Benchmark("blimp"),
    Benchmark("lambada_openai"),
    Benchmark("hellaswag"),
    Benchmark("arc_easy"),
    Benchmark("piqa"),
    Benchmark("sciq"),
    Benchmark("winogrande"),
    TEXT,
)
OFFLINE = (*SMALL, Benchmark("arc_challenge"), Benchmark("openbookqa"), Benchmark("boolq"))
PAPER = (
    Benchmark("pile", missing="the text is no longer published: see bits_per_byte"),
    Benchmark("mmlu", 5),
    Benchmark("mmlu_redux_generative", 5, "exact_match", guess=0.25),
    Benchmark("mmlu_pro", 5, "exact_match"),
    Benchmark("cmmlu", 5),
    Benchmark("ceval-valid", 5),
    Benchmark("agieval", guess=0.0),
    Benchmark("arc_easy", 25),
    Benchmark("arc_challenge", 25),
    Benchmark("triviaqa", 5, "exact_match", guess=0.0),
    Benchmark("triviaqa_zh", 5, missing="internal to the paper's authors"),
    Benchmark("popqa", 15, missing=_NOT_THERE),
    Benchmark("ccpm", missing=_NOT_THERE),
    Benchmark("bbh_fewshot", 3, "exact_match"),
    Benchmark("hellaswag"),
    Benchmark("piqa"),
    Benchmark("winogrande", 5),
    Benchmark("drop", 1, "f1"),
    Benchmark("race_middle", 5, missing="the harness has RACE-High alone, as `race`"),
    Benchmark("race", 5),
    Benchmark("c3", missing=_NOT_THERE),
    Benchmark("humaneval", metric="pass@1", missing=_RUNS_CODE),
    Benchmark("mbpp", 3, "pass_at_1", missing=_RUNS_CODE),
    Benchmark("cruxeval_input", metric="pass@1", missing=_RUNS_CODE),
    Benchmark("cruxeval_output", metric="pass@1", missing=_RUNS_CODE),
    Benchmark("gsm8k", 8, "exact_match", guess=0.0, filter="strict-match"),
    Benchmark("mgsm_direct", 8, "exact_match", guess=0.0),
    Benchmark("minerva_math", 4, "exact_match", guess=0.0),
)
GROUPS = {"small": SMALL, "offline": OFFLINE, "paper": PAPER}


def choose(names: Sequence[str]) -> list[Benchmark]:
    """Groups, names of benchmarks such as `arc_easy_25shot`, or any task of the harness, each once.

    A task that stands in no group is taken with 0 shots and the metric `acc`.

    Raises:
        UserError: nothing is named.
    """
    known = {b.name: b for group in reversed(GROUPS.values()) for b in group}
    chosen: dict[str, Benchmark] = {}
    for name in (word for text in names for word in text.split(",") if word):
        for benchmark in GROUPS.get(name, (known.get(name, Benchmark(name)),)):
            chosen[benchmark.name] = benchmark
    if not chosen:
        raise UserError(f"--tasks names nothing: give {', '.join(GROUPS)}, or tasks of the harness")
    return list(chosen.values())
