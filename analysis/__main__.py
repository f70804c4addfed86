"""Command line: collect finished runs into a table, and draw from that table. Needs no GPU and no checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import BadFile, UserError

if TYPE_CHECKING:
    from analysis.study import Study

EXAMPLES = """examples:
  python -m analysis collect                        results/runs/*/final.json -> results/runs.csv
  python -m analysis figures                        one figure per budget -> results/figures
  python -m analysis figures --budget cpu-small
  python -m analysis tables --table other.csv --out /elsewhere
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 for a failure, or 2 for a mistake the user can mend."""
    args = _parser().parse_args(argv)
    commands = {"collect": _collect, "figures": _figures, "tables": _tables}
    try:
        commands[args.command](args)
    except UserError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    except (BadFile, OSError) as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, epilog=EXAMPLES, formatter_class=plain
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{collect,figures,tables}")
    table = argparse.ArgumentParser(add_help=False)
    default = "default: %(default)s"
    table.add_argument("--table", type=Path, default=Path("results/runs.csv"), metavar="CSV", help=default)
    drawn = argparse.ArgumentParser(add_help=False)
    drawn.add_argument("--out", type=Path, default=Path("results/figures"), metavar="DIR", help=default)
    about = "only this budget, by name or by its YAML file; default: every budget in the table"
    drawn.add_argument("--budget", type=lambda text: Path(text).stem, metavar="NAME", help=about)

    def add(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=about, description=about, parents=parents, epilog=EXAMPLES, formatter_class=plain
        )

    collect = add("collect", "gather finished runs into one table", table)
    collect.add_argument(
        "--runs", type=Path, default=Path("results/runs"), metavar="DIR", help="run directories; default: %(default)s"
    )
    add("figures", "draw loss over rho for each budget, with the numbers as JSON", table, drawn)
    add("tables", "write each budget's arms as a markdown table", table, drawn)
    return parser


# The imports below wait for the command, so that --help answers at once.


def _collect(args: argparse.Namespace) -> None:
    from analysis.collect import collect, write_table

    table = collect(args.runs)
    write_table(table, args.table)
    diverged = int((table["status"] == "diverged").sum())
    print(f"{args.table}: {len(table)} runs" + (f", {diverged} of them diverged" if diverged else ""))
    _collect_benchmarks(args)


def _collect_benchmarks(args: argparse.Namespace) -> None:
    from analysis.benchmarks import collect
    from analysis.collect import write_table

    if not (results := collect(args.runs)).empty:
        write_table(results, path := _benchmarks_beside(args.table))
        print(f"{path}: {len(results)} results")


def _benchmarks_beside(table: Path) -> Path:
    return table.with_name("benchmarks.csv")


def _figures(args: argparse.Namespace) -> None:
    from analysis.figures import allocation, caption, read_paper, save

    paper = read_paper()
    for study in _studies(args):
        for path in save(allocation(study, paper), caption(study), args.out / f"{study.name}_allocation"):
            print(path)
        print(study.verdict.sentence)
    _draw_benchmarks(args)


def _tables(args: argparse.Namespace) -> None:
    from analysis.collect import write_atomically
    from analysis.tables import allocation

    for study in _studies(args):
        path = args.out / f"{study.name}_allocation.md"
        write_atomically(path, allocation(study))
        print(path)
    _write_baselines(args)


def _write_baselines(args: argparse.Namespace) -> None:
    from analysis.baselines_table import baselines
    from analysis.benchmarks import read_table as read_benchmarks
    from analysis.collect import read_table, write_atomically
    from analysis.study import split

    results = read_benchmarks(_benchmarks_beside(args.table))
    for name, rows in split(read_table(args.table), args.budget).items():
        if (text := baselines(name, rows, results)) is not None:
            write_atomically(path := args.out / f"{name}_baselines.md", text)
            print(path)


def _draw_benchmarks(args: argparse.Namespace) -> None:
    from analysis.benchmark_figure import draw, numbers, points
    from analysis.benchmarks import read_table as read_benchmarks
    from analysis.collect import read_table
    from analysis.figures import save
    from analysis.study import split

    results = read_benchmarks(_benchmarks_beside(args.table))
    for name, rows in split(read_table(args.table), args.budget).items():
        if not (chosen := points(rows, results)).empty:
            for path in save(draw(name, chosen), numbers(name, chosen), args.out / f"{name}_benchmarks"):
                print(path)


def _studies(args: argparse.Namespace) -> Iterator[Study]:
    """Yield what can be judged; what cannot is named at the end, so that one unfinished budget stops no other."""
    from analysis.collect import read_table
    from analysis.study import read_study, split

    troubles = []
    for name, rows in split(read_table(args.table), args.budget).items():
        try:
            study = read_study(name, rows)
        except UserError as error:
            troubles.append(f"{name}: {error}")
        else:
            yield study
    if troubles:
        raise UserError("; ".join(troubles))


if __name__ == "__main__":
    sys.exit(main())
