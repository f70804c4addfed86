"""The paper's Table 1 for the suite `baselines`: dense, MoE, Engram and a larger Engram at equal P_act.

Sizes and losses, then benchmarks beside their chance level, then what each arm differs by from the mixture of experts,
at equal seeds and items, with p values that hold for all comparisons of the table at once; last, speed and memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from analysis.benchmarks import SAME, Estimate, difference, estimate, score
from analysis.compare import holm
from analysis.speed_table import speed_lines
from analysis.style import count, numbers_table

ALPHA = 0.05
LARGE = "engram-large"
NOTE = """\
Loss in nats per token; bits per byte of the validation text. All is over the seeds that every arm has finished. Scores
are means over seeds, +- one standard error, which adds the spread over items to that over seeds;
{seeds}
_At chance_: the 95% interval holds what guessing scores, or there is none. Differences are taken at equal seeds and
equal items, with 95% t intervals; p is corrected by Holm over all {comparisons} comparisons of this table, bold below
0.05. An interval around zero says that no difference was shown, not that there is none.
"""
ONE_SEED = "with one seed they hold for these models, not for their kind."
SOME_SEEDS = "with few seeds the intervals are wide."


@dataclass(frozen=True)
class _Arm:
    """One column."""

    title: str
    runs: pd.DataFrame


def baselines(name: str, runs: pd.DataFrame, results: pd.DataFrame, speeds: pd.DataFrame) -> str | None:
    """Write the table of one study as markdown.

    Args:
        name: the study.
        runs: its rows of runs.csv.
        results: rows of benchmarks.csv, of these runs and of others.
        speeds: rows of speed.csv, likewise.

    Returns:
        None if the study holds no `engram-large`, and so is no suite of baselines.
    """
    arms = _arms(runs)
    if arms is None:
        return None
    seeds = {int(seed) for arm in arms for seed in arm.runs["seed"]}
    results = results.merge(runs[["run_id", "arm", "seed"]].drop_duplicates("run_id"), on="run_id", validate="m:1")
    groups = _titled([rows for _, rows in results.groupby(SAME, dropna=False)])
    differing: dict[str, list[Estimate | None]] = {
        "validation loss": _loss_differences(arms, "valid_loss"),
        "bits per byte": _loss_differences(arms, "valid_bpb"),
    }
    scores = []
    for title, rows in groups.items():
        of_arm = [rows[rows["run_id"].isin(arm.runs["run_id"])] for arm in arms]
        chance = rows["chance"].iloc[0]
        scores.append([title, "-" if pd.isna(chance) else f"{chance:.4f}", *(_score(part, chance) for part in of_arm)])
        differing[title] = [difference(part, of_arm[1]) for part in of_arm]
    compared, lines = _compared(arms, differing)
    body = [
        f"# {name}: baselines",
        "",
        _head(runs, seeds),
        "",
        *numbers_table(["", *(arm.title for arm in arms)], _sizes(arms)),
        "",
        *(
            numbers_table(["benchmark", "chance", *(arm.title for arm in arms)], scores)
            if scores
            else ["No benchmark results."]
        ),
        "",
        "Minus MoE:",
        "",
        *numbers_table(["", *(arm.title for arm in arms if arm.title != "MoE")], lines),
        "",
        NOTE.format(seeds=ONE_SEED if len(seeds) == 1 else SOME_SEEDS, comparisons=compared),
        *speed_lines({arm.title: arm.runs for arm in arms}, speeds),
        "",
    ]
    return "\n".join(body)


def _arms(runs: pd.DataFrame) -> list[_Arm] | None:
    final = runs[(runs["status"] == "final") & (runs["mode"] == "paper")]
    large = final[final["arm"] == LARGE]
    if large.empty:
        return None
    sweep, rho = final[final["arm"] == "allocation"], float(large["rho"].iloc[0])
    parts = {
        "dense": final[final["arm"] == "dense"],
        "MoE": sweep[(sweep["rho"] - 1).abs() < 1e-9],
        "Engram": sweep[(sweep["rho"] - rho).abs() < 1e-9],
        "Engram, large": large,
    }
    # Means over other seeds would differ by the seeds; differences are taken over shared ones anyway.
    shared = set.intersection(*(set(rows["seed"]) for rows in parts.values() if not rows.empty))
    if shared:
        parts = {title: rows[rows["seed"].isin(shared)] for title, rows in parts.items()}
    return [_Arm(title, rows) for title, rows in parts.items()]


def _head(runs: pd.DataFrame, seeds: set[int]) -> str:
    p_act = float(runs["P_act"].median())
    text = (
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}, {count(float(runs['train_tokens'].max()))} training tokens."
    )
    if p_act < 50e6:
        text += f" Tiny models (P_act {count(p_act)}): the pipeline is shown, nothing is said about the paper's scale."
    return text


def _titled(groups: list[pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Results by title. Where titles are alike, what else tells the results apart is added: the harness, say."""
    titles = [title_of(rows) for rows in groups]
    found = {}
    for title, rows in zip(titles, groups, strict=True):
        alike = [other.iloc[0] for text, other in zip(titles, groups, strict=True) if text == title]
        told = [f"{key} {str(rows[key].iloc[0])[:12]}" for key in SAME if len({str(one[key]) for one in alike}) > 1]
        found[f"{title}; {', '.join(told)}" if told else title] = rows
    return found


