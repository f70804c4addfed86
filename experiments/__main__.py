"""python -m experiments {plan,data,launch,status,cancel,run,eval,speed,export}: from a name to runs and models.

Suites and budgets are named in any order; `key=value` changes a budget for this call:

    python -m experiments plan paper-2e20
    python -m experiments data cpu-small --verify
    python -m experiments launch allocation cpu-small 'seeds=[0]' runtime.workers=1
    python -m experiments launch allocation gpu-small --on slurm --profile slurm/one-gpu.yaml
    python -m experiments status allocation cpu-small --watch
    python -m experiments eval baselines cpu-small --tasks offline --data benchmarks
    python -m experiments export r0123456789 models/engram

Exit codes: 0 done, 1 a run failed, 2 a mistake in what was asked, 3 (run) or 130 (launch) interrupted and resumable.
"""

from __future__ import annotations

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.commands import (
    command_cancel,
    command_data,
    command_eval,
    command_export,
    command_launch,
    command_plan,
    command_run,
    command_speed,
    command_status,
)
from experiments.loading import budget_names
from experiments.profiles import profile_names
from experiments.settings import UserError
from experiments.suites import SUITES


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{plan,data,launch,status,cancel,run,eval,speed,export}"
    )

    def add_words(command: argparse.ArgumentParser) -> None:
        suites, budgets = ", ".join(SUITES), ", ".join(budget_names())
        about = f"a suite ({suites}), a budget ({budgets}, or a YAML file), key=value changes"
        command.add_argument("words", nargs="*", metavar="WORD", help=about)

    def add(
        name: str, function: Callable[[argparse.Namespace], int], text: str, example: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  python -m experiments {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(function=function)
        return command

    command = add("plan", command_plan, "print every point of a suite and its cost", "plan paper-2e20")
    add_words(command)
    command.add_argument("--json", action="store_true", help="machine-readable")
    command = add("data", command_data, "build a budget's token shards", "data cpu-small --verify")
    add_words(command)
    command.add_argument("--verify", action="store_true", help="check every byte against the manifest")
    command = add(
        "launch",
        command_launch,
        "train a suite, here or on a SLURM cluster, skipping what is done",
        "launch allocation cpu-small\n"
        "  python -m experiments launch allocation gpu-small --on slurm --profile slurm/one-gpu.yaml slurm.time=30",
    )
    add_words(command)
    command.add_argument("--on", choices=("local", "slurm"), default="local", help="where (local)")
    profiles = ", ".join(profile_names())
    command.add_argument(
        "--profile", help=f"resources of a run: {profiles}, or a YAML file; slurm.KEY=VALUE among the words changes it"
    )
    command.add_argument("--dry-run", action="store_true", help="say what would be started, and what it costs")
    command.add_argument("--json", action="store_true", help="with --dry-run: machine-readable")
    command.add_argument("--yes", action="store_true", help="on slurm: do not ask, however much it is")
    command.add_argument(
        "--allow-dirty", action="store_true", help="on slurm: submit code that no commit holds; noted in the runs"
    )
    command = add(
        "status", command_status, "say where every run of a suite stands", "status allocation cpu-small --watch"
    )
    add_words(command)
    command.add_argument("--json", action="store_true", help="machine-readable")
    command.add_argument("--watch", action="store_true", help="refresh until all is done or Ctrl-C")
    command = add("cancel", command_cancel, "take a suite's jobs out of SLURM's queue", "cancel allocation gpu-small")
    add_words(command)
    command = add(
        "run", command_run, "train one run directory", "run results/runs/r0123456789 --shards data/python-0123456789"
    )
    command.add_argument("run_dir", help="a directory that launch made")
    command.add_argument("--shards", required=True, help="the shard directory it was planned for")
    command.add_argument("words", nargs="*", metavar="key=value", help="runtime settings, such as threads=2")
    command = add(
        "eval",
        command_eval,
        "score a suite's finished runs on benchmarks with lm-evaluation-harness, each result once",
        "eval baselines cpu-small --tasks offline --data benchmarks --text held-out",
    )
    add_words(command)
    command.add_argument(
        "--tasks",
        default="small",
        metavar="NAMES",
        help="groups (small, offline, paper) or tasks, joined by commas (small)",
    )
    folder: dict[str, Any] = {"type": Path, "metavar": "DIR"}
    command.add_argument("--data", **folder, help="local benchmark files (experiments/local_tasks.py); else the hub")
    command.add_argument("--text", **folder, help="held-out text for bits per byte, one file a domain")
    command.add_argument("--limit", type=int, metavar="N", help="only the first items of every task")
    command.add_argument("--batch", type=int, default=32, metavar="N", help="sequences at once (32)")
    command.add_argument("--dry-run", action="store_true", help="say what would be scored")
    command = add(
        "speed",
        command_speed,
        "measure prefill, decode and memory of a suite's finished runs, tables on the device and in host memory",
        "speed baselines cpu-small --tables device,host --batch 1 --prompt 512 runtime.threads=2",
    )
    add_words(command)
    command.add_argument(
        "--tables",
        default="device,host",
        metavar="PLACES",
        help="where n-gram tables lie, joined by commas (device,host). On a CPU both are the same memory, and `host` "
        "adds the work of bringing rows; runs without tables are measured once",
    )
    for option, default, text in (
        ("--batch", 8, "sequences at once"),
        ("--prompt", 128, "tokens read at once"),
        ("--new", 64, "tokens written one by one"),
    ):
        command.add_argument(option, type=int, default=default, metavar="N", help=f"{text} ({default})")
    command = add(
        "export",
        command_export,
        "write a finished run for transformers, code and all",
        "export r0123456789 models/engram",
    )
    command.add_argument("run", metavar="RUN", help="a run's name or directory")
    command.add_argument("target", metavar="DIR", help="the directory to write, which must not exist")
    command.add_argument("words", nargs="*", metavar="key=value", help="runtime.runs_dir=PATH, runtime.data_dir=PATH")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; words may stand before, between and behind options, which argparse alone refuses."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "words")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.words = [*getattr(args, "words", []), *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; turn errors into one line and an exit code."""
    args = parse(argv)
    try:
        code: int = args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        is_barred = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        remedy = (
            "; runtime.runs_dir, runtime.data_dir and the place of an export may lie elsewhere" if is_barred else ""
        )
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 2 if is_barred else 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
