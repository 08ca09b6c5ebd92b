"""What is only known once a stage's inputs are there: late-bound values, the chosen start, and so the stage's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tutelage.base.errors import UserError
from tutelage.base.values import late_bound
from tutelage.core import rules
from tutelage.core.graph import Drift, Graph, Node
from tutelage.core.record import newest_line

Choose = Callable[[Drift], str]  # `reuse` or `retrain`, or raises


def settle(graph: Graph, node: Node, *, drift: str | Choose) -> None:
    """Put late-bound values and chosen starts in, then find the node's place. Its inputs are there.

    `drift` as in Graph.place, or a function that is asked.
    """
    node.stage = late_bound(node.stage, tables(graph, node), name=node.name)
    starts = [best(graph, start) if isinstance(start, dict) and "best" in start else start for start in node.starts()]
    if starts != node.starts():
        node.stage = node.stage.model_copy(
            update={"start": starts if isinstance(node.stage.start, list) else starts[0]}
        )
    graph.fingerprint(node)
    try:
        graph.place(node, drift=drift if isinstance(drift, str) else "refuse")
    except Drift as found:
        if isinstance(drift, str):
            raise
        graph.place(node, drift=drift(found))


def look(graph: Graph) -> None:
    """Place stages that this call did not come to (`--only`, a failure) but an earlier one made. Nothing is made."""
    placed = [node for node in graph.nodes.values() if node.folder is not None]
    done = {node.name for node in placed if node.artifact.exists()}
    for node in graph.nodes.values():
        if node.folder is not None or rules.standing(node, done=done, unmade=rules.unmade(graph)) != "ready":
            continue
        try:
            settle(graph, node, drift="refuse")
        except UserError:  # what is there was made from something else
            continue
        if node.state == "new":
            node.folder = None
        elif node.artifact.exists():
            done.add(node.name)


def tables(graph: Graph, node: Node) -> dict[str, dict[str, float]]:
    """Values that finished table stages hold, by stage: `name` (of the last model that has it) and `model/name`."""
    found: dict[str, dict[str, float]] = {}
    for name in node.inputs:
        path = graph.nodes[name].folder
        table = path / "artifact" / "table" / "table.json" if path else None
        if table and table.exists():
            rows: dict[str, dict[str, float]] = json.loads(table.read_text())
            found[name] = {key: value for row in rows.values() for key, value in row.items()}
            found[name] |= {f"{model}/{key}": value for model, row in rows.items() for key, value in row.items()}
    return found


def best(graph: Graph, choice: dict[str, Any]) -> str:
    """The made stage with the best last measure, of `{best: [stages], by: metric, better: lower}`; `by: mean` is the mean
    of bits per byte over all columns."""
    by, sign = choice.get("by", "mean"), -1.0 if choice.get("better") == "higher" else 1.0
    scores: dict[str, float] = {}
    for name in choice["best"]:
        if graph.nodes[name].state == rules.UNMADE:
            continue
        values = newest_line(graph.nodes[name].artifact / "metrics.jsonl", kind="eval").get("values", {})
        if by == "mean":
            bits = [v for k, v in values.items() if k.startswith("bits_per_byte/")]
            values = {"mean": sum(bits) / len(bits)} if bits else {}
        if by not in values:
            raise UserError(
                f"`best` by '{by}': stage {name} has no such measure (it has: {', '.join(values) or 'none'})"
            )
        scores[name] = sign * float(values[by])
    return min(scores, key=lambda name: (scores[name], name))
