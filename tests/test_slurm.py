"""If these fail, a launch on a cluster submits a run twice, or cannot say what it did.

SLURM itself is not needed here: where it is asked something, small programs stand in for its commands. What only a real
one can show is in test_slurm_cluster.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from experiments import overview as overview_module
from experiments import slurm_plan
from experiments.overview import as_dict, overview, watch
from experiments.profiles import Profile
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime, UserError
from experiments.slurm import cancel
from experiments.slurm_plan import confirm, decide
from experiments.squeue import Job, Record, SlurmSilent, jobs_of, record_of, write_record
from experiments.status import RunStatus, add_job, read_status

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent
RECORD = Record(
    submission="ab12", index=0, job="7_0", time="2026-01-01T00:00:00Z", profile="cpu", logs="", commit="c", dirty=False
)


# The queue, read from a stand-in


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of PATH, for programs that stand in for SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def queue(folder: Path, *lines: str) -> None:
    program(folder / "squeue", "cat <<'END'\n" + "\n".join(lines) + "\nEND")


def submitted(tmp_path: Path, seed: int = 0, **changes: Any) -> tuple[Run, RunDir]:
    run = small_run(seed)
    run_dir = RunDir.create(tmp_path / "runs", run)
    write_record(run_dir, replace(RECORD, logs=str(tmp_path / "logs"), **changes))
    return run, run_dir


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


# Deciding and cancelling


def test_only_what_is_missing_is_submitted(commands: Path, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    final, queued, failed, here, new = (small_run(seed) for seed in range(5))
    RunDir.create(runs_dir, final).write_final({"status": "final", "result": {}, "cost": {}})
    queue(commands, "7_0|engram-ab12|PENDING|0||(Priority)|")
    submitted(tmp_path, 1)
    RunDir.create(runs_dir, failed).note_attempt("failed", error="x")
    with RunDir.create(runs_dir, here).owned():
        todo = decide([final, queued, failed, here, new], runs_dir, 1e9)
    assert todo.runs == (failed, new)
    assert list(todo.left.values()) == ["done", "queued as job 7_0", "trained by a process outside SLURM"]
    assert todo.hours > 0


def test_a_job_that_slurm_holds_is_left_to_it_with_a_remedy(commands: Path, tmp_path: Path) -> None:
    run, _ = submitted(tmp_path)
    queue(commands, "7_0|engram-ab12|PENDING|2||(launch failed requeued held)|")
    (why,) = decide([run], tmp_path / "runs", 1e9).left.values()
    assert why == "requeued as job 7_0 (launch failed requeued held: scontrol release 7_0, or cancel)"


def test_a_run_half_done_costs_half(tmp_path: Path) -> None:
    run = small_run(steps=10)
    whole = decide([run], tmp_path, 1e9).hours
    run_dir = RunDir.create(tmp_path, run)
    (run_dir.path / "metrics.jsonl").write_text('{"step": 5, "loss": 3.0}\n')
    assert decide([run], tmp_path, 1e9).hours == pytest.approx(whole / 2)


def test_a_job_that_is_just_ending_is_waited_for(commands: Path, tmp_path: Path) -> None:
    """It may be cancelled or about to be requeued."""
    run, _ = submitted(tmp_path)
    program(
        commands / "squeue",
        f"if [ -e {tmp_path}/asked ]; then echo '7_0|engram-ab12|PENDING|1||(BeginTime)|'; "
        f"else touch {tmp_path}/asked; echo '7_0|engram-ab12|COMPLETING|0|node1||'; fi",
    )
    assert decide([run], tmp_path / "runs", 1e9).left == {run.spec.run_id: "requeued as job 7_0"}


SUBMIT = f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(ROOT)!r}]
from pathlib import Path
from small_runs import small_run
from experiments.profiles import Profile
from experiments.settings import Runtime
from experiments.slurm import submit
runs = [small_run(seed) for seed in range(3)]
runtime = Runtime(runs_dir=sys.argv[1] + "/runs", device="cpu")
print(*submit(runs, runtime, Path("data"), Profile(time="60"), profile_name="cpu", flops_per_s=1e9, allow_dirty=True))
"""


def stand_ins(folder: Path, place: Path) -> None:
    """sbatch that takes its time, and a squeue that shows what it was given."""
    program(folder / "srun", "exit 0")
    program(folder / "squeue", f"cat {place}/queue 2>/dev/null; exit 0")
    program(
        folder / "sbatch",
        'sleep 1; name=$(sed -n "s/.*--job-name=//p" "$1"); cp "$1" ' + f"{place}/script\n"
        f'for i in 0 1 2; do echo "7_$i|$name|PENDING|0||(None)|" >> {place}/queue; done\n'
        "echo Submitted batch job 7",
    )


