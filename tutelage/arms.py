"""Arm and baseline of a bench: their stages made from its base recipe, run side by side, and what each gave and took."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage import claims, modalities
from tutelage.base import load, registry
from tutelage.base.errors import UserError
from tutelage.base.links import references, stage_of, visit
from tutelage.base.marked import parse, plain
from tutelage.base.method import Bench
from tutelage.core import ledger
from tutelage.core.graph import Graph
from tutelage.core.record import newest_line, write_whole
from tutelage.core.run import run_graph
from tutelage.core.words import finite

SIDES = ("arm", "baseline")
MEASURED_AS = ("length", "evals", "precision")  # what a stage that the base lacks takes over from the base's last
console = Console(highlight=False, markup=False)

Setting = dict[str, Any]  # dotted key of the stage -> value tried


# -- recipes ----------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """A bench with its base recipe, from which the stages of any trial are made."""

    name: str
    bench: Bench
    base: dict[str, Any]

    @staticmethod
    def of(name: str, bench: Bench | None = None) -> Plan:
        bench = bench or registry.module_of(name).BENCH
        if bench is None:
            raise UserError(f"{name} has no bench: BENCH is None in its file")
        path = Path(bench.base) if Path(bench.base).exists() else claims.ROOT / bench.base
        if not path.exists():
            raise UserError(f"{name}: its base recipe {bench.base} is not here; run from the repository's root")
        return Plan(name, bench, plain(parse(path.read_text(encoding="utf-8"), file=str(path))))

    @property
    def stage(self) -> str:
        return self.bench.stage or list(self.base["stages"])[-1]

    def changed(self, side: str, setting: Setting) -> dict[str, Any]:
        """The stage of one side, its setting put in."""
        stages = self.base["stages"]
        last = list(stages.values())[-1]
        stage = stages.get(self.stage, {key: last[key] for key in MEASURED_AS if key in last})
        stage = merged(stage, self.bench.arm if side == "arm" else self.bench.baseline)
        for key, value in setting.items():
            put(stage, key, value)
        return stage

    def grid(self, side: str) -> list[Setting]:
        tune = self.bench.tune if side == "arm" else self.bench.tune_baseline
        return [dict(zip(tune, values, strict=True)) for values in product(*tune.values())] if tune else [{}]


def merged(stage: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings key by key; a method's entry, a start and everything else replace what was there."""
    out = deepcopy(dict(stage))
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        entry = key == "start" or (both and "use" in value)
        out[key] = merged(out[key], value) if both and not entry else deepcopy(value)
    return out


def put(stage: Any, dotted: str, value: Any) -> None:
    """Set `optim.lr` or `methods.0.strength`."""
    *parents, last = dotted.split(".")
    for part in parents:
        stage = stage[int(part)] if isinstance(stage, list) else stage.setdefault(part, {})
    stage[int(last) if isinstance(stage, list) else last] = value


def add(stages: dict[str, Any], plan: Plan, side: str, setting: Setting, *, seed: int, label: str) -> str:
    """Add one trial and the stages it needs, which trials of the same seed share; returns the trial's stage.

    What comes after `--` in a name is no part of a stage's randomness, so that arm and baseline are paired.
    """
    base = plan.base["stages"]
    name = f"{plan.stage}--{side}-{label}"

    def settle(called: str, stage: dict[str, Any]) -> None:
        for need in references(stage, among=base):
            if f"{need}--s{seed}" not in stages:
                settle(f"{need}--s{seed}", deepcopy(base[need]))

        def renamed(reference: str, path: Any) -> str:
            old = stage_of(reference)
            return f"{old}--s{seed}{reference[len(old) :]}" if old in base else reference

        visit(stage, renamed)
        stages[called] = {"save": {"every": "10min", "keep": 1}, **stage, "seed": seed}

    settle(name, plan.changed(side, setting))
    return name


