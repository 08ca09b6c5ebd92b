"""What was measured of methods' claims: entries that only ever grow, their verdicts together, and the table of them."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tutelage.base import card, registry
from tutelage.catalog import rows
from tutelage.core import stats
from tutelage.core.identity import code_id, file_id
from tutelage.core.record import write_whole
from tutelage.core.words import amount

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
INDEX = ROOT / "bench" / "INDEX.md"
CLAIM = ("effect", "holds", "BENCH")


# -- versions ---------------------------------------------------------------------------------------------------------


def named(tree: ast.Module, name: str) -> ast.stmt | None:
    """The function or assignment of that name in a module."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    return None


def tree_of(name: str) -> ast.Module:
    return ast.parse(registry.path_of(name).read_text(encoding="utf-8"))


def claims(name: str) -> bool:
    """Whether a method's file has a bench, without importing it."""
    node = named(tree_of(name), "BENCH")
    value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    return value is not None and not (isinstance(value, ast.Constant) and value.value is None)


def version(name: str) -> dict[str, str]:
    """What a measurement holds for: the method's code, what its file says is measured and how, and, under a key for
    each, the claims of the catalog's rows that it measures.
    """
    tree = tree_of(name)
    texts = [ast.dump(node) for key in CLAIM if (node := named(tree, key))]
    base = next(
        ROOT / value.value
        for node in ast.walk(named(tree, "BENCH") or tree)
        if isinstance(node, ast.keyword) and node.arg == "base" and isinstance(value := node.value, ast.Constant)
    )
    known = {"code": code_id(name), "claim": _hash("\n".join(texts)), "recipe": file_id(base) if base.exists() else ""}
    return known | {f"paper {row.id}": _hash(row.claim) for row in rows.led_by(name)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# -- entries ----------------------------------------------------------------------------------------------------------


def path_of(name: str, *, results: Path = RESULTS) -> Path:
    return results / f"{name.replace('/', '-')}.json"


def entries(name: str, *, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Every measurement of a method, oldest first."""
    path = path_of(name, results=results)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def append(entry: dict[str, Any], *, results: Path = RESULTS) -> None:
    """Add a measurement; those before it stay as they are."""
    results.mkdir(parents=True, exist_ok=True)
    whole = [*entries(entry["method"], results=results), entry]
    write_whole(path_of(entry["method"], results=results), json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def counted(name: str, *, now: dict[str, str], results: Path = RESULTS) -> dict[str, Any] | None:
    """The measurement that counts for this version: the one whose tuning went furthest, which took up the one before; of
    equals the first. A second try would be picking.

    It holds while nothing that it was made of has changed: a row that the catalog got later made no part of it.
    """
    past = [entry for entry in entries(name, results=results) if entry["version"].items() <= now.items()]
    return max(past, key=lambda entry: entry["tuning"].get("rounds", 0), default=None)


def difference(entry: dict[str, Any]) -> stats.Paired:
    """Arm minus baseline, as it was written down."""
    return stats.Paired(tuple(entry["differences"]), **entry["difference"])


def scale(name: str, entry: dict[str, Any]) -> str:
    """Where the claim was made: as the catalog's row has it, else as the method's bench said."""
    return next((row.scale for row in rows.led_by(name) if row.scale), entry["scale"]["paper"])


# -- verdicts ---------------------------------------------------------------------------------------------------------


def standing(results: Path = RESULTS) -> dict[str, tuple[str, dict[str, Any] | None]]:
    """Status and entry of every method that has a bench: the verdicts of the current versions corrected together.

    A stale one is shown with its newest entry and asks no question.
    """
    found: dict[str, tuple[str, dict[str, Any] | None]] = {}
    current: dict[str, dict[str, Any]] = {}
    for name in filter(claims, registry.names()):
        past = entries(name, results=results)
        entry = counted(name, now=version(name), results=results) if past else None
        found[name] = ("stale" if past else "not run", past[-1] if past else None)
        if entry:
            current[name] = entry
    verdicts = stats.verdicts(
        {name: difference(entry) for name, entry in current.items()},
        better={name: entry["better"] for name, entry in current.items()},
        margin={name: entry["margin"] for name, entry in current.items()},
    )
    return found | {name: (verdicts[name], entry) for name, entry in current.items()}


def verdicts(results: Path = RESULTS) -> dict[str, str]:
    """Status by method: effect seen, opposite, no effect, inconclusive, stale or not run."""
    return {name: status for name, (status, _) in standing(results).items()}


# -- the table --------------------------------------------------------------------------------------------------------

HEAD = """# Benches

Generated by `make bench` from `bench/results/`. Each row: the method in the base recipe against its baseline, both tuned
on another seed: the same number of trials, then up to three rounds beyond an end of a grid where the best lay there, and of
what was best on the other side; then paired seeds of equal length. *Beside* is what the baseline changes in the base recipe.
*Difference* is arm minus baseline with its 95 % interval (Student's t, paired by seed); *status* is corrected over all rows
(Benjamini–Hochberg at 5 %), and `no effect` means that the interval lies inside a margin fixed beforehand. *Cost* is the
arm's FLOPs and time over the baseline's, begin work included; time is the wall's, of a machine with other work, where stages
that several benches share ran at another hour. The scale is small: read a row as what was seen at that scale.

| method | beside | measure | arm | baseline | difference | status | cost | model | tokens | seeds | claimed at |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


ENDS = """
## Best at the end of a grid
The tuned value was the smallest or largest tried, so that a wider grid might say otherwise.
"""


def index_text(results: Path = RESULTS) -> str:
    found = standing(results)
    ended = [f"- `{name}`: {'; '.join(ends(entry))}\n" for name, (_, entry) in found.items() if entry and ends(entry)]
    return HEAD + "".join(_line(name, *one) for name, one in found.items()) + (ENDS + "".join(ended) if ended else "")


def ends(entry: dict[str, Any]) -> list[str]:
    """Which of the tuned numbers were best at an end of what was tried."""
    found = []
    for side in ("arm", "baseline"):
        for key, grid in edges(entry["tuning"][side]).items():
            value = entry["tuning"][side]["setting"][key]
            which = "smallest" if value == grid[0] else "largest"
            found.append(f"{side}'s `{key}` {value:g}, the {which} of {len(grid)}")
    return found


def edges(side: Mapping[str, Any]) -> dict[str, list[float]]:
    """Numbers of a side's best setting that lie at an end of what was tried, each with all tried, sorted."""
    found: dict[str, list[float]] = {}
    for key, value in side["setting"].items():
        tried = [row["setting"][key] for row in side["tried"]]
        grid = sorted(set(tried)) if all(type(one) in (int, float) for one in tried) else []
        if len(grid) > 1 and value in (grid[0], grid[-1]):
            found[key] = grid
    return found


def _line(name: str, status: str, entry: dict[str, Any] | None) -> str:
    title = card.read(registry.path_of(name)).title
    if entry is None:
        return f"| `{name}` {title} | | | | | | {status} | | | | | |\n"
    found, cost = difference(entry), entry["cost"]
    arm, baseline = (sum(entry["values"][side]) / len(entry["values"][side]) for side in ("arm", "baseline"))
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    ratios = [
        f"{cost['ratio'][key]:.2f}× {what}"
        for key, what in (("flops", "FLOPs"), ("seconds", "time"))
        if cost["ratio"].get(key)
    ]
    cells = [
        f"`{name}` {title}",
        _beside(entry),
        f"{entry['metric']}, {entry['better']} is better",
        f"{arm:.4f}",
        f"{baseline:.4f}",
        f"{found.mean:+.4f}{interval}",
        status,
        ", ".join(ratios),
        amount(entry["scale"]["parameters"]),
        amount(entry["scale"]["tokens"]),
        str(len(entry["seeds"])),
        scale(name, entry),
    ]
    return f"| {' | '.join(cells)} |\n"


def _beside(entry: dict[str, Any]) -> str:
    """The baseline's change of the base recipe, as YAML in one line."""
    change = entry["bench"]["baseline"]
    text = yaml.safe_dump(change, default_flow_style=True, width=10_000).strip().replace("|", "\\|")
    return f"`{text}`" if change else "without it"


def write_index(results: Path = RESULTS, *, path: Path = INDEX) -> None:
    write_whole(path, index_text(results))
