"""Command line: collect finished runs into a table, and draw and judge from it. Needs no GPU and no checkpoint."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import BadFile, UserError

if TYPE_CHECKING:
    from analysis.dossier import Dossier

EXAMPLES = """examples:
  python -m analysis collect                        results/runs/* -> results/runs.csv, benchmarks.csv, speed.csv
  python -m analysis figures                        every figure whose runs are there -> results/figures
  python -m analysis figures --budget cpu-small
  python -m analysis tables --table other.csv --out /elsewhere
  python -m analysis claims                         the paper's claims, judged on your runs
  python -m analysis report                         one HTML page per budget, to open anywhere
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 for a failure, or 2 for a mistake the user can mend."""
    args = _parser().parse_args(argv)
    commands = {"collect": _collect, "figures": _figures, "tables": _tables, "claims": _claims, "report": _report}
    try:
        commands[args.command](args)
    except UserError as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        is_barred = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        print(f"analysis: {error}{'; --table and --out name other places' if is_barred else ''}", file=sys.stderr)
        return 2 if is_barred else 1
    except BadFile as error:
        print(f"analysis: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("analysis: stopped; files that were named are whole", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m analysis", description=__doc__, epilog=EXAMPLES, formatter_class=plain
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{collect,tables,figures,claims,report}")
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
    add("figures", "draw every figure whose runs are there as PNG and PDF, with its numbers as JSON", table, drawn)
    add("tables", "write every suite's points as a markdown table", table, drawn)
    add("claims", "judge the paper's claims on each budget's runs, as markdown and JSON", table, drawn)
    add("report", "write one self-contained HTML page for each budget", table, drawn)
    return parser


# The imports below wait for the command, so that --help answers at once.


def _collect(args: argparse.Namespace) -> None:
    from analysis.collect import collect, write_table

    table = collect(args.runs)
    write_table(table, args.table)
    diverged = int((table["status"] == "diverged").sum())
    print(f"{args.table}: {len(table)} runs" + (f", {diverged} of them diverged" if diverged else ""))
    _collect_more(args)


def _collect_more(args: argparse.Namespace) -> None:
    """What other commands have found out about the runs, each kind in a table of its own."""
    from analysis import benchmarks, speed
    from analysis.collect import write_table

    for name, found in (("benchmarks", benchmarks.collect(args.runs)), ("speed", speed.collect(args.runs))):
        if not found.empty:
            write_table(found, path := _beside(args.table, name))
            print(f"{path}: {len(found)} {'results' if name == 'benchmarks' else 'measurements'}")


def _beside(table: Path, name: str) -> Path:
    return table.with_name(f"{name}.csv")


def _figures(args: argparse.Namespace) -> None:
    from analysis.figures import save
    from analysis.gallery import as_json, drawn_all

    for dossier in _dossiers(args):
        for name, drawn in drawn_all(dossier):
            if isinstance(drawn, str):
                print(f"{dossier.name}: no figure {name}: {drawn}", file=sys.stderr)
                continue
            for path in save(drawn.figure, as_json(drawn, dossier, name), args.out / f"{dossier.name}_{name}"):
                print(path)
            if drawn.caption:
                print(drawn.caption)
        _draw_benchmarks(dossier, args)


def _tables(args: argparse.Namespace) -> None:
    from analysis.collect import write_atomically
    from analysis.tables import allocation, points

    for dossier in _dossiers(args):
        for suite, runs in dossier.suites.items():
            if suite == "allocation" and dossier.study is None:
                continue  # its trouble is said at the end
            path = args.out / f"{dossier.name}_{suite}.md"
            if suite == "allocation" and dossier.study is not None:
                # Its sentence says by itself that models are tiny.
                text = allocation(dossier.study, dossier.warning if dossier.is_one_minute else "")
            else:
                text = points(runs, dossier.warning)
            write_atomically(path, text)
            print(path)
        _write_table_1(dossier, args)


def _claims(args: argparse.Namespace) -> None:
    import json

    from analysis.claims import as_json, judge_all
    from analysis.collect import write_atomically
    from analysis.tables import claims, verdict

    for dossier in _dossiers(args):
        findings = judge_all(dossier)
        path = args.out / f"{dossier.name}_claims.md"
        write_atomically(path, claims(dossier, findings))
        write_atomically(path.with_suffix(".json"), json.dumps(as_json(dossier, findings), indent=2) + "\n")
        print(f"{dossier.name}: {dossier.n_seeds} seeds. {dossier.warning}".rstrip())
        for finding in findings:
            print(f"  {verdict(finding):32} {finding.claim.text} {finding.answer.measured}")
        print(path)
        print(path.with_suffix(".json"))


def _report(args: argparse.Namespace) -> None:
    from analysis.collect import write_atomically
    from analysis.report import page

    for dossier in _dossiers(args):
        path = args.out / f"{dossier.name}_report.html"
        write_atomically(path, page(dossier))
        print(path)


def _write_table_1(dossier: Dossier, args: argparse.Namespace) -> None:
    from analysis import benchmarks, speed
    from analysis.baselines_table import baselines
    from analysis.collect import write_atomically

    results = benchmarks.read_table(_beside(args.table, "benchmarks"))
    speeds = speed.read_table(_beside(args.table, "speed"))
    if (text := baselines(dossier.name, dossier.of_one_backbone, results, speeds)) is not None:
        write_atomically(path := args.out / f"{dossier.name}_table1.md", text)
        print(path)


def _draw_benchmarks(dossier: Dossier, args: argparse.Namespace) -> None:
    from analysis.benchmark_figure import draw, numbers, points
    from analysis.benchmarks import read_table
    from analysis.figures import save

    chosen = points(dossier.of_one_backbone, read_table(_beside(args.table, "benchmarks")))
    if not chosen.empty:
        figure = draw(dossier.name, chosen, dossier.warning)
        for path in save(figure, numbers(dossier.name, chosen), args.out / f"{dossier.name}_benchmarks"):
            print(path)


def _dossiers(args: argparse.Namespace) -> Iterator[Dossier]:
    """Yield what there is; what could not be read is named at the end, so that one unfinished suite stops no other."""
    from analysis.collect import read_table
    from analysis.dossier import read_dossiers

    troubles: dict[str, None] = {}
    for dossier in read_dossiers(read_table(args.table), args.budget):
        yield dossier
        troubles |= {f"{dossier.name}: {trouble}": None for trouble in dossier.troubles}
    if troubles:
        raise UserError("; ".join(troubles))


if __name__ == "__main__":
    sys.exit(main())
