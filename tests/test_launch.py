"""If these fail, a sweep may train a run twice, stop at the first failure, or lose work when it is interrupted.

Launchers and worker processes are real; only the training inside `fake_worker.py` is not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from experiments.display import PlainDisplay
from experiments.launch import launch
from experiments.loading import save_run
from experiments.pool import LocalPool
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime, UserError
from experiments.sweep import LaunchReport, Stop, Sweep, new_task

TESTS = Path(__file__).parent
WORKER = (sys.executable, str(TESTS / "fake_worker.py"))
LAUNCHER = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from small_runs import small_run
from experiments.launch import launch
from experiments.settings import Runtime
path, workers, steps, *seeds = sys.argv[1:]
runtime = Runtime(runs_dir=path + "/runs", workers=int(workers), device="cpu")
runs = [small_run(int(seed), int(steps)) for seed in seeds]
sys.exit(launch(runs, runtime, [path + "/plan.json"], command={WORKER!r}).exit_code)
"""


class Place:
    """A directory of runs, and what its fake workers are told to do."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan(step_s=0.01)

    def plan(self, step_s: float, **trouble: str) -> None:
        (self.path / "plan.json").write_text(json.dumps({"step_s": step_s} | trouble))

    def runtime(self, workers: int) -> Runtime:
        return Runtime(runs_dir=str(self.path / "runs"), workers=workers, device="cpu")

    def launch(self, runs: Sequence[Run], workers: int = 3) -> LaunchReport:
        return launch(runs, self.runtime(workers), [str(self.path / "plan.json")], command=WORKER)

    @contextmanager
    def launcher(self, runs: Sequence[Run], workers: int = 2) -> Iterator[subprocess.Popen[str]]:
        """A launcher in a process group of its own, as a shell would start it."""
        seeds = [str(run.spec.seed) for run in runs]
        argv = [sys.executable, "-c", LAUNCHER, str(self.path), str(workers), str(runs[0].spec.train.steps), *seeds]
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        with process:
            yield process

    def dir(self, run: Run) -> RunDir:
        return RunDir(self.path / "runs" / run.spec.run_id)

    def log(self, run: Run) -> str:
        return (self.dir(run).path / "train.log").read_text()

    def attempts(self, runs: Sequence[Run]) -> list[int]:
        return [self.dir(run).attempts() for run in runs]

    def states(self, runs: Sequence[Run]) -> list[str]:
        return [self.dir(run).state() for run in runs]

    def lines(self, run: Run, name: str) -> list[dict[str, Any]]:
        path = self.dir(run).path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ids(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run.spec.run_id for run in runs)


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.02)


def most_at_once(place: Place, runs: Sequence[Run]) -> int:
    spans = [place.lines(run, "spans.jsonl")[0] for run in runs]
    return max(sum(other["from"] <= span["from"] < other["to"] for other in spans) for span in spans)


def test_every_run_ends_final_and_the_lines_say_so(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [small_run(seed) for seed in range(3)]
    report = place.launch(runs)
    assert report.final == ids(runs)
    assert report.exit_code == 0
    assert place.states(runs) == ["final"] * 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == ["start dense seed 0", "start dense seed 1", "start dense seed 2"]
    assert sum("valid loss 4.0000" in line for line in lines) == 3
    assert any("3 of 3 done, sweep ETA 0s" in line for line in lines)


def test_a_failed_run_does_not_stop_the_others_and_is_named_with_its_log(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [small_run(seed) for seed in range(3)]
    place.plan(0.01, **{runs[0].spec.run_id: "fail"})
    report = place.launch(runs, workers=1)
    assert report.final == ids(runs[1:])
    (failure,) = report.failed
    assert (failure.run_id, failure.error) == (runs[0].spec.run_id, "ValueError: the fake was told to fail")
    assert "started" in failure.log.read_text()
    assert report.exit_code == 1
    said = capsys.readouterr().out
    assert f"failed: dense seed 0: ValueError: the fake was told to fail\n  log: {failure.log}" in said


def test_a_failed_run_is_tried_again_by_the_next_launch_only(place: Place) -> None:
    run = small_run()
    place.plan(0.01, **{run.spec.run_id: "fail"})
    place.launch([run])
    assert place.attempts([run]) == [1]
    place.plan(0.01)
    assert place.launch([run]).final == ids([run])
    assert place.attempts([run]) == [2]


def test_a_worker_that_was_killed_is_a_failure_with_a_reason(place: Place) -> None:
    run = small_run()
    place.plan(0.01, **{run.spec.run_id: "die"})
    (failure,) = place.launch([run]).failed
    assert failure.error == "killed by signal 9 (Killed); out of memory is the usual reason"
    assert place.states([run]) == ["failed"], "the next `status` does not know"
    assert place.lines(run, "attempts.jsonl")[-1]["error"] == failure.error


def test_a_worker_that_noted_nothing_is_explained_by_its_own_output(place: Place) -> None:
    run = small_run()
    place.plan(0.01, **{run.spec.run_id: "fail"})
    place.launch([run])
    place.plan(0.01, **{run.spec.run_id: "mute"})
    (failure,) = place.launch([run]).failed
    assert failure.error == "cannot import anything", "an earlier attempt's error was reported"


def test_a_diverged_run_is_a_result_and_not_tried_again(place: Place) -> None:
    run = small_run()
    place.plan(0.01, **{run.spec.run_id: "diverge"})
    for _ in range(2):
        report = place.launch([run])
        assert (report.diverged, report.exit_code) == (ids([run]), 0)
    assert place.attempts([run]) == [1]


def test_final_runs_are_not_started_again(place: Place) -> None:
    runs = [small_run(seed) for seed in range(2)]
    place.launch(runs[:1])
    report = place.launch(runs)
    assert report.final == ids(runs)
    assert place.attempts(runs) == [1, 1]
    assert place.log(runs[0]).count("started") == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_no_more_workers_than_asked_for(place: Place, workers: int) -> None:
    runs = [small_run(seed) for seed in range(4)]
    place.plan(step_s=0.08)
    place.launch(runs, workers)
    assert most_at_once(place, runs) == workers


def test_a_run_that_another_process_holds_is_left_to_it(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [small_run(seed) for seed in range(2)]
    held = RunDir.create(place.path / "runs", runs[0])
    with held.owned():
        report = place.launch(runs)
    assert (report.skipped, report.final, report.exit_code) == (ids(runs[:1]), ids(runs[1:]), 1)
    assert "left to another process: dense seed 0" in capsys.readouterr().out
    assert not (held.path / "train.log").exists(), "a worker was started"


def test_two_launches_at_once_train_each_run_once(place: Place) -> None:
    runs = [small_run(seed) for seed in range(6)]
    place.plan(step_s=0.03)
    with place.launcher(runs) as one, place.launcher(runs) as other:
        said = [one.communicate()[0], other.communicate()[0]]
    assert place.states(runs) == ["final"] * 6, said
    assert place.attempts(runs) == [1] * 6
    steps = [[line["step"] for line in place.lines(run, "metrics.jsonl")] for run in runs]
    assert steps == [[1, 2, 3, 4, 5]] * 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_saves_its_runs_and_goes_on_later(place: Place, number: signal.Signals) -> None:
    runs = [small_run(seed, steps=40) for seed in range(3)]
    place.plan(step_s=0.05)
    with place.launcher(runs) as launcher:
        wait_until(lambda: all(place.lines(run, "metrics.jsonl") for run in runs[:2]))
        os.killpg(launcher.pid, number)  # the whole group, as a terminal does
        said = launcher.communicate()[0]
    assert launcher.returncode == 130, said
    assert "interrupted: 2 stopped part-way, 1 not started; the same command goes on from here" in said
    assert place.states(runs) == ["interrupted", "interrupted", "planned"]
    for run in runs[:2]:
        assert not list(place.dir(run).path.glob("final*"))
        assert place.lines(run, "attempts.jsonl")[-1]["event"] == "interrupted", "the worker did not exit 3"
        assert place.log(run).count("got SIG") == place.log(run).count("got SIGTERM") == 1, "the terminal reached it"
    place.plan(step_s=0.001)
    assert place.launch(runs).final == ids(runs)
    assert place.attempts(runs) == [2, 2, 1]
    for run in runs:
        assert [line["step"] for line in place.lines(run, "metrics.jsonl")] == list(range(1, 41)), "steps ran twice"


def test_a_second_interrupt_kills_workers_that_do_not_end(place: Place) -> None:
    run = small_run(steps=4000)
    place.plan(0.05, **{run.spec.run_id: "stubborn"})
    with place.launcher([run]) as launcher:
        wait_until(lambda: bool(place.lines(run, "metrics.jsonl")))
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert launcher.poll() is None, "the launcher left a worker behind"
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=10)[0]
    assert launcher.returncode == 130, said
    assert place.states([run]) == ["interrupted"]


def test_workers_are_asked_to_stop_when_the_launcher_itself_fails(place: Place) -> None:
    class BreaksDown(LocalPool):
        def start(self, run_dir: RunDir) -> subprocess.Popen[bytes]:
            if self.running:
                raise OSError("cannot start another process")
            return super().start(run_dir)

    runs = [small_run(seed, steps=400) for seed in range(2)]
    place.plan(step_s=0.05)
    pool = BreaksDown(place.runtime(workers=2), [str(place.path / "plan.json")], WORKER)
    tasks = [new_task(run, RunDir.create(place.path / "runs", run)) for run in runs]
    with pytest.raises(OSError, match="cannot start another process"):
        Sweep(tasks, pool, PlainDisplay()).run(Stop())
    assert pool.running[0].wait(timeout=10) in (3, -signal.SIGTERM)


def test_a_directory_of_another_spec_stops_the_launch_before_any_worker(place: Place) -> None:
    runs = [small_run(seed) for seed in range(2)]
    config = place.dir(runs[1]).path / "config.yaml"
    config.parent.mkdir(parents=True)
    save_run(small_run(seed=9), config)
    with pytest.raises(UserError, match="holds another run"):
        place.launch(runs)
    assert place.attempts(runs) == [0, 0]


def test_a_place_that_cannot_be_written_stops_the_launch_with_a_remedy(place: Place) -> None:
    (place.path / "runs").write_text("a file where the directory should be")
    with pytest.raises(OSError, match=r"cannot write to .*runs: .*runtime\.runs_dir=DIR"):
        place.launch([small_run()])


def test_a_disk_too_small_for_the_weights_stops_the_launch(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(OSError, match="the weights of 1 run alone take"):
        place.launch([small_run()])
    assert place.attempts([small_run()]) == [0]


def test_a_worker_gets_the_threads_of_the_runtime(place: Place) -> None:
    run = small_run()
    runtime = Runtime(runs_dir=str(place.path / "runs"), workers=1, threads=3, device="cpu")
    launch([run], runtime, [str(place.path / "plan.json")], command=WORKER)
    assert "threads 3, started" in place.log(run)
