"""Benches: recipes that resolve, trials paired by seed, entries that only grow, verdicts together."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tutelage import arms, bench, claims, modalities
from tutelage.base import load, registry
from tutelage.base.errors import UserError
from tutelage.base.method import Bench
from tutelage.catalog import rows
from tutelage.core import stats
from tutelage.core.graph import Graph
from tutelage.modalities.text import toy

CLAIMING = [name for name in registry.names() if claims.claims(name)]


def small(folder: Path, **more: Any) -> Bench:
    """A bench on the toy recipe."""
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(toy.recipe(folder / "data", steps=6)), encoding="utf-8")
    return Bench(
        **{
            "base": str(path),
            "arm": {"methods": [{"use": "continual/replay", "rate": 0.5}]},
            "metric": "bits_per_byte/a",
            "better": "lower",
            "margin": 0.0,
            "tune": {"optim.lr": [1e-3, 1e-2]},
            "tune_baseline": {"optim.lr": [1e-3, 1e-2]},
            "tune_by": "bits_per_byte",
            **more,
        }
    )


# -- the files' own benches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLAIMING)
def test_every_bench_makes_a_recipe_that_resolves(name: str, tmp_path: Path) -> None:
    plan = arms.Plan.of(name)
    stages: dict[str, Any] = {}
    for side in arms.SIDES:
        for i, setting in enumerate(plan.grid(side)):
            arms.add(stages, plan, side, setting, seed=1, label=f"t{i}")
    recipe = load.load({"stages": stages})
    graph = Graph.resolve(recipe, name="bench", modality=modalities.find("text"), runs=tmp_path)
    tested = [node for node in graph.nodes.values() if arms.is_trial(node.name)]
    assert {node.root for node in tested} == {plan.stage}, "arm and baseline draw the same numbers"
    assert plan.bench.margin > 0 and plan.bench.metric and plan.bench.scale
    assert len({node.stage.length for node in tested}) == 1
    for node in graph.nodes.values():
        if node.stage.apply:
            starts = {graph.nodes[name].stage.length for name in node.inputs}
            assert starts == {node.stage.length}, "measured as it was trained"


@pytest.mark.parametrize("name", CLAIMING)
def test_arm_and_baseline_are_tuned_with_equally_many_trials(name: str) -> None:
    plan = arms.Plan.of(name)
    assert len(plan.grid("arm")) == len(plan.grid("baseline"))
    if plan.bench.metric.startswith("forgetting") and plan.bench.tune:
        assert plan.bench.tune_by, "tuned for forgetting alone, the best rate is one that learns nothing"


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_a_change_is_merged_but_a_method_is_replaced_whole() -> None:
    stage = {"optim": {"use": "optim/adamw", "lr": 1}, "data": {"b": "x"}, "evals": {"every": "none", "final": 8}}
    change = {"optim": {"use": "optim/muon"}, "data": {"a": "y"}, "evals": {"final": 4}}
    found = arms.merged(stage, change)
    assert found["optim"] == {"use": "optim/muon"}
    assert found["data"] == {"b": "x", "a": "y"}
    assert found["evals"] == {"every": "none", "final": 4}
    assert stage["data"] == {"b": "x"}


def test_trials_of_a_seed_share_what_they_start_from(tmp_path: Path) -> None:
    plan = arms.Plan.of("continual/replay", small(tmp_path))
    stages: dict[str, Any] = {}
    names = [
        arms.add(stages, plan, side, {"optim.lr": 0.5}, seed=seed, label=f"s{seed}")
        for seed in (1, 2)
        for side in arms.SIDES
    ]
    assert list(stages) == ["one--s1", *names[:2], "one--s2", *names[2:]]
    assert stages["two--arm-s2"]["start"] == "one--s2"
    assert stages["two--arm-s2"]["optim"]["lr"] == 0.5
    assert stages["two--baseline-s1"].get("methods") is None
    assert plan.base["stages"]["two"]["start"] == "one"


def test_a_metric_without_a_column_is_the_mean_over_columns() -> None:
    values = {"bits_per_byte/a": 1.0, "bits_per_byte/b": 3.0, "forgetting/a": 9.0}
    assert arms.read(values, "bits_per_byte") == 2.0
    assert arms.read(values, "forgetting/a") == 9.0
    assert arms.read({**values, "bits_per_byte/c": 5.0}, "bits_per_byte/a,c") == 3.0
    with pytest.raises(UserError, match="'accuracy' was not measured"):
        arms.read(values, "accuracy")


# -- a bench, small ---------------------------------------------------------------------------------------------------


def test_a_bench_tunes_both_sides_and_measures_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(tmp_path)
    led = rows.row(512).model_copy(update={"covered_by": ("continual/replay",)})
    monkeypatch.setattr(rows, "rows", lambda: (led,))
    results, runs = tmp_path / "results", tmp_path / "runs"
    entry = bench.run_bench("continual/replay", seeds=2, runs=runs, results=results, bench=made, trials=2, jobs=2)
    assert entry["tuning"]["trials"] == 2
    for side in arms.SIDES:
        tried = entry["tuning"][side]["tried"]
        assert len(tried) == 2
        best = min(tried, key=lambda row: row["value"])
        assert entry["tuning"][side]["setting"] == best["setting"]
        assert len(entry["values"][side]) == 2
        assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(entry["measures"][side][0])
        assert entry["cost"][side]["flops"] > 0 and entry["cost"][side]["seconds"] > 0
        assert entry["cost"][side]["memory"] > 0
    pairs = zip(entry["values"]["arm"], entry["values"]["baseline"], strict=True)
    assert entry["differences"] == [arm - baseline for arm, baseline in pairs]
    assert entry["difference"]["mean"] < 0, "replay of the old data helps on the old data"
    assert entry["scale"]["tokens"] > 0 and entry["scale"]["parameters"] > 1000
    assert entry["papers"] == {"512": led.claim}, "the catalog's claims that it was made for"
    starts = [p for p in (runs / "continual-replay").iterdir() if p.name.startswith("one--")]
    assert sorted(p.name for p in starts) == ["one--s1", "one--s100", "one--s2"], "the start is trained once a seed"
    assert not list(runs.glob("*/*/*/state"))

    path = results / "continual-replay.json"
    before = path.read_text(encoding="utf-8")
    again = bench.run_bench("continual/replay", seeds=2, runs=runs, results=results, bench=made, trials=2, jobs=2)
    assert again == entry and path.read_text(encoding="utf-8") == before, "what was measured is not measured again"


def test_a_trial_that_diverges_is_the_worst_and_no_more(tmp_path: Path) -> None:
    made = small(tmp_path, arm={}, tune={"optim.lr": [1e-2, 1e30]}, better="higher")
    plan = arms.Plan.of("continual/replay", made)
    found = bench.tuned(plan, trials=2, runs=tmp_path / "runs", jobs=2)
    assert found["arm"]["setting"] == {"optim.lr": 1e-2}
    assert found["arm"]["tried"][1]["value"] is None and "not a number" in found["arm"]["tried"][1]["failed"]
    assert len([row for row in found["baseline"]["tried"] if row["value"] is not None]) == 2


@pytest.mark.parametrize(
    ("grid", "last", "value"),
    [
        ([1e-3, 3e-3, 1e-2], True, 3e-2),
        ([1e-3, 3e-3, 1e-2], False, 3e-4),
        ([0.25, 0.5], True, 1.0),
        ([0.2, 0.4, 0.6, 0.8], True, 1.0),
        ([0.2, 0.4, 0.6, 0.8], False, 0.1),
        ([0.0, 0.1], False, -0.1),
        ([0.9, 0.98], False, 0.8),
        ([0.5, 0.52], True, 0.52 * 0.52 / 0.5),
        ([32, 64], True, 128),
        ([10, 20, 30], True, 40),
        ([1, 2], False, 0),
    ],
)
def test_a_grid_goes_on_in_its_own_progression(grid: list[float], last: bool, value: float) -> None:
    found = bench.next_after(grid, last=last)
    assert found == pytest.approx(value) and type(found) is type(grid[0])


def answered(
    arm: Callable[[dict[str, float]], float], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[dict[str, Any]]]:
    """Trials are answered at once, the baseline's the better the smaller its rate; returns those that were made."""
    tried: dict[str, list[dict[str, Any]]] = {"arm": [], "baseline": []}

    def attempted(plan: Any, wanted: Any, **_: Any) -> dict[str, list[dict[str, Any]]]:
        value = {"arm": arm, "baseline": lambda setting: setting["optim.lr"]}
        made = {side: [{"setting": s, "value": value[side](s)} for s in settings] for side, settings in wanted.items()}
        for side, done in made.items():
            tried[side] += done
        return made

    monkeypatch.setattr(bench, "attempted", attempted)
    return tried


