"""If these fail, a launch on a cluster asks for the wrong resources, or a mistake in a profile is found by SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.profiles import Profile, fit_runtime, load_profile, profile_names
from experiments.settings import Runtime, UserError

ROOT = Path(__file__).parent.parent


def profile(path: Path, text: str, *changes: str) -> Profile:
    (path / "mine.yaml").write_text(text)
    return load_profile(str(path / "mine.yaml"), changes)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_of_the_suite_loads_and_fits_its_own_runtime(name: str) -> None:
    loaded = load_profile(name)
    runtime = fit_runtime(loaded, Runtime())
    assert runtime.device == ("cuda" if loaded.gpus_per_node else "cpu")
    text = (ROOT / "slurm" / f"{name}.yaml").read_text()
    assert text.count("\n#") > 8, "a profile explains itself"


def test_there_is_a_profile_for_every_size() -> None:
    assert profile_names() == ["cpu", "one-gpu", "one-node-8-gpus", "several-nodes"]
    assert [load_profile(name).n_tasks for name in profile_names()] == [1, 1, 8, 32]


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90), ("12:00:00", 720), ("'12:00:00'", 720), ("00:30:00", 30), ("2:00:30", 121), ("1-00:00:00", 1440),
        ("2-12:00", 3600),
    ],
)  # fmt: skip
def test_a_time_limit_means_what_sbatch_would_take_it_for(time: str, minutes: int, tmp_path: Path) -> None:
    """YAML by itself reads an unquoted 12:00:00 as the number 43200."""
    assert profile(tmp_path, f"time: {time}").minutes == minutes
    assert profile(tmp_path, "time: 5", "signal_delay_s=10", f"time={time.strip(chr(39))}").minutes == minutes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time: 10\ngpus: 2", "gpus: Key 'gpus' not in 'Profile'"),
        ("time: 10\nnodes: two", "nodes: Value 'two' of type 'str' could not be converted to Integer"),
        ("time: 1:30", "time=1:30 may mean minutes or hours: write HH:MM:SS"),
        ("time: soon", "time=soon must be minutes, HH:MM:SS or D-HH:MM:SS"),
        ("time: 0", "minutes=0 must be at least 1"),
        ("time: 10\nnodes: 0", "nodes=0 must be at least 1"),
        ("time: 10\nmem_gb: 0", "mem_gb=0.0 must be positive"),
        ("time: 10\narray_parallelism: 0", "array_parallelism=0 must be at least 1"),
        ("time: 10\ngpus_per_node: 2\ntasks_per_node: 4", "tasks_per_node=4 processes need a GPU each"),
        ("time: 3\nsignal_delay_s: 120", "signal_delay_s=120 must leave at least half of time=3 for work"),
        ("time: 10\nextra: {signal: USR1@5}", "extra.signal is set by the suite itself: remove it"),
        ("time: 10\nsetup: module load cuda", "setup: "),
        ("nodes: 1", "time"),
        ("3", "the file must map keys to values"),
        ("time: [", "mine.yaml: "),
    ],
)
def test_a_mistake_in_a_profile_is_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        profile(tmp_path, text)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_profile_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match="no profile 'gpu': choose one of cpu, one-gpu, one-node-8-gpus, several-nodes"):
        load_profile("gpu")


@pytest.mark.parametrize(
    ("changes", "runtime", "said"),
    [
        ({"tasks_per_node": 2}, {"processes": 2}, "leave runtime.processes at 1"),
        ({"gpus_per_node": 8}, {}, "gpus_per_node=8, but a run has 1 processes on a node"),
        ({"cpus_per_task": 2}, {"threads": 4}, "a run wants 4 threads of a task, but cpus_per_task=2"),
        ({}, {"device": "cuda"}, "runtime.device=cuda, but the profile has gpus_per_node=0"),
        ({"gpus_per_node": 1}, {"device": "cpu"}, "runtime.device=cpu, but the profile has gpus_per_node=1"),
    ],
)
def test_a_profile_that_contradicts_the_runtime_is_refused(
    changes: dict[str, Any], runtime: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        fit_runtime(Profile(time="60", **changes), Runtime(**runtime))
