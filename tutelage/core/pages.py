"""Self-contained pages from templates: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import jinja2
from markupsafe import Markup

from tutelage.core import diagram, pictures, words


@functools.cache
def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("tutelage.core", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "amount": words.amount,
        "bits": words.bits,
        "percent": words.percent,
        "duration": words.duration,
        "actions": actions,
        "ratio": ratio,
    }
    found.tests["number"] = words.finite
    found.globals["interval"] = interval
    return found


def page(template: str, **content: Any) -> str:
    return _templates().get_template(template).render(**content)


def report(data: dict[str, Any], *, doubt: str, doubts: list[str]) -> str:
    """The report of a graph's numbers, see `report.gather`; `doubt` marks those that `doubts` explain."""
    return page(
        "report.html.j2",
        data=data,
        graph=_safe(diagram.draw(data["stages"])),
        sources={name: _safe(text) for name, text in pictures.sources(data).items()},
        changes=[_safe(text) for text in pictures.changes(data).values()],
        losses=_safe(pictures.losses(data)),
        shade=shades(data["forgetting_matrix"]),
        doubt=doubt,
        doubts=doubts,
    )


def comparison(data: dict[str, Any], *, said: str) -> str:
    """The page of a comparison, see `compare.compare`."""
    gaps = {
        column: (gap["mean"], gap["low"], gap["high"])
        for column, found in data["columns"].items()
        if (gap := found["equal_flops"]["difference"])
    }
    name = "tokens, with what came before" if data["whole"] else "tokens"
    curves = {}
    for column, series in data["curves"].items():
        looks = {label: int(label.startswith(data["b"]["name"])) for label in series}
        curves[column] = pictures.lines(
            series,
            name=f"compare|{column}",
            x=name,
            y="bits per byte",
            title=column,
            looks=looks,
            legend=len(series) < 5,
        )
    return page(
        "compare.html.j2",
        data=data,
        said=said,
        curves={column: _safe(text) for column, text in curves.items()},
        gaps=_safe(pictures.intervals(gaps, name="gaps", x="difference at equal FLOPs, bits per byte")) if gaps else "",
    )


def interval(low: float | None, high: float | None) -> str:
    """`[−0.180, −0.060]`, or a dash for one seed."""
    return "–" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def ratio(found: dict[str, Any] | None) -> str:
    """`0.75 ×`, with its interval where there is one."""
    if not found:
        return "–"
    spread = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['ratio']:.2f} ×{spread}"


def shades(matrix: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How far each cell lies from its source's best stage, 0 to 9, within what the source ranges over."""
    found: dict[str, dict[str, int]] = {stage: {} for stage in matrix}
    for source in dict.fromkeys(label for row in matrix.values() for label in row):
        column = {stage: row[source] for stage, row in matrix.items() if words.finite(row.get(source))}
        low, high = min(column.values(), default=0.0), max(column.values(), default=0.0)
        for stage, value in column.items():
            found[stage][source] = round(9 * (value - low) / (high - low)) if high > low else 0
    return found


def actions(do: list[dict[str, Any]]) -> str:
    """What a journal's line does, in words."""
    return "; ".join(
        f"{act.get('do', '')} " + ", ".join(f"{k} {v}" for k, v in act.items() if k not in ("do", "tick")) for act in do
    ).strip()


def _safe(text: str) -> Any:
    return Markup(text)  # our own drawing, escaped where it was made