def test_a_tuning_goes_on_beyond_an_end_that_is_best_and_no_further_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = arms.Plan.of("continual/replay", small(tmp_path))
    tried = answered(lambda setting: abs(setting["optim.lr"] - 0.05), monkeypatch)
    found = bench.tuned(plan, trials=None, runs=tmp_path, jobs=0)
    rates = {side: [row["setting"]["optim.lr"] for row in tried[side]] for side in tried}
    assert rates["arm"] == pytest.approx([1e-3, 1e-2, 0.1, 1e-4, 1e-5]), "an end; then what was best of the baseline"
    assert rates["baseline"] == pytest.approx([1e-3, 1e-2, 1e-4, 1e-5, 1e-6])
    assert found["arm"]["setting"] == {"optim.lr": 1e-2} and found["baseline"]["setting"]["optim.lr"] == 1e-6
    assert not claims.edges(found["arm"]) and claims.edges(found["baseline"])
    assert (found["trials"], found["rounds"]) == (2, bench.ROUNDS)

    for side in tried:
        tried[side].clear()
    again = bench.tuned(plan, trials=None, runs=tmp_path, jobs=0, past={**found, "rounds": bench.ROUNDS - 1})
    rates = {side: [row["setting"]["optim.lr"] for row in tried[side]] for side in tried}
    assert rates["arm"] == pytest.approx([1e-6]) and rates["baseline"] == pytest.approx([1e-7])
    assert len(again["arm"]["tried"]) == 6, "what was tried is not tried again"


