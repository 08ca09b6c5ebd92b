"""The report that closes a run: every number of the graph gathered once, as HTML, JSON and CSV, and in short."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tutelage.core import arms, ledger, pages, profile, rules, words
from tutelage.core.record import dumps, write_whole
from tutelage.core.stage import columns
from tutelage.core.transfer import dip, transfer

if TYPE_CHECKING:
    from tutelage.core.graph import Graph, Node

FORMAT = 1  # of report.json
DOUBT = "†"  # beside a number that is too low, since the tokenizer does not know all of the text
MEASURES = ("final_average", "backward_transfer", "forward_transfer", "forgetting")


# -- gathering --------------------------------------------------------------------------------------------------------


def gather(graph: Graph, *, failed: dict[str, str] | None = None) -> dict[str, Any]:
    """Everything the report shows, from the run folders alone.

    `failed` says why stages ended that left no trace of it. Bits per byte throughout, lower is better; tokens and
    FLOPs are counted from a stage's own start, seconds are of training with measurement apart.
    """
    names = labels(graph)
    books = {name: ledger.read(node.folder) for name, node in graph.nodes.items()}
    stages = {
        name: _stage(node, books[name], names[name], why=(failed or {}).get(name)) for name, node in graph.nodes.items()
    }
    for name in rules.unmade(graph):
        stages[name]["state"] = rules.UNMADE
    matrix = {name: dict(stage["final"]) for name, stage in stages.items() if stage["final"]}
    learned = {name: _learned(node, names) for name, node in graph.nodes.items()}
    before = {name: sum(stages[s]["tokens"] for s in node.lineage()) for name, node in graph.nodes.items()}
    for name, stage in stages.items():
        stage["tokens_before"] = before[name]
    sizes = [stage["parameters"] for stage in stages.values() if stage["parameters"]]
    seeds = sorted({stage["seed"] for stage in stages.values()})
    later = {name: _later(graph, name, matrix, stages) for name in matrix}
    filled = _filled(matrix, later, stages)
    measured = [*filled.values(), *(stage["first"] for stage in stages.values())]
    return {
        "format": FORMAT,
        "recipe": graph.name,
        "seeds": seeds,
        "parameters": max(sizes, default=None),
        "scale": scale(seeds, sizes),
        "order": list(graph.nodes),
        "stages": stages,
        "sources": list(dict.fromkeys(label for row in measured for label in row)),
        "forgetting_matrix": filled,
        "filled": {name: row for name, row in later.items() if row},
        "unknown": _unknown(filled, stages, later),
        "at_start": {name: stage["first"] for name, stage in stages.items() if stage["first"]},
        "kl": {name: stage["kl"] for name, stage in stages.items() if stage["kl"]},
        "transfer": {n: _transfer(graph.nodes[n], matrix, learned[n], stages) for n in matrix},
        "dips": _dips(graph, stages, learned),
        "arms": arms.groups(graph, stages, learned=learned),
        "alarms": [{"stage": name, **alarm} for name, stage in stages.items() for alarm in stage["alarms"]],
        "totals": _totals(stages),
    }


def labels(graph: Graph) -> dict[str, dict[str, str]]:
    """By stage: what each measured column is called in the whole graph.

    The same data has one name everywhere; a name that a later stage gives to other data becomes `stage.name`.
    """
    known: dict[str, str] = {}

    def key(spec: Any) -> str:
        return str(spec.model_dump_json(exclude={"weight", "order"}))

    for name, node in graph.nodes.items():
        for column, spec in [*node.stage.data.items(), *node.kept().items()]:
            if key(spec) not in known:
                known[key(spec)] = f"{name}.{column}" if column in known.values() else column
    return {
        name: {column: known.get(key(spec), column) for column, spec in columns(node).items()}
        for name, node in graph.nodes.items()
    }


def _stage(node: Node, book: ledger.Ledger, names: dict[str, str], *, why: str | None) -> dict[str, Any]:
    """One stage's numbers, columns under the graph's names."""

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {names.get(column, column): value for column, value in values.items()}

    state, reason = _state(node, book, why)
    artifact = node.folder / "artifact" if node.folder else None
    table = artifact / "table" / "table.json" if artifact else None
    counts = artifact / "counts.json" if artifact else None
    cost = book.cost()
    return {
        "product": node.stage.product,
        "state": state,
        "why": reason,
        "folder": str(node.folder) if node.folder else None,
        "fingerprint": node.fingerprint,
        "start": [start if isinstance(start, str) else json.dumps(start, default=str) for start in node.starts()],
        "inputs": node.inputs,
        "on": _ways(node),
        "seed": node.seed,
        "parameters": ledger.parameters(artifact / "model") if artifact else None,
        "until": str(node.stage.until) if node.stage.until else None,
        "deterministic": node.stage.engine.deterministic,
        **cost,
        "measuring": book.measuring(),
        "profile": profile.rows(node.folder, training=cost["seconds"]),
        "shares": book.train.shares(),
        "first": named(book.first),
        "final": named(book.final),
        "last": named(book.last(ledger.BITS)),
        "kl": named(book.last("kl/")),
        "unknown": named(book.last("unknown/")),
        "curves": {names.get(c, c): [list(p) for p in book.curve(c)] for c in book.columns()},
        "loss": book.train.curve(),
        "alarms": [{**alarm, "column": names.get(alarm["column"], alarm["column"])} for alarm in book.alarms()],
        "steering": book.steering(),
        "samples": book.samples,
        "remarks": book.words,
        "table": json.loads(table.read_text(encoding="utf-8")) if table and table.exists() else None,
        "counts": json.loads(counts.read_text(encoding="utf-8")) if counts and counts.exists() else None,
    }


def _ways(node: Node) -> list[dict[str, Any]]:
    """The ways out of a stage: the rule, what it enters, and whether it was taken (None as long as the stage is at work)."""
    taken = rules.entered(node.folder)
    over = node.folder is not None and (node.folder / "artifact").exists()
    return [
        {
            "rule": str(rule),
            "enter": rule.enter,
            "taken": (taken is not None and taken["rule"] == i) if over else None,
            "tick": taken["tick"] if taken and taken["rule"] == i else None,
            "why": taken["why"] if taken and taken["rule"] == i else "",
        }
        for i, rule in enumerate(node.stage.on)
    ]


def _state(node: Node, book: ledger.Ledger, why: str | None) -> tuple[str, str]:
    """done, reused, failed, partial (stopped, or still at work) or not run; and why it failed."""
    if book.done:
        return ("reused" if node.state == "reused" else "done"), ""
    if node.folder is None or not node.folder.exists():
        return ("failed" if why else "not run"), why or ""
    trace = node.folder / "error.txt"
    if why or trace.exists():
        last = trace.read_text(encoding="utf-8").strip().splitlines() if trace.exists() else []
        return "failed", why or (last[-1] if last else "")
    return "partial", ""


def _learned(node: Node, names: dict[str, dict[str, str]]) -> dict[str, str | None]:
    """Which stage of a node's line first trained on a source; None for what was kept from before."""
    found: dict[str, str | None] = {}
    for name in [*node.lineage(), node.name]:
        for column in node.graph.nodes[name].stage.data:
            found.setdefault(names[name].get(column, column), name)
    for column in node.kept():
        found.setdefault(names[node.name].get(column, column), None)
    return found


