"""A worker that keeps the contract of `python -m experiments run` without training anything.

    python fake_worker.py RUN_DIR PLAN

PLAN is a JSON file: "step_s" (seconds a step takes) and, by run_id, what goes wrong: "fail" notes an error and exits 1,
"mute" exits 1 after a line on stderr, "die" kills itself, "diverge" ends early, "stubborn" ignores SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.rundir import RunBusy, RunDir

stop = False


def note_stop(number: int, _: object) -> None:
    global stop
    stop = True
    print(f"got {signal.Signals(number).name}")


def append(path: Path, line: dict[str, object]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def work(here: RunDir, trouble: str, step_s: float) -> int:
    if here.final() is not None:
        return 0
    train = here.load().spec.train
    if trouble == "mute":
        print("cannot import anything", file=sys.stderr)
        return 1
    here.note_attempt("start", pid=os.getpid())
    print(f"threads {os.environ['OMP_NUM_THREADS']}, started")
    if trouble == "fail":
        here.note_attempt("failed", error="ValueError: the fake was told to fail")
        return 1
    if trouble == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoint = here.path / "checkpoint.json"
    step = json.loads(checkpoint.read_text()) if checkpoint.exists() else 0
    began = time.monotonic()
    while step < train.steps:
        time.sleep(step_s)
        step += 1
        line = {"step": step, "tokens": step * train.batch_tokens, "split": "train", "loss": 5 - step / train.steps}
        append(here.path / "metrics.jsonl", line)
        seconds = time.monotonic() - began
        append(here.path / "timing.jsonl", {"step": step, "seconds": seconds, "tokens_per_s": 1000.0})
        if trouble == "diverge":
            break
        if stop and trouble != "stubborn" and step < train.steps:
            checkpoint.write_text(json.dumps(step))
            here.note_attempt("interrupted", step=step)
            return 3
    append(here.path / "spans.jsonl", {"from": began, "to": time.monotonic()})
    here.write_final(
        {
            "status": "diverged" if trouble == "diverge" else "final",
            "result": {"steps": step, "valid_loss": None if trouble == "diverge" else 4.0},
            "cost": {"seconds": time.monotonic() - began, "tokens_per_s": 1000.0},
        }
    )
    return 0


def main() -> int:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note_stop)
    here, plan = RunDir(Path(sys.argv[1])), json.loads(Path(sys.argv[2]).read_text())
    try:
        with here.owned(patience_s=0.3):
            return work(here, plan.get(here.path.name, ""), plan["step_s"])
    except RunBusy as busy:
        print(busy)
        return 0


if __name__ == "__main__":
    sys.exit(main())