def test_a_side_tries_what_is_best_on_the_other() -> None:
    def side(best: dict[str, Any], *tried: dict[str, Any]) -> dict[str, Any]:
        return {"setting": best, "tried": [{"setting": setting} for setting in (best, *tried)]}

    arm = side({"k": 2, "lr": 0.3, "kind": "a"}, {"k": 1, "lr": 0.1, "kind": "b"}, {"k": 3, "lr": 0.9, "kind": "a"})
    baseline = side({"lr": 0.2, "kind": "b"}, {"lr": 0.3, "kind": "a"}, {"lr": 0.1, "kind": "a"})
    assert bench.ahead({"arm": arm, "baseline": baseline}) == {
        "arm": [{"k": 2, "lr": 0.2, "kind": "a"}],
        "baseline": [],
    }


def test_a_value_beyond_that_its_method_refuses_is_written_down_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"methods.0.rate": [0.5, 0.9]}
    plan = arms.Plan.of("continual/replay", small(tmp_path, tune=grid, tune_baseline={"optim.lr": [1e-3, 1e-2]}))
    tried = answered(lambda setting: -setting["methods.0.rate"], monkeypatch)
    found = bench.tuned(plan, trials=None, runs=tmp_path, jobs=0)
    assert [row["setting"]["methods.0.rate"] for row in tried["arm"]] == [0.5, 0.9], "2 was not even begun"
    last = found["arm"]["tried"][-1]
    assert last["setting"] == {"methods.0.rate": 2.0} and last["value"] is None and "rate" in last["failed"]
    assert not claims.edges(found["arm"]), "there is nothing beyond 0.9 that may be asked for"
    plan = arms.Plan.of("continual/replay", small(tmp_path, tune=grid, tune_baseline={"seed": ["a", "b"]}))
    monkeypatch.setattr(bench, "attempted", lambda plan, wanted, **_: {
        side: [{"setting": s, "value": -s.get("methods.0.rate", 0.0)} for s in of] for side, of in wanted.items()
    })  # fmt: skip
    assert bench.tuned(plan, trials=None, runs=tmp_path, jobs=0)["rounds"] == 1, "a round of refusals is over, too"


