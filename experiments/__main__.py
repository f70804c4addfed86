"""python -m experiments {plan,data,launch,status,run}: from a budget's name to finished runs.

Suites and budgets are named in any order; `key=value` changes a budget for this call:

    python -m experiments plan paper-2e20
    python -m experiments data cpu-small --verify
    python -m experiments launch allocation cpu-small seeds=[0] runtime.workers=1
    python -m experiments status allocation cpu-small

Exit codes: 0 done, 1 a run failed, 2 a mistake in what was asked, 3 (run) or 130 (launch) interrupted and resumable.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from rich.console import Console

from experiments.plan import as_dicts, as_table, plan
from experiments.settings import (
    DEFAULT_BUDGET,
    Budget,
    Run,
    Runtime,
    UserError,
    budget_names,
    load_budget,
    load_runtime,
)
from experiments.suites import SUITES, runs_of

NO_DATA = "not built"


@dataclass(frozen=True)
class Study:
    """What a command was asked about."""

    suite: str
    budget: Budget
    overrides: tuple[str, ...]


def parse_study(words: Sequence[str]) -> Study:
    """Read suite, budget and overrides from the command line.

    Raises:
        UserError: a word is neither, or two of a kind.
    """
    overrides = tuple(word for word in words if "=" in word)
    suites = [word for word in words if word in SUITES]
    budgets = [word for word in words if "=" not in word and word not in SUITES]
    if len(suites) > 1 or len(budgets) > 1:
        raise UserError(f"name one suite and one budget, not {' '.join(suites + budgets)}")
    if budgets and budgets[0] not in budget_names() and not budgets[0].endswith((".yaml", ".yml")):
        raise UserError(
            f"{budgets[0]!r} is no suite ({', '.join(SUITES)}) and no budget ({', '.join(budget_names())}, "
            "or a YAML file's path)"
        )
    budget = load_budget(budgets[0] if budgets else DEFAULT_BUDGET, overrides)
    return Study(suites[0] if suites else budget.suite, budget, overrides)


def command_plan(args: argparse.Namespace) -> int:
    study = parse_study(args.words)
    points = plan(study.budget, runs_of(study.suite, study.budget, NO_DATA))
    if args.json:
        print(json.dumps(as_dicts(points), indent=1))
    else:
        # A plan that is piped into a file keeps its columns.
        Console(width=None if sys.stdout.isatty() else 160).print(as_table(study.budget, study.suite, points))
    return 0


def command_data(args: argparse.Namespace) -> int:
    from experiments.corpus import prepare
    from experiments.shards import Shards

    budget = parse_study(args.words).budget
    path = prepare(budget.data, Path(budget.runtime.data_dir))
    shards = Shards(path)
    if args.verify:
        shards.verify()
    print(f"{path}: {shards.describe()}{', verified' if args.verify else ''}")
    return 0


def command_launch(args: argparse.Namespace) -> int:
    from experiments.launch import launch

    study = parse_study(args.words)
    if args.dry_run:
        return command_plan(args)
    runs, shards_path = _runs_with_data(study, build=True)
    report = launch(runs, study.budget.runtime, _worker_flags(study.budget.runtime, shards_path))
    return report.exit_code


def command_status(args: argparse.Namespace) -> int:
    from experiments.status import print_status

    study = parse_study(args.words)
    runs, _ = _runs_with_data(study, build=False)
    print_status(runs, study.budget.runtime, as_json=args.json)
    return 0


def command_run(args: argparse.Namespace) -> int:
    """Train one run directory; what `launch` starts for each run."""
    from experiments.rundir import RunDir
    from experiments.worker import work

    return work(RunDir(Path(args.run_dir)), Path(args.shards), load_runtime(args.words))


def _runs_with_data(study: Study, *, build: bool) -> tuple[list[Run], Path]:
    """The suite's runs on its shards, building these if asked.

    Raises:
        UserError: the shards are missing and not to be built.
    """
    from experiments.corpus import find, prepare
    from experiments.shards import Shards

    budget, data_dir = study.budget, Path(study.budget.runtime.data_dir)
    path = prepare(budget.data, data_dir) if build else find(budget.data, data_dir)
    if path is None:
        raise UserError(f"no data yet for {budget.name}: python -m experiments data {budget.name}")
    shards = Shards(path)
    budget = replace(budget, backbone=replace(budget.backbone, bos_id=shards.bos_id))
    return runs_of(study.suite, budget, shards.hash), path


def _worker_flags(runtime: Runtime, shards: Path) -> list[str]:
    settings = [f"{f.name}={getattr(runtime, f.name)}" for f in fields(runtime)]
    return ["--shards", str(shards), *settings]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{plan,data,launch,status,run}")

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
    command = add("launch", command_launch, "train a suite here, skipping what is done", "launch allocation cpu-small")
    add_words(command)
    command.add_argument("--dry-run", action="store_true", help="print the plan only")
    command.add_argument("--json", action="store_true", help="with --dry-run: machine-readable")
    command = add("status", command_status, "say where every run of a suite stands", "status allocation cpu-small")
    add_words(command)
    command.add_argument("--json", action="store_true", help="machine-readable")
    command = add(
        "run", command_run, "train one run directory", "run results/runs/r0123456789 --shards data/python-0123456789"
    )
    command.add_argument("run_dir", help="a directory that launch made")
    command.add_argument("--shards", required=True, help="the shard directory it was planned for")
    command.add_argument("words", nargs="*", metavar="key=value", help="runtime settings, such as threads=2")
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
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
