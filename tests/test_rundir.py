"""If these fail, a finished run may be trained again, one run by two processes at once, or a result half-written."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import small_run

from experiments.loading import save_run
from experiments.rundir import RunBusy, RunDir, last_line, last_lines
from experiments.settings import UserError

ROOT = Path(__file__).parent.parent
FINAL = {
    "status": "final",
    "result": {"steps": 5, "valid_loss": 4.0},
    "cost": {"seconds": 1.0, "tokens_per_s": 100.0},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path, small_run())


def test_a_run_without_a_directory_is_planned_and_stays_without(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "r0123456789")
    assert run_dir.state() == "planned"
    assert not run_dir.path.exists()


def test_a_directory_nobody_worked_in_is_planned(run_dir: RunDir) -> None:
    assert run_dir.state() == "planned"
    assert [path.name for path in run_dir.path.iterdir()] == ["config.yaml"], "asking wrote something"


def test_a_run_that_two_budgets_share_keeps_both_labels_once(tmp_path: Path) -> None:
    ours, theirs = small_run(), small_run(budget="other", arm="allocation", rho=1.0, rho_target=1.0)
    assert ours.spec.run_id == theirs.spec.run_id
    for run in (ours, theirs, ours, theirs):
        here = RunDir.create(tmp_path, run)
    lines = [json.loads(line) for line in (here.path / "labels.jsonl").read_text().splitlines()]
    assert [(line["budget"], line["arm"], line["rho"]) for line in lines] == [("other", "allocation", 1.0)]
    assert here.load().labels == ours.labels


def test_a_locked_run_is_running_even_before_its_first_note(run_dir: RunDir) -> None:
    with run_dir.owned():
        assert run_dir.state() == "running"


def test_a_run_that_stopped_without_a_word_is_interrupted(run_dir: RunDir) -> None:
    run_dir.note_attempt("start")
    assert run_dir.state() == "interrupted"


def test_the_last_attempt_decides_between_failed_and_interrupted(run_dir: RunDir) -> None:
    run_dir.note_attempt("start")
    run_dir.note_attempt("failed", error="no luck")
    assert run_dir.state() == "failed"
    run_dir.note_attempt("start")
    run_dir.note_attempt("interrupted")
    assert run_dir.state() == "interrupted"
    assert run_dir.attempts() == 2


@pytest.mark.parametrize("status", ["final", "diverged"])
def test_final_json_decides_even_while_the_lock_is_held(run_dir: RunDir, status: str) -> None:
    run_dir.note_attempt("failed", error="an earlier attempt")
    with run_dir.owned():
        run_dir.write_final(FINAL | {"status": status})
        assert run_dir.state() == status


def test_a_result_that_json_cannot_hold_leaves_no_file(run_dir: RunDir) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_dir.write_final(FINAL | {"result": {"valid_loss": float("nan")}})
    assert [path.name for path in run_dir.path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    "text",
    ['{"status": "fi', "\xff", "{}", "[1]", "1", '{"status": "final", "result": {}, "cost": {}}', '{"status": "over"}'],
)
def test_a_damaged_final_json_is_named_with_a_remedy(text: str, run_dir: RunDir) -> None:
    (run_dir.path / "final.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"final\.json is damaged .*delete it and launch again"):
        run_dir.state()


def test_a_directory_of_another_spec_is_refused_and_untouched(tmp_path: Path) -> None:
    run = small_run(seed=0)
    config = tmp_path / run.spec.run_id / "config.yaml"
    config.parent.mkdir()
    save_run(small_run(seed=1), config)
    before = config.read_text()
    with pytest.raises(UserError, match="holds another run than its name says"):
        RunDir.create(tmp_path, run)
    assert config.read_text() == before


def test_a_directory_is_made_once_and_read_back_equal(tmp_path: Path) -> None:
    run = small_run(rho_target=0.8)
    first = RunDir.create(tmp_path, run)
    again = RunDir.create(tmp_path, small_run(arm="the same spec in another suite"))
    assert again.path == first.path
    assert again.load() == run


def test_a_directory_under_another_name_is_refused(run_dir: RunDir) -> None:
    moved = run_dir.path.rename(run_dir.path.parent / "copy")
    with pytest.raises(UserError, match="edited or moved"):
        RunDir(moved).load()


def test_a_second_owner_is_turned_away(run_dir: RunDir) -> None:
    with run_dir.owned(), pytest.raises(RunBusy, match=run_dir.path.name), run_dir.owned(patience_s=0):
        pass


def test_an_owner_waits_for_one_who_only_asked(run_dir: RunDir) -> None:
    with open(run_dir.path / "LOCK", "a") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        threading.Timer(0.2, lambda: fcntl.flock(probe, fcntl.LOCK_UN)).start()
        with run_dir.owned(patience_s=5):
            assert run_dir.is_locked()


def test_two_who_ask_at_once_do_not_see_a_worker(run_dir: RunDir) -> None:
    with open(run_dir.path / "LOCK", "a") as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)  # what `is_locked` holds for an instant
        assert not run_dir.is_locked()


def test_kill_9_frees_the_lock_at_once(run_dir: RunDir) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from experiments.rundir import RunDir\n"
        "run_dir = RunDir(Path(sys.argv[1]))\n"
        "with run_dir.owned():\n    run_dir.note_attempt('start'); print('held', flush=True); time.sleep(60)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", hold, str(run_dir.path)], cwd=ROOT, stdout=subprocess.PIPE)
    with worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        assert run_dir.state() == "running"
        worker.send_signal(signal.SIGKILL)
    assert run_dir.state() == "interrupted"
    began = time.monotonic()
    with run_dir.owned(patience_s=0):
        assert time.monotonic() - began < 0.1


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert last_line(path) == {"step": 2}


def test_a_torn_line_that_got_its_newline_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n\n')
    assert last_line(path) == {"step": 1}


def test_a_log_with_no_whole_line_has_no_last_line(tmp_path: Path) -> None:
    (tmp_path / "torn").write_text('{"step": 1')
    assert last_line(tmp_path / "torn") is None
    assert last_line(tmp_path / "absent") is None


def test_reading_the_end_of_a_log_starts_at_a_whole_line(tmp_path: Path) -> None:
    path, lines = tmp_path / "timing.jsonl", [{"step": i, "inner": {"x": i}} for i in range(1000)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for n_bytes in range(100, 200):
        end = last_lines(path, n_bytes)
        assert len(end) >= 2
        assert end == lines[-len(end) :]


def test_a_note_after_a_torn_one_can_be_read(run_dir: RunDir) -> None:
    (run_dir.path / "attempts.jsonl").write_text('{"event": "start"}\n{"event": "fai')
    run_dir.note_attempt("failed", error="disk full")
    assert run_dir.state() == "failed"
    assert run_dir.attempts() == 1