# -- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Trials:
    """Stages that run side by side, and what each took: wall time, with what happens before the first step, and memory."""

    plan: Plan
    runs: Path
    jobs: int | None
    stages: dict[str, Any] = field(default_factory=dict)
    began: dict[str, float] = field(default_factory=dict)
    graph: Graph | None = None

    def run(self, *, may_fail: bool = False) -> dict[str, str]:
        """Make every stage. Trials that fail are left out and named where that is allowed."""
        failed: dict[str, str] = {}
        while True:
            self.graph = self.graph_of({name: s for name, s in self.stages.items() if name not in failed})
            now, stopped = self._run_once()
            if stopped:
                raise UserError(f"stopped and saved: {', '.join(stopped)}; the same command goes on")
            fatal = [name for name in now if not (may_fail and is_trial(name))]
            if fatal:
                raise UserError("; ".join(f"{name}: {now[name]}" for name in fatal))
            failed |= now
            if not now:
                return failed

    def _run_once(self) -> tuple[dict[str, str], list[str]]:
        """Stages that failed, with the reason, and those that were asked to stop; the first failure ends the rest."""
        assert self.graph is not None
        try:
            result = run_graph(self.graph, only=None, jobs=self.jobs, drift="retrain", tell=self._tell)
        except UserError as error:  # of a stage that ran in this very process
            if not self.began:
                raise
            return {list(self.began)[-1]: str(error)}, []
        return result.failed, result.stopped

    def graph_of(self, stages: dict[str, Any]) -> Graph:
        head = {key: value for key, value in self.plan.base.items() if key != "stages"}
        recipe = load.load({**head, "stages": stages})
        name = self.plan.name.replace("/", "-")
        return Graph.resolve(recipe, name=name, modality=modalities.find(recipe.modality), runs=self.runs)

    def _tell(self, stage: str, said: dict[str, Any]) -> None:
        if "memory" in said:
            self._keep(stage, {"memory": said["memory"]})
        elif "finished" in said:
            if self.graph is not None and self.graph.nodes[stage].state == "new":  # else this is but its last part
                self._keep(stage, {"seconds": time.monotonic() - self.began[stage]})
            console.print(f"  {stage}: done", highlight=False)
        elif "failed" in said or "warning" in said:
            console.print(f"  {stage}: {said.get('failed') or said['warning']}", highlight=False, markup=False)
        self.began.setdefault(stage, time.monotonic())

    def _keep(self, stage: str, what: dict[str, float]) -> None:
        """Beside the stage, where a later bench that shares the stage finds it too."""
        path = self.folder(stage) / "cost.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_whole(path, json.dumps({**known, **what}))

    def folder(self, stage: str) -> Path:
        assert self.graph is not None
        folder = self.graph.nodes[stage].folder
        assert folder is not None
        return folder

    def values(self, stage: str) -> dict[str, float]:
        """What was measured when the stage ended."""
        last = newest_line(self.folder(stage) / "metrics.jsonl", kind="eval")
        return {key: float(value) for key, value in last["values"].items() if finite(value)}

    def cost(self, stage: str, *, shared: set[str]) -> dict[str, float]:
        """Of a trial and all that it alone needed."""
        total = dict.fromkeys(("flops", "tokens", "seconds"), 0.0) | {"memory": 0.0}
        for name in self.needed(stage) - shared:
            path = self.folder(name) / "cost.json"
            taken = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            counts = ledger.read(self.folder(name)).cost()
            total["seconds"] += taken.get("seconds", counts["seconds"])
            total["memory"] = max(total["memory"], taken.get("memory", 0.0))
            for key in ("flops", "tokens"):
                total[key] += float(counts[key])
        return total

    def needed(self, stage: str) -> set[str]:
        assert self.graph is not None
        return {stage}.union(*(self.needed(name) for name in self.graph.nodes[stage].inputs))

    def tidy(self) -> None:
        """Checkpoints are many and of no more use; artifacts stay, so that other benches share them."""
        assert self.graph is not None
        for name in self.graph.nodes:
            shutil.rmtree(self.folder(name) / "state", ignore_errors=True)


def is_trial(stage: str) -> bool:
    return any(f"--{side}-" in stage for side in SIDES)


def read(values: Mapping[str, float], metric: str) -> float:
    """A metric; its mean over columns when only those were measured, or over those named (`bits_per_byte/code,prose`)."""
    found = [values[metric]] if metric in values else [v for k, v in values.items() if k.startswith(f"{metric}/")]
    name, _, columns = metric.partition("/")
    if not found and all(f"{name}/{column}" in values for column in columns.split(",")):
        found = [values[f"{name}/{column}"] for column in columns.split(",")]
    if not found:
        raise UserError(f"the metric '{metric}' was not measured; there are: {', '.join(sorted(values))}")
    return sum(found) / len(found)
