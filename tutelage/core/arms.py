"""Arms: stages that start from the same weights, side by side at equal compute."""

from __future__ import annotations

import json
from itertools import permutations
from typing import TYPE_CHECKING, Any

from tutelage.core.ledger import Point, read_at
from tutelage.core.words import finite

if TYPE_CHECKING:
    from tutelage.core.graph import Graph, Node

SAME = 0.01  # budgets within a percent count as equal: the last step may overshoot


def groups(
    graph: Graph, stages: dict[str, dict[str, Any]], *, learned: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Tables of training stages with the same start, two or more.

    stages: the report's, by name
    learned: by stage, which stage of its line first trained on a source (None: kept from before)
    """
    found: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        if node.stage.until is not None and stages[node.name]["state"] != "not entered":
            found.setdefault(json.dumps(node.stage.start, sort_keys=True, default=str), []).append(node)
    tables = []
    for nodes in (nodes for nodes in found.values() if len(nodes) > 1):
        parent = stages.get(graph.stage_name(nodes[0].stage.start) or "", {})
        rows = "@" not in str(nodes[0].stage.start)  # else the start is not what the parent's end measured
        tables.append(_group(nodes, stages, learned, before=parent.get("final", {}) if rows else {}))
    return tables


def _group(
    nodes: list[Node],
    stages: dict[str, dict[str, Any]],
    learned: dict[str, dict[str, Any]],
    *,
    before: dict[str, float],
) -> dict[str, Any]:
    ready = [node for node in nodes if stages[node.name]["final"]]
    budgets = {axis: [stages[node.name][axis] for node in ready] for axis in ("flops", "tokens")}
    differ = {axis: bool(spent) and max(spent) > min(spent) * (1 + SAME) for axis, spent in budgets.items()}
    equal = min(budgets["flops"], default=0)
    rows = [_arm(stages[node.name], node.name, equal, learned[node.name], before) for node in nodes]
    worst: dict[str, float] = {}
    for row in rows:
        for name, value in row["forgetting"].items():
            worst[name] = max(worst.get(name, 0.0), value)
    for row in rows:
        row["taken_back"] = {n: 1 - v / worst[n] for n, v in row["forgetting"].items() if worst[n] > 0}
    seeds = sorted({stages[node.name]["seed"] for node in nodes})
    sizes = sorted({stages[node.name]["parameters"] for node in ready if stages[node.name]["parameters"]})
    return {
        "start": nodes[0].stage.start if isinstance(nodes[0].stage.start, str) else json.dumps(nodes[0].stage.start),
        "budgets_differ": differ,
        "equal_flops": equal,
        "seeds": seeds,
        "parameters": sizes,
        "arms": rows,
        "added": _added(ready, {row["arm"]: row for row in rows}),
    }


def _arm(
    stage: dict[str, Any], name: str, equal: float, learned: dict[str, Any], before: dict[str, float]
) -> dict[str, Any]:
    """One arm: what it spent, what it reached at the group's smallest budget, what it forgot of earlier sources."""
    curves = {label: [Point(*point) for point in points] for label, points in stage["curves"].items()}
    # At its end the thorough measurement serves; on the way there, the rows that every measurement has.
    whole = stage["final"] and stage["flops"] <= equal * (1 + SAME)
    at_equal = {
        label: stage["final"].get(label) if whole else read_at(points, equal, key=lambda p: p.flops)
        for label, points in curves.items()
        if stage["final"]
    }
    forgetting: dict[str, float] = {}
    for label, end in stage["final"].items():
        if learned.get(label, name) == name:
            continue
        if finite(before.get(label)) and finite(end):  # both thoroughly measured
            forgetting[label] = end - before[label]
        elif finite(curves[label][0].bits) and finite(curves[label][-1].bits) and curves[label][0].step == 0:
            forgetting[label] = curves[label][-1].bits - curves[label][0].bits
    return {
        "arm": name,
        "state": stage["state"],
        **{key: stage[key] for key in ("tokens", "flops", "seconds", "seed")},
        "final": stage["final"],
        "at_equal": at_equal,
        "forgetting": forgetting,
    }


def _added(nodes: list[Node], rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of arms of which one has a method more and is else the same: what the method takes back, and its price."""
    found = []
    for less, more in permutations(nodes, 2):
        one, two = (node.stage.model_dump(mode="json") for node in (less, more))
        without, extra = one.pop("methods"), two.pop("methods")
        named = [entry for entry in extra if entry not in without]
        if one != two or less.seed != more.seed or not named or any(entry not in extra for entry in without):
            continue
        before, after = rows[less.name], rows[more.name]
        found.append(
            {
                "methods": [entry if isinstance(entry, str) else entry.get("use") for entry in named],
                "arm": more.name,
                "baseline": less.name,
                "sources": {
                    label: {
                        "without": value,
                        "with": after["forgetting"][label],
                        "taken_back": 1 - after["forgetting"][label] / value if value > 0 else None,
                    }
                    for label, value in before["forgetting"].items()
                    if label in after["forgetting"]
                },
                "price": {  # bits per byte more on what the arms learn
                    label: after["at_equal"][label] - value
                    for label, value in before["at_equal"].items()
                    if label not in before["forgetting"] and finite(value) and finite(after["at_equal"].get(label))
                },
            }
        )
    return found
