"""What each command of `python -m experiments` does, once its words are parsed.

Imports that take long, and those that only some commands need, are made inside.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from experiments.loading import load_runtime
from experiments.plan import as_dicts, as_table, plan
from experiments.pool import worker_flags
from experiments.profiles import fit_runtime, load_profile
from experiments.settings import Runtime, UserError
from experiments.study import Study, parse_study, repeats, runs_with_data

if TYPE_CHECKING:
    from experiments.finished import Finished

PROFILE_WORD = "slurm."  # begins a change to a profile, as in slurm.time=30


def command_plan(args: argparse.Namespace) -> int:
    study = parse_study(args.words)
    points = plan(study.budget, study.checked())
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
    from experiments.rundir import RunDir
    from experiments.squeue import SlurmSilent, jobs_of

    if args.json and not args.dry_run:
        raise UserError("--json belongs to --dry-run")
    if args.on == "slurm":
        return _launch_on_slurm(args)
    if args.profile or args.yes or args.allow_dirty:
        raise UserError("--profile, --yes and --allow-dirty belong to --on slurm")
    study = parse_study(args.words)
    if args.dry_run:
        command_plan(args)
        if not args.json:
            print(_what_is_there(study))
        return 0
    runtime = study.budget.runtime
    if runtime.device == "cuda":
        from experiments.parallel import choose_device  # imports torch, which a launch can otherwise do without

        choose_device("cuda")
    runs, shards_path = runs_with_data(study, build=True)
    if warning := repeats(study, shards_path):
        print(warning)
    try:
        queued = jobs_of(RunDir(Path(runtime.runs_dir) / run.spec.run_id) for run in runs)
    except SlurmSilent as error:  # as at home, with run directories that come from a cluster
        print(f"some runs were given to SLURM, which does not answer ({error}): going on without it", file=sys.stderr)
        queued = {}
    report = launch(runs, runtime, worker_flags(runtime, shards_path), elsewhere=queued)
    return report.exit_code


def _what_is_there(study: Study) -> str:
    """How much of a suite a launch would find done."""
    from experiments.corpus import find
    from experiments.rundir import RunDir

    runtime = study.budget.runtime
    if find(study.budget.data, Path(runtime.data_dir)) is None:
        return f"a launch would build the shards of {study.budget.data.corpus} first, then train every run"
    runs = runs_with_data(study, build=False)[0]
    states = [RunDir(Path(runtime.runs_dir) / run.spec.run_id).state() for run in runs]
    done = sum(state in ("final", "diverged") for state in states)
    return f"in {runtime.runs_dir}: {done} of {len(runs)} done before, {len(runs) - done} to train"


def _launch_on_slurm(args: argparse.Namespace) -> int:
    from experiments.slurm import check_ready, submit
    from experiments.slurm_plan import as_dict, confirm, decide, describe

    words = [word for word in args.words if not word.startswith(PROFILE_WORD)]
    changes = [word.removeprefix(PROFILE_WORD) for word in args.words if word.startswith(PROFILE_WORD)]
    study = parse_study(words)
    budget, runtime = study.budget, study.budget.runtime
    name = args.profile or ("cpu" if runtime.device == "cpu" else "one-gpu")
    profile = load_profile(name, changes)
    fit_runtime(profile, runtime)
    runtime.micro_sequences(budget.train, max(profile.n_tasks, runtime.processes))
    if args.dry_run:
        from experiments.corpus import find

        has_data = find(budget.data, Path(runtime.data_dir)) is not None
        runs = runs_with_data(study, build=False)[0] if has_data else study.planned()
        todo = decide(runs, Path(runtime.runs_dir), budget.flops_per_s)
        said = describe(profile, todo, runtime)
        print(json.dumps(as_dict(profile, todo), indent=1) if args.json else "\n".join(said))
        return 0
    check_ready(profile, runtime, allow_dirty=args.allow_dirty)
    runs, shards = runs_with_data(study, build=True)
    if warning := repeats(study, shards):
        print(warning)
    todo = decide(runs, Path(runtime.runs_dir), budget.flops_per_s)
    if not args.yes and not confirm(profile, todo.hours):
        print("nothing submitted")
        return 1
    for line in submit(
        runs, runtime, shards, profile, profile_name=name, flops_per_s=budget.flops_per_s, allow_dirty=args.allow_dirty
    ):
        print(line)
    print(f"follow them: python -m experiments status --watch {shlex.join(words)}")
    return 0


def command_cancel(args: argparse.Namespace) -> int:
    from experiments.slurm import cancel

    study = parse_study(args.words)
    runs, _ = runs_with_data(study, build=False)
    for line in cancel(runs, Path(study.budget.runtime.runs_dir)):
        print(line)
    return 0


def command_status(args: argparse.Namespace) -> int:
    from experiments.overview import print_status, watch

    if args.watch and args.json:
        raise UserError("--watch is for people, --json for scripts: choose one")
    study = parse_study(args.words)
    runs, _ = runs_with_data(study, build=False)
    if args.watch:
        watch(runs, study.budget.runtime)
    else:
        print_status(runs, study.budget.runtime, as_json=args.json)
    return 0


def command_run(args: argparse.Namespace) -> int:
    """Train one run directory; what `launch` starts for each run."""
    from experiments.rundir import RunDir
    from experiments.worker import work

    return work(RunDir(Path(args.run_dir)), Path(args.shards), load_runtime(args.words))


def command_export(args: argparse.Namespace) -> int:
    """Write a finished run for use elsewhere."""
    from experiments.export import export_run
    from experiments.finished import open_finished

    runtime = load_runtime([word.removeprefix("runtime.") for word in args.words])
    given = Path(args.run)
    path = given if given.is_dir() else Path(runtime.runs_dir) / args.run
    print(export_run(open_finished(path, Path(runtime.data_dir)), Path(args.target)))
    return 0


def command_eval(args: argparse.Namespace) -> int:
    """Score the finished runs of a suite on benchmarks."""
    # Before anything imports tqdm: the command shows its own progress, and the harness would show one a request.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from experiments.benchmarks import choose
    from experiments.evals import Asked, evaluate
    from experiments.parallel import choose_device

    benchmarks = choose([args.tasks])
    for option, folder in (("--data", args.data), ("--text", args.text)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option}: no folder {folder}")
    if args.batch < 1 or (args.limit is not None and args.limit < 1):
        raise UserError(f"--limit and --batch count from 1, not {args.limit} and {args.batch}")
    runtime, finished = _finished_runs(args.words)
    device = str(choose_device(runtime.device))
    asked = Asked(benchmarks, args.data, args.text, args.limit, args.batch, device)
    report = evaluate(finished, asked, dry_run=args.dry_run)
    for name, why in report.skipped.items():
        print(f"skipped {name}: {why}")
    for busy in report.busy:
        print(f"skipped, {busy}", file=sys.stderr)
    print(f"{len(report.results)} results of {len(finished)} runs, {len(report.skipped)} benchmarks skipped")
    return 1 if report.busy else 0


def command_speed(args: argparse.Namespace) -> int:
    """Measure how fast the finished runs of a suite read and write, and in how much memory."""
    from experiments.parallel import choose_device
    from experiments.speed import Load, in_words, measure_all, parse_places

    if min(args.batch, args.prompt, args.new) < 1:
        raise UserError(f"--batch, --prompt and --new count from 1, not {args.batch}, {args.prompt}, {args.new}")
    places = parse_places(args.tables)
    runtime, finished = _finished_runs(args.words)
    load = Load(str(choose_device(runtime.device)), runtime.threads, args.batch, args.prompt, args.new)
    for one, result in measure_all(finished, Path(runtime.data_dir), load, places):
        labels = one.run.labels
        rho = "" if labels.rho is None else f" rho {labels.rho:.2f}"
        print(f"{labels.arm}{rho} seed {one.run.spec.seed}: {in_words(result)}", flush=True)
    return 0


def _finished_runs(words: Sequence[str]) -> tuple[Runtime, list[Finished]]:
    """The runs of a suite that ended well; others are counted on standard error."""
    from experiments.finished import open_finished
    from experiments.rundir import RunDir

    study = parse_study(words)
    runtime = study.budget.runtime
    runs, _ = runs_with_data(study, build=False)
    here = [RunDir(Path(runtime.runs_dir) / run.spec.run_id) for run in runs]
    ended = [place for place in here if place.path.is_dir() and place.state() == "final"]
    if not ended:
        raise UserError(f"no run of {study.suite} on {study.budget.name} has finished: launch it first")
    if len(ended) < len(here):
        print(f"{len(here) - len(ended)} of {len(here)} runs have not finished, or diverged", file=sys.stderr)
    return runtime, [open_finished(place.path, Path(runtime.data_dir)) for place in ended]