def title_of(rows: pd.DataFrame) -> str:
    """What a line of results is of: benchmark, metric, shots, items."""
    first = rows.iloc[0]
    shots = f", {first['shots']}-shot" if first["shots"] else ""
    part = "" if pd.isna(first["limit"]) else f", first {first['limit']} items of each task"
    name = str(first["benchmark"]).removesuffix(f"_{first['shots']}shot")
    return f"{name} ({first['metric']}{shots}, {first['n']:,} items{part})"


def _sizes(arms: list[_Arm]) -> list[list[str]]:
    def cells(column: str, show: Callable[[float], str]) -> list[str]:
        return ["-" if arm.runs.empty else show(float(arm.runs[column].mean())) for arm in arms]

    return [
        ["P_tot", *cells("P_tot", count)],
        ["P_act", *cells("P_act", count)],
        ["P_engram", *cells("P_engram", count)],
        ["FLOPs per token", *cells("flops_per_token", count)],
        ["training tokens", *cells("train_tokens", count)],
        ["seeds", *(str(len(arm.runs)) for arm in arms)],
        ["validation loss", *(_mean(arm.runs["valid_loss"]) for arm in arms)],
        ["bits per byte", *(_mean(arm.runs["valid_bpb"]) for arm in arms)],
    ]


def _mean(values: pd.Series) -> str:
    if values.empty:
        return "-"
    found = estimate(values.tolist(), None)
    return f"{found.value:.4f}" + ("" if found.stderr is None else f" +- {found.stderr:.4f}")


def _score(rows: pd.DataFrame, chance: float) -> str:
    if rows.empty:
        return "-"
    found = score(rows)
    text = f"{found.value:.4f}" + ("" if found.stderr is None else f" +- {found.stderr:.4f}")
    if pd.isna(chance):
        return text
    above = score(rows, minus=float(chance))
    if above.high is not None and above.high < 0:
        return f"{text}, _below chance_"
    return f"{text}, _at chance_" if above.low is None or above.low <= 0 else text


def _loss_differences(arms: list[_Arm], column: str) -> list[Estimate | None]:
    found: list[Estimate | None] = []
    for arm in arms:
        pairs = arm.runs.merge(arms[1].runs, on="seed", suffixes=("", "_moe"))
        values = (pairs[column] - pairs[f"{column}_moe"]).tolist()
        found.append(estimate(values, None) if values else None)
    return found


def _compared(arms: list[_Arm], differing: dict[str, list[Estimate | None]]) -> tuple[int, list[list[str]]]:
    """Lines of differences from the MoE, and how many p values were corrected together."""
    others = [i for i, arm in enumerate(arms) if arm.title != "MoE"]
    places = [(title, i) for title in differing for i in others]
    tested = [(place, e.p) for place in places if (e := differing[place[0]][place[1]]) is not None and e.p is not None]
    corrected = dict(zip((place for place, _ in tested), holm([p for _, p in tested]), strict=True))
    lines = [
        [title, *(_difference(differing[title][i], corrected.get((title, i))) for i in others)] for title in differing
    ]
    return len(tested), lines


def _difference(found: Estimate | None, p: float | None) -> str:
    if found is None:
        return "-"
    text = f"{found.value:+.4f}"
    if found.low is None or found.high is None or p is None:
        return text
    text += f" ({found.low:+.4f} to {found.high:+.4f}), p {p:.2g}"
    return f"**{text}**" if p < ALPHA else text
