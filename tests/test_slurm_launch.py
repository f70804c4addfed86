"""If these fail, a launch on a cluster submits a run twice, or begins what it should have refused.

SLURM itself is not needed here: where it is asked something, small programs stand in for its commands. What only a real
one can show is in test_slurm_cluster.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from slurm_stand_in import program, queue, submitted
from small_runs import small_run

from experiments import slurm_plan
from experiments.profiles import Profile
from experiments.rundir import RunDir
from experiments.settings import UserError
from experiments.slurm import cancel
from experiments.slurm_plan import confirm, decide
from experiments.squeue import record_of

ROOT = Path(__file__).parent.parent
TESTS = Path(__file__).parent


def test_only_what_is_missing_is_submitted(commands: Path, tmp_path: Path) -> None:
    runs_dir = tmp_path / "runs"
    final, queued, failed, here, new = (small_run(seed) for seed in range(5))
    RunDir.create(runs_dir, final).write_final(
        {"status": "final", "result": {"steps": 5, "valid_loss": 4.0}, "cost": {"seconds": 1.0, "tokens_per_s": 1.0}}
    )
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
