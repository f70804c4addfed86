"""If these fail, people and scripts are told wrong states, speeds or arrival times of a sweep."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_runs import BATCH_TOKENS, small_run

from experiments import display
from experiments.display import PlainDisplay, Snapshot, block
from experiments.overview import overview, print_status
from experiments.rundir import RunDir, State
from experiments.settings import Run, Runtime
from experiments.status import RunStatus, duration, label, read_status, sweep_eta

STEPS = 100


def write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def working(runs_dir: Path, run: Run, step: int, seconds_a_step: float) -> RunDir:
    """A directory as a worker leaves it after `step` even steps."""
    run_dir = RunDir.create(runs_dir, run)
    run_dir.note_attempt("start")
    steps = range(1, step + 1)
    write_lines(run_dir.path / "metrics.jsonl", [{"step": i, "split": "train", "loss": 5 - i / STEPS} for i in steps])
    write_lines(
        run_dir.path / "timing.jsonl",
        [{"step": i, "seconds": i * seconds_a_step, "tokens_per_s": BATCH_TOKENS / seconds_a_step} for i in steps],
    )
    return run_dir


def row(state: State, step: int = 0, eta_s: float | None = None, run_s: float | None = None) -> RunStatus:
    return RunStatus(
        run_id="r", label=f"a {state} run", state=state, step=step, steps=STEPS, loss=4.5, tokens_per_s=12_345.6,
        eta_s=eta_s, run_s=run_s, error=None, log="train.log",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"arm": "allocation", "rho_target": 0.8}, "allocation rho 0.80 seed 3"),
        ({"arm": "allocation", "rho_target": 0.8, "mode": "strict"}, "allocation strict rho 0.80 seed 3"),
        ({"arm": "allocation", "rho_target": 0.775}, "allocation rho 0.775 seed 3"),
        ({"arm": "dense"}, "dense seed 3"),
    ],
)
def test_a_label_tells_runs_apart(labels: dict[str, Any], text: str) -> None:
    assert label(small_run(seed=3, **labels)) == text


def test_a_running_run_shows_its_step_loss_rate_and_time_left(tmp_path: Path) -> None:
    run = small_run(steps=STEPS)
    run_dir = working(tmp_path, run, step=80, seconds_a_step=0.5)
    with run_dir.owned():
        now = read_status(run, run_dir)
    assert (now.state, now.step, now.steps, now.loss) == ("running", 80, STEPS, 5 - 0.8)
    assert now.tokens_per_s == pytest.approx(BATCH_TOKENS / 0.5)
    assert now.eta_s == pytest.approx(20 * 0.5)
    assert now.run_s == pytest.approx(STEPS * 0.5)


def test_one_slow_step_does_not_become_the_rate(tmp_path: Path) -> None:
    run = small_run(steps=STEPS)
    run_dir = working(tmp_path, run, step=40, seconds_a_step=1.0)
    with open(run_dir.path / "timing.jsonl", "a") as timing:  # a step with a validation: 11 seconds instead of 1
        timing.write(json.dumps({"step": 41, "seconds": 51.0, "tokens_per_s": BATCH_TOKENS / 11}) + "\n")
    with run_dir.owned():
        rate = read_status(run, run_dir).tokens_per_s
    assert rate is not None
    assert BATCH_TOKENS / 1.5 < rate < BATCH_TOKENS


def test_the_rate_of_an_earlier_attempt_is_not_reported(tmp_path: Path) -> None:
    run = small_run(steps=STEPS)
    run_dir = working(tmp_path, run, step=80, seconds_a_step=0.5)
    attempts, timing = run_dir.path / "attempts.jsonl", run_dir.path / "timing.jsonl"
    run_dir.note_attempt("start")
    os.utime(timing, (attempts.stat().st_mtime - 1,) * 2)
    with run_dir.owned():
        now = read_status(run, run_dir)
    assert (now.state, now.step, now.tokens_per_s, now.eta_s) == ("running", 80, None, None)


def test_a_resumed_run_takes_its_rate_from_this_attempt(tmp_path: Path) -> None:
    run = small_run(steps=STEPS)
    run_dir = working(tmp_path, run, step=20, seconds_a_step=9.0)
    with open(run_dir.path / "timing.jsonl", "a") as timing:
        for i in range(1, 6):  # from a checkpoint at step 10, at 2 seconds a step
            timing.write(json.dumps({"step": 10 + i, "seconds": 2.0 * i, "tokens_per_s": 50.0}) + "\n")
    with run_dir.owned():
        assert read_status(run, run_dir).tokens_per_s == pytest.approx(BATCH_TOKENS / 2)


def test_the_first_step_gives_a_rate(tmp_path: Path) -> None:
    run = small_run(steps=STEPS)
    run_dir = working(tmp_path, run, step=1, seconds_a_step=4.0)
    with run_dir.owned():
        assert read_status(run, run_dir).eta_s == pytest.approx(99 * 4.0)


def test_every_state_of_a_suite_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [small_run(seed, STEPS) for seed in range(6)]
    done = {"result": {"steps": STEPS, "valid_loss": 4.25}, "cost": {"seconds": 60.0, "tokens_per_s": 1000.0}}
    working(tmp_path, runs[0], 100, 0.5).write_final({"status": "final"} | done)
    diverged = {"steps": 7, "valid_loss": None}
    working(tmp_path, runs[1], 7, 0.5).write_final({"status": "diverged"} | done | {"result": diverged})
    failed = working(tmp_path, runs[2], 20, 0.5)
    failed.note_attempt("failed", error="OSError: no space left")
    working(tmp_path, runs[3], 30, 0.5)
    running = working(tmp_path, runs[4], 90, 0.5)
    runtime = Runtime(runs_dir=str(tmp_path), workers=2, device="cpu")
    with running.owned():
        print_status(runs, runtime)
        text = capsys.readouterr().out
        print_status(runs, runtime, as_json=True)
        found = json.loads(capsys.readouterr().out)
    states = [one["state"] for one in found["runs"]]
    assert states == ["final", "diverged", "failed", "interrupted", "running", "planned"]
    assert [one["step"] for one in found["runs"]] == [100, 7, 20, 30, 90, 0]
    assert found["runs"][0]["loss"] == 4.25
    assert found["runs"][2]["error"] == "OSError: no space left"
    # Two workers. One trains the failed run (48 s); the other ends its own (5), then takes the interrupted (42) and the
    # planned one (60).
    assert found["eta_s"] == pytest.approx(107.0)
    lines = text.splitlines()
    assert [state in line for state, line in zip(states, lines[1:], strict=False)] == [True] * 6
    assert "6 runs: 1 final, 1 diverged, 1 running, 1 interrupted, 1 failed, 1 planned" in lines
    assert "failed: dense seed 2: OSError: no space left" in lines
    assert f"  log: {failed.path / 'train.log'}" in lines
    assert "about 1m47s left on 2 workers" in lines


def test_a_damaged_result_is_shown_as_failed_beside_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [small_run(seed, STEPS) for seed in range(2)]
    (working(tmp_path, runs[0], 20, 0.5).path / "final.json").write_text("[1]")
    print_status(runs, Runtime(runs_dir=str(tmp_path), workers=1, device="cpu"))
    said = capsys.readouterr().out
    assert "2 runs: 1 failed, 1 planned" in said
    assert "final.json is damaged" in said
    assert "delete it and launch again" in said


def test_a_loss_that_is_no_number_is_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = small_run()
    run_dir = working(tmp_path, run, 1, 1.0)
    (run_dir.path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": NaN}\n')
    print_status([run], Runtime(runs_dir=str(tmp_path)), as_json=True)
    assert json.loads(capsys.readouterr().out)["runs"][0]["loss"] is None


def test_asking_for_the_status_creates_nothing(tmp_path: Path) -> None:
    rows = overview([small_run()], Runtime(runs_dir=str(tmp_path / "runs"))).rows
    assert [one.state for one in rows] == ["planned"]
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_lasts_as_long_as_its_busiest_worker() -> None:
    rows = [row("final", run_s=10.0), row("running", eta_s=4.0), row("running", eta_s=6.0), *[row("planned")] * 3]
    assert sweep_eta(rows, workers=2) == pytest.approx(24.0)  # 4 + 10 + 10 against 6 + 10


def test_what_an_interrupted_run_has_behind_it_is_not_counted_again() -> None:
    assert sweep_eta([row("final", run_s=10.0), row("interrupted", step=75)], workers=4) == pytest.approx(2.5)


def test_running_runs_tell_the_length_before_any_is_final() -> None:
    rows = [row("running", eta_s=5.0, run_s=20.0), row("running"), row("planned")]
    assert sweep_eta(rows, workers=2) == pytest.approx(25.0)  # the second running one counts as whole: 20


def test_a_sweep_of_unknown_length_has_no_eta() -> None:
    assert sweep_eta([row("running"), row("planned")], workers=1) is None
    assert duration(None) == "--"


def test_a_finished_sweep_takes_no_more_time() -> None:
    assert sweep_eta([row("final", run_s=10.0), row("diverged")], workers=1) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3600, "1h00m"), (90_000, "1d01h"), (864_000, "10d00h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_live_block_fits_80_columns_and_cuts_long_labels_only() -> None:
    long = RunStatus(**vars(row("running", step=5, eta_s=90_000.0)) | {"label": "an-arm-of-a-very-long-name " * 5})
    now = Snapshot(
        total=1000, done=500, left=498, failed=100, elapsed_s=1e6, eta_s=1e7, running=[long, row("running", step=99)]
    )
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(block(now))
    assert isinstance(console.file, io.StringIO)
    head, names, *rows, empty = console.file.getvalue().splitlines()
    assert max(map(len, (head, names, *rows))) <= 80
    assert len(rows) == 2
    assert empty == ""
    assert rows[0].split()[-4:] == ["5/100", "4.5000", "12.35k", "1d01h"]
    assert rows[0].startswith("an-arm-of-a-very-long-name an")
    assert rows[1].startswith("a running run  ")


def test_plain_lines_show_a_sign_of_life_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    now = Snapshot(total=1, done=0, left=0, failed=0, elapsed_s=1, eta_s=None, running=[row("running", 50, 60.0)])
    looks = 0

    def look() -> Snapshot:
        nonlocal looks
        looks += 1
        return now

    plain = PlainDisplay()
    for second in range(65):
        clock[0] = 1000.0 + second
        plain.refresh(look)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["      a running run: step 50 of 100, loss 4.5000, 12.35k tokens/s, ETA 1m00s"] * 2
    assert looks == 2, "files were read for nothing"
