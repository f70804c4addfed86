"""If these fail, a sweep on a cluster loses work, trains a run twice, or ends with other losses than it would at home.

Everything is real: SLURM's daemons, submitit, the workers and their training. Whatever happens to a sweep here, its
results must equal, to the bit, those of the same runs trained without a break by a local launch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cluster import ROOT, Cluster, Sweep, cluster, kill_worker, n_steps, require_slurm, wait, write_budget

from experiments.rundir import RunDir

STEPS = 48
LONG = ("train.tokens=614400", "rhos=[0.5]")
LONG_STEPS = 300
LONGER = ("train.tokens=2457600", "rhos=[0.5]")
LONGER_STEPS = 1200


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require_slurm()
    with cluster(tmp_path_factory.mktemp("cluster"), "--cpus", "4") as started:
        yield started


@pytest.fixture(scope="session")
def budget(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_slurm()
    return write_budget(tmp_path_factory.mktemp("study"))


class AtHome:
    """Results of uninterrupted local launches, each trained once."""

    def __init__(self, path: Path, budget: Path) -> None:
        self.path, self.budget = path, budget
        self.known: dict[tuple[str, ...], dict[str, Any]] = {}

    def __call__(self, *changes: str) -> dict[str, Any]:
        if changes not in self.known:
            sweep = Sweep(self.path / str(len(self.known)), self.budget, None, *changes)
            sweep.call("launch")
            self.known[changes] = sweep.results()
        return self.known[changes]


@pytest.fixture(scope="session")
def at_home(tmp_path_factory: pytest.TempPathFactory, budget: Path) -> AtHome:
    return AtHome(tmp_path_factory.mktemp("home"), budget)


@pytest.fixture(autouse=True)
def _empty_queue(slurm: Cluster) -> Iterator[None]:
    yield
    slurm.call("scancel", "--me")
    wait(slurm.empty)


def starts(sweep: Sweep) -> list[int]:
    return [events.count("start") for events in sweep.events()]


def test_two_launches_at_the_same_moment_train_each_run_once(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    """The array to its end, and what a second launch, `status` and the attempts say of it."""
    sweep = Sweep(tmp_path, budget, slurm)
    expected = at_home()
    launches = [
        subprocess.Popen(
            sweep.command("launch", *sweep.slurm_words()),
            cwd=ROOT, env=slurm.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    said = [launch.communicate(timeout=120)[0] for launch in launches]
    assert sorted("submitted 2 runs as job" in text for text in said) == [False, True], said
    assert sorted("nothing to submit" in text for text in said) == [False, True], said
    rows = sweep.rows()
    assert {row["state"] for row in rows} <= {"queued", "starting", "running"}
    assert all(row["slurm"] in ("PENDING", "RUNNING") and re.fullmatch(r"\d+_\d", row["job"]) for row in rows)
    sweep.wait_to_end()
    assert sweep.results() == expected
    assert sweep.events() == [["start"], ["start"]]
    assert sweep.steps_taken() == [list(range(1, STEPS + 1))] * 2
    wait(slurm.empty)
    assert sweep.states() == ["final", "final"]
    assert "nothing to submit" in sweep.submit()
    assert "all done before" in sweep.call("launch")


def test_kill_9_of_the_worker_fails_the_job_and_the_next_launch_repeats_only_that_run(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm)
    sweep.submit()
    victim, other = sweep.dirs()
    wait(lambda: n_steps(victim) >= 3, sweep.log)
    kill_worker(victim)
    wait(lambda: (other / "final.json").exists(), sweep.log)
    wait(slurm.empty)
    row = next(row for row in sweep.rows() if row["run_id"] == victim.name)
    assert (row["state"], row["error"]) == ("failed", "killed by signal 9 (Killed); out of memory is the usual reason")
    assert "submitted 1 run as job" in sweep.submit()
    sweep.wait_to_end()
    assert sweep.results() == at_home()
    assert sweep.events() == [["start", "failed", "start"], ["start"]]


@pytest.mark.slow
def test_a_cancelled_run_saves_and_goes_on_with_the_next_launch(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG, "seeds=[0,1]")
    sweep.submit("array_parallelism=1")
    wait(lambda: max(sweep.steps(), default=0) >= 3, sweep.log)
    with sweep.held_until_told_to_stop():
        assert "cancelled 1 running and 1 queued" in sweep.call("cancel")
    assert sweep.call("cancel").startswith(("nothing to cancel", "cancelled 1 ending"))
    # Waits until the cancelled job has gone: it might have been requeued.
    assert "submitted 2 runs" in sweep.submit()
    sweep.wait_to_end()
    assert sweep.results() == at_home(*LONG, "seeds=[0,1]")
    assert sorted(sweep.events()) == [["start"], ["start", "interrupted", "start"]]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))] * 2, "a step was trained twice, or lost"


@pytest.mark.slow
def test_a_sweep_begun_in_slurm_is_finished_here(slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit()
    sweep.wait_for_step(3)
    with sweep.held_until_told_to_stop():
        assert "left to another process" in sweep.call("launch", code=1), "SLURM's run was taken"
        sweep.call("cancel")
    wait(slurm.empty)
    sweep.call("launch")
    assert sweep.results() == at_home(*LONG)
    assert sweep.events() == [["start", "interrupted", "start"]]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))]


@pytest.mark.slow
def test_a_preempted_run_saves_is_requeued_and_goes_on(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit()
    sweep.wait_for_step(5)
    with sweep.held_until_told_to_stop():
        slurm.preempt(seconds=20)
    wait(lambda: sweep.states() == ["requeued"], sweep.log)
    assert "nothing to submit" in sweep.submit(), "a requeued run was submitted again"
    sweep.wait_to_end()
    assert sweep.results() == at_home(*LONG)
    assert sweep.events() == [["start", "interrupted", "start"]]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))], "a step was trained twice, or lost"


@pytest.mark.slow
def test_a_cluster_that_preempts_with_sigterm_loses_nothing_either(
    budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    with cluster(tmp_path / "cluster", "--cpus", "4", "--no-user-signal") as slurm:
        sweep = Sweep(tmp_path, budget, slurm, *LONG)
        sweep.submit()
        sweep.wait_for_step(5)
        with sweep.held_until_told_to_stop():
            slurm.preempt(seconds=5)
        sweep.wait_to_end()
        assert sweep.results() == at_home(*LONG)
        assert sweep.events() == [["start", "interrupted", "start"]]
        assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))]


@pytest.mark.slow
def test_several_processes_of_one_run_are_preempted_and_go_on(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit("tasks_per_node=2")
    sweep.wait_for_step(5)
    with sweep.held_until_told_to_stop():
        slurm.preempt(seconds=5)
    sweep.wait_to_end()
    assert sweep.results() == at_home(*LONG, "runtime.processes=2")
    assert sweep.events() == [["start", "interrupted", "start"]]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))]


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit_is_requeued_until_it_is_done(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit("time=1")
    sweep.wait_for_step(5)
    with sweep.held_until_told_to_stop():
        pass  # until the minute is over
    wait(sweep.finished, sweep.log, seconds=900)
    assert sweep.results() == at_home(*LONG)
    (events,) = sweep.events()
    assert events.count("start") >= 2, "the limit was never reached"
    assert events == (["start", "interrupted"] * len(events))[: len(events)]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))]


@pytest.mark.slow
def test_a_run_requeued_by_hand_saves_and_goes_on(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit()
    sweep.wait_for_step(5)
    with sweep.held_until_told_to_stop():
        slurm.call("scontrol", "requeue", sweep.job())
    sweep.wait_to_end()
    assert sweep.results() == at_home(*LONG)
    assert sweep.events() == [["start", "interrupted", "start"]]
    assert sweep.steps_taken() == [list(range(1, LONG_STEPS + 1))]


@pytest.mark.slow
def test_a_killed_slurmd_that_comes_back_disturbs_nothing(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    sweep.submit()
    sweep.wait_for_step(3)
    with sweep.held():
        os.kill(slurm.pid("slurmd"), signal.SIGKILL)
        time.sleep(2)
        slurm.start_what_is_down()
    sweep.wait_to_end()
    wait(slurm.empty)
    assert sweep.results() == at_home(*LONG)
    assert sweep.events() == [["start"]]


@pytest.mark.slow
def test_a_run_on_a_node_that_was_given_up_is_not_trained_twice(budget: Path, at_home: AtHome, tmp_path: Path) -> None:
    """SLURM takes the node for dead and queues the job again, while its worker goes on."""
    with cluster(tmp_path / "cluster", "--cpus", "4", "--node-timeout", "5") as slurm:
        sweep = Sweep(tmp_path, budget, slurm, *LONGER, "runtime.checkpoint_every_s=1")
        sweep.submit()
        sweep.wait_for_step(50)
        with sweep.held():
            os.kill(slurm.pid("slurmd"), signal.SIGKILL)
            wait(lambda: slurm.call("squeue", "-h", "-o", "%T").strip() == "PENDING", sweep.log)
            (row,) = sweep.rows()
            assert (row["state"], row["slurm"]) == ("running", "PENDING")
        sweep.wait_for_step(70)
        slurm.start_what_is_down()
        wait(sweep.finished, sweep.log, seconds=600)
        assert sweep.results() == at_home(*LONGER)
        # The first worker is killed once slurmd is back, perhaps after it has seen its parent gone and has saved.
        assert starts(sweep) == [2]
        (steps,) = sweep.steps_taken()
        assert LONGER_STEPS <= len(steps) < 1.5 * LONGER_STEPS, "more was lost than since the last checkpoint"
        assert sum(later != step + 1 for step, later in pairwise(steps)) <= 1, "two workers wrote at the same time"


@pytest.mark.slow
def test_a_job_waits_for_a_process_that_has_the_run_and_then_goes_on(
    slurm: Cluster, budget: Path, at_home: AtHome, tmp_path: Path
) -> None:
    """As after a node was out of reach: the former process still lives. Nobody gives up, nobody trains twice."""
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    slurm.preempt(seconds=60)  # so that the job stays in the queue
    sweep.submit()
    (path,) = sweep.dirs()
    with RunDir(path).owned():
        slurm.call("scancel", "--name=wrap")
        wait(lambda: sweep.rows()[0]["slurm"] == "RUNNING", sweep.log)
        time.sleep(3)
        assert sweep.events() == [[]], "a worker was started"
    sweep.wait_to_end()
    assert sweep.results() == at_home(*LONG)
    assert sweep.events() == [["start"]]


@pytest.mark.slow
def test_a_job_gives_up_on_a_run_that_another_process_keeps(slurm: Cluster, budget: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, budget, slurm, *LONG)
    slurm.preempt(seconds=60)
    sweep.submit("lock_wait_s=1")
    (path,) = sweep.dirs()
    with RunDir(path).owned():
        slurm.call("scancel", "--name=wrap")
        wait(slurm.empty)
        assert sweep.states() == ["running"]
        assert "not submitted: 1 trained by a process outside SLURM" in sweep.submit()
    assert "is still being trained by another process: left to it" in sweep.log()
    assert sweep.events() == [[]]
    (row,) = sweep.rows()
    assert (row["state"], row["log"].endswith("_log.err")) == ("failed", True)


@pytest.mark.slow
def test_a_job_that_cannot_start_its_worker_is_explained(slurm: Cluster, budget: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, budget, slurm, "rhos=[0.5]")
    sweep.submit("setup=['echo no such module >&2; exit 7']")
    wait(slurm.empty)
    (row,) = sweep.rows()
    assert (row["state"], row["error"]) == ("failed", "no such module")
    assert sweep.events() == [[]]


def test_what_sbatch_refuses_leaves_nothing_behind(slurm: Cluster, budget: Path, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, budget, slurm, "rhos=[0.5]")
    said = sweep.call("launch", *sweep.slurm_words("partition=nowhere"), code=2)
    assert "invalid partition specified: nowhere" in said
    assert not list((tmp_path / "runs").glob("r*/slurm.json"))
    assert sweep.states() == ["planned"]