def _later(
    graph: Graph, name: str, matrix: dict[str, dict[str, float]], stages: dict[str, dict[str, Any]]
) -> dict[str, str]:
    """Sources that were not measured when a stage ended, but when one that starts from it began: source to stage."""
    found: dict[str, str] = {}
    for child in graph.nodes.values():
        if child.starts() == [name]:
            for label in stages[child.name]["first"]:
                if label not in matrix[name]:
                    found.setdefault(label, child.name)
    return found


def _filled(
    matrix: dict[str, dict[str, float]], later: dict[str, dict[str, str]], stages: dict[str, dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """The matrix with those gaps closed: same weights, fewer passages."""
    return {
        name: row | {label: stages[child]["first"][label] for label, child in later[name].items()}
        for name, row in matrix.items()
    }


def _unknown(
    filled: dict[str, dict[str, float]], stages: dict[str, dict[str, Any]], later: dict[str, dict[str, str]]
) -> dict[str, dict[str, float]]:
    """By cell of the matrix: the share of the source's bytes that the stage's tokenizer has no tokens for, if any."""
    shares = {
        name: {label: stages[later[name].get(label, name)]["unknown"].get(label, 0.0) for label in row}
        for name, row in filled.items()
    }
    return {name: some for name, row in shares.items() if (some := {k: v for k, v in row.items() if v})}


def _transfer(
    node: Node, matrix: dict[str, dict[str, float]], learned: dict[str, str | None], stages: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    order = [*node.lineage(), node.name]

    def begun(stage: str) -> dict[str, float]:
        """A stage's losses before its first step, on the rows that every measurement has."""
        return {n: points[0][-1] for n, points in stages[stage]["curves"].items() if points and points[0][0] == 0}

    ahead = {label: begun(home)[label] for label, home in learned.items() if home and label in begun(home)}
    return transfer(
        order, matrix=matrix, learned=learned, first=stages[order[0]]["first"], ahead=ahead, begun=begun(order[0])
    )


def _dips(
    graph: Graph, stages: dict[str, dict[str, Any]], learned: dict[str, dict[str, str | None]]
) -> dict[str, dict[str, Any]]:
    """For every stage that trains on from another (or from outside): how each earlier source fared."""
    found: dict[str, dict[str, Any]] = {}
    for name, node in graph.nodes.items():
        if node.stage.until is None:
            continue
        for label, points in stages[name]["curves"].items():
            fell = dip([p[-1] for p in points], [p[1] for p in points])
            if fell and learned[name].get(label, name) != name and points[0][0] == 0:
                found.setdefault(name, {})[label] = fell
    return found


def _totals(stages: dict[str, dict[str, Any]]) -> dict[str, float]:
    keys = ("tokens", "flops", "seconds", "seconds_measuring", "seconds_measuring_final")
    return {key: sum(words.number(stage[key]) for stage in stages.values()) for key in keys}


def scale(seeds: list[int], sizes: list[int]) -> str:
    """What every table says of itself: how many seeds and what size."""
    many = f"one seed ({seeds[0]})" if len(seeds) == 1 else f"{len(seeds)} seeds"
    size = " to ".join(dict.fromkeys(words.amount(size) for size in (min(sizes), max(sizes)))) if sizes else "unknown"
    return f"{many}, {size} parameters"


def doubts(unknown: dict[str, dict[str, float]]) -> list[str]:
    """Why marked cells of the matrix look better than they are, a line a source, with the largest share."""
    shares: dict[str, float] = {}
    for row in unknown.values():
        for source, share in row.items():
            shares[source] = max(share, shares.get(source, 0.0))
    return [
        f"{source}: the tokenizer has no tokens for {share:.1%} of its bytes, which cost next to nothing to predict: "
        "bits per byte are too low there"
        for source, share in shares.items()
    ]


# -- writing ----------------------------------------------------------------------------------------------------------


def write(graph: Graph, folder: Path, *, failed: dict[str, str] | None = None) -> dict[str, Any]:
    """Write report.html, report.json, forgetting_matrix.csv and arms.csv into a folder; returns the numbers."""
    data = gather(graph, failed=failed)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", dumps(data) + "\n")
    write_whole(folder / "forgetting_matrix.csv", matrix_csv(data))
    write_whole(folder / "arms.csv", arms_csv(data))
    write_whole(folder / "report.html", pages.report(data, doubt=DOUBT, doubts=doubts(data["unknown"])))
    return data


def matrix_csv(data: dict[str, Any]) -> str:
    """A row a stage, a column a source, bits per byte; then what sums it up, and what share of a source was not known to
    the tokenizer, where there is such."""
    sources, unknown = data["sources"], data["unknown"]
    doubtful = [source for source in sources if any(source in row for row in unknown.values())]
    rows = [["stage", *sources, *MEASURES, *(f"unknown/{source}" for source in doubtful)]]
    for stage, row in data["forgetting_matrix"].items():
        sums, shares = data["transfer"][stage], unknown.get(stage, {})
        cells = [*(row.get(s) for s in sources), *(sums[key] for key in MEASURES), *(shares.get(s) for s in doubtful)]
        rows.append([stage, *map(_cell, cells)])
    return _csv(rows)


def arms_csv(data: dict[str, Any]) -> str:
    """A row for each arm and source: what was spent, where it ended, and where it stood at the group's equal compute."""
    rows = [["start", "arm", "state", "seed", "tokens", "flops", "seconds", "source", "final"]]
    rows[0] += ["at_equal_flops", "equal_flops", "forgetting", "taken_back"]
    for group in data["arms"]:
        for arm in group["arms"]:
            spent = [arm[key] for key in ("state", "seed", "tokens", "flops", "seconds")]
            for source in arm["final"] or [""]:
                numbers = [arm["final"], arm["at_equal"], None, arm["forgetting"], arm["taken_back"]]
                cells = [group["equal_flops"] if n is None else _cell(n.get(source)) for n in numbers]
                rows.append([group["start"], arm["arm"], *spent, source, *cells])
    return _csv(rows)


def _cell(value: Any) -> Any:
    return "" if value is None else value


def _csv(rows: list[list[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


# -- the short form ---------------------------------------------------------------------------------------------------


def short(data: dict[str, Any]) -> Group:
    """For the terminal: the matrix with each stage's cost, what it sums up to, and what must not be overlooked."""
    table = Table(title=f"{data['recipe']}: bits per byte after every stage ({data['scale']})", title_justify="left")
    table.add_column("stage")
    for source in data["sources"]:
        table.add_column(source, justify="right")
    for head in ("forgetting", "tokens", "FLOPs", "time"):
        table.add_column(head, justify="right")
    for name, stage in data["stages"].items():
        if stage["product"] != "model":
            continue
        row = data["forgetting_matrix"].get(name, {})
        state = "" if stage["state"] in ("done", "reused") else f" ({stage['state']})"
        forgot = data["transfer"].get(name, {}).get("forgetting")
        cost = [words.amount(stage["tokens"]), words.amount(stage["flops"]), words.duration(stage["seconds"])]
        doubtful = data["unknown"].get(name, {})
        cells = [words.bits(row.get(s)) + DOUBT * (s in doubtful) for s in data["sources"]]
        table.add_row(name + state, *cells, words.bits(forgot, sign=True) if forgot is not None else "–", *cost)
    return Group(table, *(Text(line) for line in _lines(data)))


def _lines(data: dict[str, Any]) -> list[str]:
    totals = data["totals"]
    measuring = totals["seconds_measuring"] + totals["seconds_measuring_final"]
    spent = f"{words.amount(totals['tokens'])} tokens, {words.amount(totals['flops'])}FLOP"
    lines = [f"training {words.duration(totals['seconds'])}, measuring {words.duration(measuring)}; {spent}"]
    lines += [f"{DOUBT} {line}" for line in doubts(data["unknown"])]
    for group in data["arms"]:
        if any(group["budgets_differ"].values()):
            lines.append(
                f"arms from {group['start']} differ in budget: compared at {words.amount(group['equal_flops'])}FLOP"
            )
        for pair in group["added"]:
            for source, back in pair["sources"].items():
                if back["taken_back"] is not None:
                    lines.append(
                        f"{', '.join(pair['methods'])} takes back {back['taken_back']:.0%} of what {pair['baseline']} "
                        f"forgot of {source} ({back['without']:+.3f} → {back['with']:+.3f} bits per byte)"
                    )
    for name, stage in data["stages"].items():
        if stage["measuring"]["thinned"]:
            lines.append(f"{name}: {stage['measuring']['kept']} of {stage['measuring']['planned']} measurements kept")
        if stage["steering"]:
            lines.append(f"{name}: steered, {len(stage['steering'])} entries in its journal")
        lines += [f"{name}: {way['why']}: {way['enter']} was entered" for way in stage["on"] if way["taken"]]
        if stage["state"] == "failed":
            lines.append(f"{name}: failed: {stage['why']}")
    last = {(alarm["stage"], alarm["column"]): alarm for alarm in data["alarms"]}
    lines += [f"alarm: {stage} forgets {column} (step {a['step']})" for (stage, column), a in last.items()]
    return lines