def test_a_measured_bench_whose_tuning_had_not_gone_on_does_so_and_keeps_what_stays_the_best(
    tmp_path: Path,
) -> None:
    made = small(tmp_path)
    results, runs = tmp_path / "results", tmp_path / "runs"
    first = bench.run_bench("continual/replay", seeds=2, runs=runs, results=results, bench=made, trials=2, jobs=2)
    assert claims.ends(first), "two rates: one of them is best, an end each"
    second = bench.run_bench("continual/replay", seeds=2, runs=runs, results=results, bench=made, jobs=2)
    for side in arms.SIDES:
        assert second["tuning"][side]["tried"][:2] == first["tuning"][side]["tried"]
        assert len(second["tuning"][side]["tried"]) > 2
    same = all(second["tuning"][side]["setting"] == first["tuning"][side]["setting"] for side in arms.SIDES)
    assert (second.get("measured") == first["date"]) is same and (second["values"] == first["values"]) is same
    assert claims.counted("continual/replay", now=first["version"], results=results) == second
    third = bench.run_bench("continual/replay", seeds=2, runs=runs, results=results, bench=made, jobs=2)
    assert third == second and len(claims.entries("continual/replay", results=results)) == 2


def test_one_side_without_a_grid_leaves_both_untuned(tmp_path: Path) -> None:
    plan = arms.Plan.of("continual/replay", small(tmp_path, tune={}))
    found = bench.tuned(plan, trials=None, runs=tmp_path / "runs", jobs=0)
    assert found["trials"] == 1 and found["arm"]["setting"] == found["baseline"]["setting"] == {}


def test_one_seed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least two seeds"):
        bench.run_bench("continual/replay", seeds=1, runs=tmp_path, results=tmp_path, bench=small(tmp_path))


def test_a_method_without_a_bench_says_so() -> None:
    with pytest.raises(UserError, match="objective/causal_lm has no bench"):
        bench.run_bench("objective/causal_lm")


# -- verdicts ---------------------------------------------------------------------------------------------------------


def entry(name: str, differences: list[float], **more: Any) -> dict[str, Any]:
    sides = {"arm": [1.0 + d for d in differences], "baseline": [1.0] * len(differences)}
    found = stats.paired(differences)
    return {
        "date": "2030-01-01T00:00:00+00:00",
        "method": name,
        "version": claims.version(name),
        "metric": "bits_per_byte/a",
        "better": "lower",
        "margin": 0.01,
        "seeds": list(range(len(differences))),
        "values": sides,
        "differences": differences,
        "difference": {key: getattr(found, key) for key in ("mean", "low", "high", "p")},
        "tuning": {side: {"setting": {}, "tried": []} for side in sides},
        "bench": {"baseline": {"data": {"a": "b|c"}}},
        "cost": {"ratio": {"flops": 1.25, "seconds": 2.0}},
        "scale": {"parameters": 1_100_000, "tokens": 1_200_000, "paper": "7 B"},
        **more,
    }


