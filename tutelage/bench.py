"""`tutelage bench`: a method's claim, measured. Tuned arm against tuned baseline on fresh seeds, side by side."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version as installed
from itertools import pairwise
from pathlib import Path
from typing import Any

from tutelage import claims
from tutelage.arms import SIDES, Plan, Setting, Trials, add, console, read
from tutelage.base import card, registry
from tutelage.base.errors import UserError
from tutelage.base.method import Bench
from tutelage.catalog import rows
from tutelage.core import ledger, stats

TUNING_SEED = 100
ROUNDS = 3  # of trials after the grid's
VERSIONS = ("tutelage", "torch", "transformers", "numpy")


# -- tuning -----------------------------------------------------------------------------------------------------------


def tuned(
    plan: Plan, *, trials: int | None, runs: Path, jobs: int | None, past: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The best setting of each side on a seed of its own; untuned if one side has nothing to tune.

    Both try equally many points of their grids, and then, in `ROUNDS` rounds at most, what lies `ahead` of their best ones.
    past: a tuning of this very bench that has rounds left.
    """
    grids = {side: plan.grid(side) for side in SIDES}
    count = min(len(grid) for grid in grids.values())
    count = min(count, trials or count)
    about: dict[str, Any] = {"seed": TUNING_SEED, "trials": count, "by": plan.bench.tune_by or plan.bench.metric}
    if count < 2:
        return {**about, "trials": 1, **{side: {"setting": {}, "tried": []} for side in SIDES}}
    sign = 1.0 if plan.bench.better == "lower" or plan.bench.tune_by else -1.0  # `tune_by` is in bits
    found: dict[str, Any] = {side: {"tried": list(past[side]["tried"]) if past else []} for side in SIDES}
    wanted = {side: [] if past else evenly(grids[side], count) for side in SIDES}
    rounds = past.get("rounds", 0) if past else 0
    while True:
        for side, more in attempted(plan, wanted, after=found, by=about["by"], runs=runs, jobs=jobs).items():
            found[side]["tried"] += more
            done = [row for row in found[side]["tried"] if row["value"] is not None]
            if not done:
                reason = found[side]["tried"][0]["failed"]
                raise UserError(f"{plan.name}: every trial of the {side} failed: {reason}")
            found[side]["setting"] = min(done, key=lambda row: sign * row["value"])["setting"]
        if trials or rounds == ROUNDS:
            break
        rounds += 1  # also one in which all is refused or nothing is ahead, so that no measurement takes it up again
        for side, settings in ahead(found).items():
            reasons = [(setting, refused(plan, side, setting, runs=runs)) for setting in settings]
            wanted[side] = [setting for setting, reason in reasons if reason is None]
            found[side]["tried"] += [{"setting": s, "value": None, "failed": reason} for s, reason in reasons if reason]
        if not any(wanted.values()):
            break
    return {**about, "rounds": rounds, **found}


def ahead(tuning: Mapping[str, Any]) -> dict[str, list[Setting]]:
    """What each side has still to try, starting from its best setting: one step beyond each end of its grid that it lies
    at, in the grid's progression, and, of a number that both sides tune, what is best on the other and untried on this.
    """
    found: dict[str, list[Setting]] = {}
    for side, other in zip(SIDES, reversed(SIDES), strict=True):
        best = tuning[side]["setting"]
        values = {
            key: {next_after(grid, last=best[key] == grid[-1])} for key, grid in claims.edges(tuning[side]).items()
        }
        for key, value in tuning[other]["setting"].items():
            if key in best and type(value) in (int, float):
                values.setdefault(key, set()).add(value)
        tried = {key: [row["setting"][key] for row in tuning[side]["tried"]] for key in values}
        found[side] = [{**best, key: value} for key in values for value in sorted(values[key] - set(tried[key]))]
    return found


def refused(plan: Plan, side: str, setting: Setting, *, runs: Path) -> str | None:
    """Why a recipe with that setting is not even begun."""
    work = Trials(plan, runs, None)
    add(work.stages, plan, side, setting, seed=TUNING_SEED, label="refused")
    try:
        work.graph_of(work.stages)
    except UserError as error:
        return str(error)
    return None


