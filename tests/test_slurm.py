"""If these fail, a launch on a cluster submits a run twice, or cannot say what it did.

SLURM itself is not needed here: where it is asked something, small programs stand in for its commands. What only a real
one can show is in test_slurm_cluster.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slurm_stand_in import program, queue, submitted
from small_runs import small_run

from experiments import overview as overview_module
from experiments.overview import as_dict, overview, watch
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime
from experiments.slurm_plan import decide
from experiments.squeue import Job, SlurmSilent, jobs_of
from experiments.status import RunStatus, add_job, read_status

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


def test_jobs_are_found_by_submission_and_element(commands: Path, tmp_path: Path) -> None:
    queue(
        commands,
        "7_0|engram-ab12|RUNNING|0|node[1-2]|None|",
        "7_1|engram-ab12|PENDING|3||(Priority)|",
        "9|engram-cd34|COMPLETING|0|node1|None|",
        "8_0|somebody-ab12|RUNNING|0|node1|None|",
    )
    # sbatch had not answered yet when the launcher was killed: job is None, and the job is found all the same.
    dirs = [submitted(tmp_path, seed, index=seed, job=None)[1] for seed in range(2)]
    dirs.append(submitted(tmp_path, 2, submission="cd34", index=0)[1])
    dirs.append(submitted(tmp_path, 3, submission="gone", index=0)[1])
    dirs.append(RunDir.create(tmp_path / "runs", small_run(4)))
    names = [run_dir.path.name for run_dir in dirs]
    assert jobs_of(dirs) == {
        names[0]: Job(id="7_0", state="RUNNING", restarts=0, host="node[1-2]"),
        names[1]: Job(id="7_1", state="PENDING", restarts=3, host="Priority"),
        names[2]: Job(id="9", state="COMPLETING", restarts=0, host="node1"),
    }
    assert [job.phase for job in jobs_of(dirs).values()] == ["running", "requeued", "ending"]


def test_slurm_is_not_asked_where_nothing_was_submitted(commands: Path, tmp_path: Path) -> None:
    program(commands / "squeue", "exit 1")
    assert jobs_of([RunDir.create(tmp_path, small_run())]) == {}


def test_runs_brought_home_from_a_cluster_are_trained_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No squeue there: a launch goes on, and a finished sweep does not even mention it."""
    monkeypatch.setenv("PATH", "/nowhere")
    run, run_dir = submitted(tmp_path)
    with pytest.raises(SlurmSilent, match="no squeue on this machine"):
        jobs_of([run_dir])
    result = {"steps": 5, "valid_loss": 4.0}
    run_dir.write_final({"status": "final", "result": result, "cost": {"seconds": 1.0, "tokens_per_s": 1.0}})
    assert jobs_of([run_dir]) == {}
    assert overview([run], Runtime(runs_dir=str(tmp_path / "runs"), device="cpu")).silent == ""


def test_a_silent_controller_stops_a_launch_but_not_status(commands: Path, tmp_path: Path) -> None:
    program(commands / "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    run, _ = submitted(tmp_path)
    with pytest.raises(SlurmSilent, match="squeue failed: Unable to contact slurm controller"):
        decide([run], tmp_path / "runs", 1e9)
    now = overview([run], Runtime(runs_dir=str(tmp_path / "runs"), device="cpu"))
    assert now.rows[0].state == "planned"
    assert as_dict(now)["slurm_silent"] == "squeue failed: Unable to contact slurm controller"


# What SLURM adds to a run's state


def row_with(run: Run, run_dir: RunDir, job: Job | None = None) -> RunStatus:
    return add_job(read_status(run, run_dir), job, run_dir)


def job(state: str, restarts: int = 0) -> Job:
    return Job(id="7_0", state=state, restarts=restarts, host="node1")


def test_a_run_in_slurm_is_told_by_its_job_until_a_worker_has_it(tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path)
    assert row_with(run, run_dir, job("PENDING")).state == "queued"
    assert row_with(run, run_dir, job("PENDING", restarts=1)).state == "requeued"
    assert row_with(run, run_dir, job("RUNNING")).state == "starting"
    run_dir.note_attempt("start", host="node1", job="7_0")
    with run_dir.owned():
        row = row_with(run, run_dir, job("RUNNING"))
    assert (row.state, row.job, row.slurm, row.host) == ("running", "7_0", "RUNNING", "node1")
    run_dir.note_attempt("interrupted", step=3)
    assert row_with(run, run_dir, job("COMPLETING")).state == "interrupted"
    assert row_with(run, run_dir, job("PENDING", restarts=1)).state == "requeued"


def test_a_job_that_never_started_a_worker_is_a_failure_with_its_own_words(tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path)
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "7_0_0_log.err"
    log.write_text("python: command not found\n\n")
    row = row_with(run, run_dir)
    assert (row.state, row.error, row.log) == ("failed", "python: command not found", str(log))


def test_a_job_whose_worker_vanished_is_a_failure(tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path)
    run_dir.note_attempt("start", job="7_0")
    row = row_with(run, run_dir)
    assert (row.state, row.error) == ("failed", "job 7_0 has left the queue without a word")


@pytest.mark.parametrize("event", ["interrupted", "failed"])
def test_what_the_worker_noted_counts_more_than_that_its_job_is_gone(event: Any, tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path)
    run_dir.note_attempt("start", job="7_0")
    run_dir.note_attempt(event, error="OSError: no space left")
    row = row_with(run, run_dir)
    assert row.state == event
    assert row.error == ("OSError: no space left" if event == "failed" else None)


def test_a_cancelled_run_has_not_failed(tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path, cancelled=True)
    assert row_with(run, run_dir).state == "planned"
    run_dir.note_attempt("start", job="7_0")
    assert row_with(run, run_dir).state == "interrupted"


def test_a_local_start_after_the_job_is_not_blamed_on_it(tmp_path: Path) -> None:
    run, run_dir = submitted(tmp_path)
    run_dir.note_attempt("start", job=None)
    assert row_with(run, run_dir).state == "interrupted"


def test_watching_shows_each_change_and_ends_with_the_last_run_or_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small_run()
    run_dir = RunDir.create(tmp_path, run)
    final = {
        "status": "final",
        "result": {"steps": 5, "valid_loss": 4.0},
        "cost": {"seconds": 1.0, "tokens_per_s": 1.0},
    }
    runtime = Runtime(runs_dir=str(tmp_path), device="cpu", workers=1)
    monkeypatch.setattr(overview_module.time, "sleep", lambda _: run_dir.write_final(final))
    watch([run], runtime)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("1 runs")] == ["1 runs: 1 planned", "1 runs: 1 final"]

    def ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(overview_module.time, "sleep", ctrl_c)
    watch([small_run(1)], runtime)
    assert "1 runs: 1 planned" in capsys.readouterr().out