def test_statuses_are_read_from_the_first_measurement_of_each_version(tmp_path: Path) -> None:
    seen, opposite, none, unclear, stale, never, *_ = CLAIMING
    claims.append(entry(seen, [-0.5, -0.51, -0.49, -0.5, -0.52]), results=tmp_path)
    claims.append(entry(seen, [0.5, 0.51, 0.49, 0.5, 0.52]), results=tmp_path)  # a second try of the same version
    claims.append(entry(opposite, [0.5, 0.51, 0.49, 0.5, 0.52]), results=tmp_path)
    claims.append(entry(none, [0.001, -0.001, 0.0, 0.001, -0.002]), results=tmp_path)
    claims.append(entry(unclear, [0.5, -0.4, 0.3, -0.2, 0.1]), results=tmp_path)
    claims.append(entry(stale, [-0.5, -0.51, -0.49, -0.5, -0.52], version={"code": "old"}), results=tmp_path)
    found = claims.verdicts(tmp_path)
    assert [found[name] for name in (seen, opposite, none, unclear, stale, never)] == [
        "effect seen", "opposite", "no effect", "inconclusive", "stale", "not run",
    ]  # fmt: skip
    assert set(found) == set(CLAIMING)
    assert len(json.loads(claims.path_of(seen, results=tmp_path).read_text(encoding="utf-8"))) == 2


def test_the_verdicts_are_corrected_together(tmp_path: Path) -> None:
    """A difference that would count alone does not count as one of many."""
    weak = [-0.5, -0.1, -0.9, -0.4, -0.2]
    first, *others = CLAIMING
    p = stats.paired(weak).p
    assert p is not None and 0.05 / len(CLAIMING) < p < 0.05
    claims.append(entry(first, weak), results=tmp_path)
    assert claims.verdicts(tmp_path)[first] == "effect seen"
    for name in others:
        claims.append(entry(name, [0.5, -0.4, 0.3, -0.2, 0.1]), results=tmp_path)
    assert claims.verdicts(tmp_path)[first] == "inconclusive"


def test_the_table_shows_scale_interval_and_cost(tmp_path: Path) -> None:
    name = CLAIMING[0]
    claims.append(entry(name, [-0.5, -0.51, -0.49, -0.5, -0.52]), results=tmp_path)
    text = claims.index_text(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
    for part in (
        "effect seen",
        "| `{data: {a: b\\|c}}` |",
        "-0.5040 [",
        "1.25× FLOPs",
        "2.00× time",
        "1.10 M",
        "1.20 M",
        "| 5 |",
        "7 B",
    ):
        assert part in line
    table = [row for row in text.splitlines() if row.startswith("|")]
    assert len({row.replace("\\|", "").count("|") for row in table}) == 1 and len(table) == len(CLAIMING) + 2


def test_what_was_best_at_the_end_of_a_grid_is_told_under_the_table(tmp_path: Path) -> None:
    name, other = CLAIMING[:2]
    grid: list[dict[str, Any]] = [
        {"lr": lr, "times": [k], "kind": kind} for lr in (1, 0.1, 3) for k in (1, 2) for kind in "ab"
    ]

    def tuned(arm: int, baseline: int) -> dict[str, Any]:
        tried = [{"setting": setting, "value": 1.0} for setting in grid]
        return {side: {"setting": grid[i], "tried": tried} for side, i in (("arm", arm), ("baseline", baseline))}

    claims.append(entry(other, [0.1, 0.2], tuning=tuned(0, 1)), results=tmp_path)
    assert "Best at the end of a grid" not in claims.index_text(tmp_path)
    claims.append(entry(name, [0.1, 0.2], tuning=tuned(4, 8)), results=tmp_path)
    told = claims.index_text(tmp_path).splitlines()[-1]
    assert told == f"- `{name}`: arm's `lr` 0.1, the smallest of 3; baseline's `lr` 3, the largest of 3"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("BENCH = ", "# a remark\nBENCH = ", True),
        ("0.8 * off", "0.9 * off", False),
        ("margin=0.01", "margin=0.02", False),
        ('{"moved": moved(run, "a")}', '{"moved": moved(run, "b")}', False),
    ],
)
def test_a_changed_claim_is_another_version(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = registry.path_of("continual/ewc").read_text(encoding="utf-8")
    before = claims.version("continual/ewc")
    assert old in text
    (tmp_path / "ewc.py").write_text(text.replace(old, new), encoding="utf-8")
    monkeypatch.setattr(claims.registry, "path_of", lambda name: tmp_path / "ewc.py")
    assert (claims.version("continual/ewc") == before) is same