def attempted(
    plan: Plan,
    wanted: Mapping[str, list[Setting]],
    *,
    after: Mapping[str, Any],
    by: str,
    runs: Path,
    jobs: int | None,
) -> dict[str, list[dict[str, Any]]]:
    """Trials of both sides on the tuning seed, side by side: setting and value, or why there is none."""
    work = Trials(plan, runs, jobs)
    names = {
        side: [
            add(work.stages, plan, side, setting, seed=TUNING_SEED, label=f"t{len(after[side]['tried']) + i}")
            for i, setting in enumerate(settings)
        ]
        for side, settings in wanted.items()
    }
    if not work.stages:
        return {side: [] for side in wanted}
    failed = work.run(may_fail=True)
    tried = {
        side: [
            {"setting": setting, "value": None, "failed": failed[name]}
            if name in failed
            else {"setting": setting, "value": read(work.values(name), by)}
            for name, setting in zip(names[side], settings, strict=True)
        ]
        for side, settings in wanted.items()
    }
    work.tidy()
    return tried


def next_after(grid: list[float], *, last: bool) -> float:
    """One step beyond the largest or smallest of a sorted grid, to one digit: by the last factor, or, where the grid
    goes in equal steps of three or more values or is not all positive, by the last step.
    """
    end, inner = (grid[-1], grid[-2]) if last else (grid[0], grid[1])
    steps = [b - a for a, b in pairwise(grid)]
    even = len(grid) > 2 and max(steps) - min(steps) < 1e-9 * max(steps)
    by_step = 2 * end - inner
    value = by_step if grid[0] <= 0 or (even and by_step > 0) else end * end / inner
    if isinstance(end, int):
        return round(value)
    short = float(f"{value:.0e}")
    return short if (short > end) == last and short != end else value


def evenly(grid: list[Setting], count: int) -> list[Setting]:
    """`count` points of a grid, its ends among them."""
    if count >= len(grid):
        return grid
    return [grid[round(i * (len(grid) - 1) / (count - 1))] for i in range(count)]


# -- a bench ----------------------------------------------------------------------------------------------------------


def measured(
    plan: Plan, settings: Mapping[str, Setting], *, seeds: list[int], runs: Path, jobs: int | None
) -> dict[str, Any]:
    """Both sides on every seed: values, all measures, and what they cost."""
    work = Trials(plan, runs, jobs)
    names = {
        (side, seed): add(work.stages, plan, side, settings[side], seed=seed, label=f"s{seed}")
        for seed in seeds
        for side in SIDES
    }
    work.run()
    all_values = {side: [work.values(names[side, seed]) for seed in seeds] for side in SIDES}
    values = {side: [read(found, plan.bench.metric) for found in all_values[side]] for side in SIDES}
    costs: dict[str, Any] = {side: [] for side in SIDES}
    for seed in seeds:
        shared = set.intersection(*(work.needed(names[side, seed]) for side in SIDES))
        for side in SIDES:
            costs[side].append(work.cost(names[side, seed], shared=shared))
    cost = {s: {key: sum(c[key] for c in costs[s]) / len(seeds) for key in costs[s][0]} for s in SIDES}
    cost["ratio"] = {k: cost["arm"][k] / cost["baseline"][k] for k in cost["arm"] if cost["baseline"][k]}
    first = names["arm", seeds[0]]
    models = [ledger.parameters(work.folder(name) / "artifact" / "model") for name in work.needed(first)]
    tokens = sum(ledger.read(work.folder(name)).cost()["tokens"] for name in work.needed(first))
    work.tidy()
    scale = {"parameters": max(filter(None, models)), "tokens": tokens, "paper": plan.bench.scale}
    return {"values": values, "measures": all_values, "cost": cost, "scale": scale}


