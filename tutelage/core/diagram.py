"""The graph of stages as SVG: layers from left to right, a box a stage.

Drawn by hand: a graph of a recipe has tens of nodes, and a layout library would be a dependency with a program behind
it for what is a longest path and a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from tutelage.core.words import amount

WIDTH, HEIGHT, GAP_X, GAP_Y, EDGE = 168, 62, 46, 16, 8
GLYPH = {"done": "✓", "reused": "↺", "failed": "✕", "partial": "…", "not run": "○", "not entered": "–"}
GLYPH |= {"running": "▶", "paused": "‖", "stopped": "…", "finished": "✓"}  # of a stage that somebody looks at live
TEXT = 22  # characters of a name that a box holds


def layers(stages: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Column and row of every stage: the column is the longest way from a stage without inputs.

    `stages` are in an order in which every input comes before what needs it.
    """
    column: dict[str, int] = {}
    for name, stage in stages.items():
        column[name] = 1 + max((column[i] for i in stage["inputs"] if i in column), default=-1)
    rows: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for name in stages:
        rows[column[name]] = rows.get(column[name], -1) + 1
        places[name] = (column[name], rows[column[name]])
    return places


def draw(stages: dict[str, dict[str, Any]], *, link: Callable[[str], str] | None = None, here: str = "") -> str:
    """Boxes with name, product, tokens and state; arrows from inputs, dashed where only data are taken.

    With `link` each box leads to where it says; the stage `here` is marked. A stage's `shown` stands in its name's place.
    """
    places = layers(stages)
    tall = 1 + max((row for _, row in places.values()), default=0)
    counts: dict[int, int] = {}
    for column, _ in places.values():
        counts[column] = counts.get(column, 0) + 1

    def corner(name: str) -> tuple[float, float]:
        column, row = places[name]
        lower = (tall - counts[column]) * (HEIGHT + GAP_Y) / 2  # short columns stand in the middle
        return EDGE + column * (WIDTH + GAP_X), EDGE + lower + row * (HEIGHT + GAP_Y)

    wide = 2 * EDGE + len(counts) * (WIDTH + GAP_X) - GAP_X
    high = 2 * EDGE + tall * (HEIGHT + GAP_Y) - GAP_Y
    size = f'width="{wide}" height="{high:.0f}" viewBox="0 0 {wide} {high:.0f}"'
    role = "group" if link else "img"  # what is inside an image cannot be reached
    parts = [f'<svg role="{role}" aria-label="{escape(_said(stages))}" class="graph" {size}>']
    for name, stage in stages.items():
        for source in stage["inputs"]:
            if source in places:
                own = any(start.split("@")[0] == source for start in stage["start"])
                parts.append(_arrow(corner(source), corner(name), weights=own))
    for name, stage in stages.items():
        for way in stage.get("on", []):
            if way["enter"] in places:
                parts.append(_way(corner(name), corner(way["enter"]), way))
    for name, stage in stages.items():
        drawn = _box(name, stage, corner(name), here=name == here)
        parts.append(f'<a href="{escape(link(name))}">{drawn}</a>' if link else drawn)
    return "".join([*parts, "</svg>"])


def _box(name: str, stage: dict[str, Any], corner: tuple[float, float], *, here: bool) -> str:
    x, y = corner
    shown = stage.get("shown", name)
    shown = shown if len(shown) <= TEXT else shown[: TEXT - 1] + "…"
    size = f"{amount(stage['tokens'])} tokens" if stage["tokens"] else stage["until"] or ""
    made = " · ".join(part for part in (stage["product"], size) if part)
    state = f"{GLYPH.get(stage['state'], '')} {stage['state']}"
    kind = escape(stage["state"].replace(" ", "-")) + (" here" if here else "")
    return (
        f'<g class="node {kind}"><title>{escape(name)}: {escape(state)}</title>'
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f'<text x="{x + 10:g}" y="{y + 20:g}" class="name">{escape(shown)}</text>'
        f'<text x="{x + 10:g}" y="{y + 37:g}">{escape(made)}</text>'
        f'<text x="{x + 10:g}" y="{y + 53:g}" class="state">{escape(state)}</text></g>'
    )


def _arrow(start: tuple[float, float], end: tuple[float, float], *, weights: bool) -> str:
    x, y = start[0] + WIDTH, start[1] + HEIGHT / 2
    to_x, to_y = end[0] - 6, end[1] + HEIGHT / 2
    bend = max(20.0, (to_x - x) / 2)
    path = f"M{x:g} {y:g}C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
    head = f"M{to_x:g} {to_y - 4:g}l6 4l-6 4z"
    return f'<path class="edge{"" if weights else " data"}" d="{path}"/><path class="head" d="{head}"/>'


def _way(start: tuple[float, float], end: tuple[float, float], way: dict[str, Any]) -> str:
    """The way of a rule: drawn over the arrow, bold where it was taken, faint where it was not."""
    x, y = start[0] + WIDTH, start[1] + HEIGHT / 2
    to_x, to_y = end[0] - 6, end[1] + HEIGHT / 2
    bend = max(20.0, (to_x - x) / 2)
    kind = {True: "taken", False: "passed"}.get(way["taken"], "open")
    said = f"{way['rule']}: enter {way['enter']} ({'not taken' if kind == 'passed' else kind})"
    path = f"M{x:g} {y:g}C{x + bend:g} {y:g} {to_x - bend:g} {to_y:g} {to_x:g} {to_y:g}"
    return f'<path class="way {kind}" d="{path}"><title>{escape(said)}</title></path>'


def _said(stages: dict[str, dict[str, Any]]) -> str:
    return "Stages: " + "; ".join(
        f"{name}{' from ' + ', '.join(stage['inputs']) if stage['inputs'] else ''} ({stage['state']})"
        for name, stage in stages.items()
    )