def test_two_launches_at_once_submit_once(commands: Path, tmp_path: Path) -> None:
    stand_ins(commands, tmp_path)
    argv = [sys.executable, "-c", SUBMIT, str(tmp_path)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert "nothing to submit" in said[0], said
    assert said[1].startswith("submitted 3 runs as job 7"), said
    assert (tmp_path / "queue").read_text().count("PENDING") == 3
    records = [record_of(RunDir(tmp_path / "runs" / small_run(seed).spec.run_id)) for seed in range(3)]
    assert [(record.job, record.index) for record in records if record] == [("7_0", 0), ("7_1", 1), ("7_2", 2)]
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-2%3", "--requeue", "--time=60", "--signal=USR2@120", "--mem=4GB", "--cpus-per-task=1"):
        assert f"#SBATCH {line}\n" in script
    copy = next((tmp_path / "code").iterdir())
    assert f"cd {copy}\nexport PYTHONPATH={copy}${{PYTHONPATH:+:$PYTHONPATH}}" in script


def test_a_refused_submission_leaves_no_record(commands: Path, tmp_path: Path) -> None:
    stand_ins(commands, tmp_path)
    program(commands / "sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert "UserError: sbatch refused: sbatch: error: invalid account: mend the profile cpu" in done.stderr
    assert not list((tmp_path / "runs").glob("r*/slurm.json"))


def test_cancel_says_what_it_did_and_how_to_stop_the_rest(commands: Path, tmp_path: Path) -> None:
    queue(commands, "7_0|engram-ab12|PENDING|0||(Priority)|")
    program(commands / "scancel", f'echo "$@" > {tmp_path}/cancelled')
    run, run_dir = submitted(tmp_path)
    local = RunDir.create(tmp_path / "runs", small_run(1))
    local.note_attempt("start", pid=4321, host="here")
    with local.owned():
        said = cancel([run, small_run(1), small_run(2)], tmp_path / "runs")
    assert said[:2] == ["cancelled 1 queued", "  job 7_0  dense seed 0"]
    assert said[2].startswith("not in SLURM: dense seed 1, trained by process 4321 on here; kill -TERM 4321")
    assert (tmp_path / "cancelled").read_text() == "7_0\n"
    record = record_of(run_dir)
    assert record is not None
    assert record.cancelled
    assert cancel([small_run(3)], tmp_path / "runs") == ["nothing to cancel"]
    assert cancel([small_run(3)], tmp_path / "absent") == ["nothing to cancel"]


def test_much_is_confirmed_by_a_person(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Profile(time="60", ask_above_hours=10)
    assert confirm(small, 9.0)
    monkeypatch.setattr(slurm_plan.sys.stdin, "isatty", lambda: False)
    with pytest.raises(UserError, match=r"11\.0 CPU hours are more than ask_above_hours=10: launch with --yes"):
        confirm(small, 11.0)
    monkeypatch.setattr(slurm_plan.sys.stdin, "isatty", lambda: True)
    for answer, agreed in {"y": True, "": False, "n": False, " Yes ": True}.items():
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert confirm(small, 11.0) is agreed


# The command line


def call(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | ({"PATH": path} if path else {})
    argv = [sys.executable, "-m", "experiments", *words]
    return subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=120)


STUDY = ("allocation", "cpu-smoke")


def test_a_dry_run_tells_arrays_resources_and_hours_and_touches_nothing(tmp_path: Path) -> None:
    places = [f"runtime.{name}={tmp_path / name}" for name in ("runs_dir", "data_dir")]
    words = ["launch", *STUDY, *places, "--on", "slurm", "--profile", "cpu", "slurm.array_parallelism=5", "--dry-run"]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    assert "array of 12 runs, 5 at a time, each on 1 node with 0 GPUs, 2 GB and 1 task of 1 CPU" in done.stdout
    assert "CPU hours in all" in done.stdout
    told = json.loads(call(*words, "--json").stdout)
    assert [len(array["runs"]) for array in told["arrays"]] == [12]
    assert (told["arrays"][0]["parallelism"], told["device"]) == (5, "CPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", *STUDY, "--profile", "cpu"], "--profile, --yes and --allow-dirty belong to --on slurm"),
        (["launch", *STUDY, "--on", "slurm", "--profile", "nothing"], "no profile 'nothing'"),
        (["launch", *STUDY, "--on", "slurm", "--profile", "cpu", "slurm.nods=2"], "nods=2: Key 'nods' not in"),
        (["launch", *STUDY, "--on", "slurm", "--profile", "one-node-8-gpus", "runtime.device=cpu"], "another profile"),
        (["launch", *STUDY, "--on", "slurm", "--profile", "cpu", "--allow-dirty"], "no squeue on this machine"),
        (["status", *STUDY, "--watch", "--json"], "--watch is for people, --json for scripts"),
    ],
)
def test_a_mistake_is_refused_in_one_line_before_anything_is_made(
    words: Sequence[str], said: str, tmp_path: Path
) -> None:
    places = [f"runtime.{name}={tmp_path / name}" for name in ("runs_dir", "data_dir")]
    done = call(*words, *places, path="/nowhere")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