def run_bench(
    name: str,
    *,
    seeds: int = 5,
    trials: int | None = None,
    runs: Path = Path("runs/bench"),
    jobs: int | None = None,
    results: Path = claims.RESULTS,
    bench: Bench | None = None,
) -> dict[str, Any]:
    """Measure a method's claim and add it to its results; what this version of the code has measured is not repeated,
    save that a tuning with something ahead of it goes on first.

    seeds: how many paired seeds, from 1; trials: at most so many settings a side when tuning
    jobs: stages side by side (as many as there are cores when left out); bench: instead of the file's own, unversioned
    """
    plan = Plan.of(name, bench)
    now = claims.version(name) if bench is None else {"code": "", "claim": repr(bench), "recipe": ""}
    known = claims.counted(name, now=now, results=results)
    if known and (trials or known["tuning"].get("rounds", 0) == ROUNDS or not any(ahead(known["tuning"]).values())):
        console.print(f"{name}: measured on {known['date'][:10]}, and nothing changed since")
        return known
    if seeds < 2:
        raise UserError("a claim takes at least two seeds; without them there is no interval")
    versions = {package: installed(package) for package in VERSIONS} | {"python": platform.python_version()}
    past = known if known and known["versions"] == versions else None
    console.print(f"{name}: {plan.bench.metric}, tuning{' goes on' if past else ''}")
    tuning = tuned(plan, trials=trials, runs=runs, jobs=jobs, past=past and past["tuning"])
    chosen = {side: tuning[side]["setting"] for side in SIDES}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    if past and all(chosen[side] == past["tuning"][side]["setting"] for side in SIDES):
        console.print(f"{name}: its settings stay the best, and what was measured with them on {past['date'][:10]}")
        entry = {**past, "date": date, "tuning": tuning, "measured": past["date"]}
        claims.append(entry, results=results)
        return entry
    console.print(f"{name}: {seeds} seeds")
    found = measured(plan, chosen, seeds=list(range(1, seeds + 1)), runs=runs, jobs=jobs)
    pairs = zip(*(found["values"][side] for side in SIDES), strict=True)
    difference = stats.paired([arm - baseline for arm, baseline in pairs])
    about = card.read(registry.path_of(name))
    entry = {
        "date": date,
        "method": name,
        "version": now,
        "claim": f"{plan.bench.metric} is {plan.bench.better} than the baseline's",
        "source": about.fields["Paper"],
        "papers": {str(row.id): row.claim for row in rows.led_by(name)},
        "metric": plan.bench.metric,
        "better": plan.bench.better,
        "margin": plan.bench.margin,
        "bench": asdict(plan.bench),
        "tuning": tuning,
        "seeds": list(range(1, seeds + 1)),
        **found,
        "differences": list(difference.differences),
        "difference": {key: getattr(difference, key) for key in ("mean", "low", "high", "p")},
        "versions": versions,
    }
    claims.append(entry, results=results)
    return entry


def bench_command(
    names: list[str],
    *,
    everything: bool = False,
    seeds: int = 5,
    runs: Path = Path("runs/bench"),
    trials: int | None = None,
) -> None:
    """Measure some methods' claims, or all; then write the table. A bench that cannot be made stops no other."""
    wanted = [name for name in registry.names() if claims.claims(name)] if everything else names
    if not wanted:
        raise UserError("name the methods to measure, or say --all")
    failed = []
    for name in wanted:
        try:
            entry = run_bench(name, seeds=seeds, trials=trials, runs=runs)
        except UserError as error:
            if not everything:
                raise
            failed.append(name)
            console.print(f"{name}: {error}", style="red", markup=False)
            continue
        console.print(f"{name}: {stats.shown(stats.paired(entry['differences']), digits=4)}", markup=False)
        for told in claims.ends(entry):
            console.print(f"{name}: {told}, was best; a wider grid might say otherwise", style="yellow", markup=False)
        claims.write_index()
    claims.write_index()
    console.print(f"Table: {claims.INDEX}", soft_wrap=True)
    for name, status in claims.verdicts().items():
        console.print(f"{name:<28} {status}")
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}")
