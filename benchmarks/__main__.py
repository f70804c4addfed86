"""Time the suite against its peers on this machine: python -m benchmarks run, or make bench.

python -m benchmarks run                          all parts, about 15 minutes on two CPU cores
python -m benchmarks run --parts experts table-update --rounds 3
python -m benchmarks list                         the parts, without running them
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.host_table import large_table
from benchmarks.parts import PARTS, worth_running
from benchmarks.report import summary
from benchmarks.rounds import ROUNDS, peak_memory, run_part
from benchmarks.sweep_time import time_sweep

SWEEP = ["allocation", "cpu-small", "seeds=[0]", "rhos=[1.0,0.75]", "controls=[dense,module-only]"]
EXTRA = ("sweep", "large-table")
OUT = Path(__file__).parent / "RESULTS.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run a command; return the exit code."""
    args = _parser().parse_args(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(args.threads)
    if args.command == "list":
        for name, part in PARTS.items():
            print(f"{name:14} {part(device).what}")
        print("sweep          a sweep's wall time against its steps\nlarge-table    steps with a table of 2B values")
    elif args.command == "memory":
        print(json.dumps({"peak_mib": peak_memory(PARTS[args.part](device).contenders[args.contender], device)}))
    else:
        _run(args, device)
    return 0


def _run(args: argparse.Namespace, device: torch.device) -> None:
    console = Console(stderr=True)
    wanted = args.parts or [*PARTS, *EXTRA]
    results = []
    with console.status("starting") as status:
        for name in (name for name in PARTS if name in wanted and (args.parts or worth_running(name, device))):
            results.append(run_part(PARTS[name](device), device, args.rounds, status.update))
        status.update("timing a sweep")
        sweep = time_sweep(SWEEP, len(os.sched_getaffinity(0))) if "sweep" in wanted else None
        status.update("training with a table of two billion values")
        large = large_table(device) if "large-table" in wanted else None
    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = summary(results, sweep, large, args.rounds, args.threads)
    args.out.write_text(text)
    print(text)
    print(f"written to {args.out}")


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=form)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{run,list}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU if there is one")
    common.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (default: all)")
    run = commands.add_parser("run", parents=[common], help="time parts and write the results")
    run.add_argument("--parts", nargs="+", choices=[*PARTS, *EXTRA], metavar="PART", help="default: all; see list")
    run.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of every contender (default {ROUNDS})")
    run.add_argument("--out", type=Path, default=OUT, help=f"default {OUT.relative_to(OUT.parent.parent)}")
    commands.add_parser("list", parents=[common], help="say what there is")
    memory = commands.add_parser("memory", parents=[common])
    memory.add_argument("part", choices=list(PARTS))
    memory.add_argument("contender")
    return parser


if __name__ == "__main__":
    sys.exit(main())
