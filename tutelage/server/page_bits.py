"""Small pieces that every part of the page is made of. All text goes in as text; only drawings of our own are HTML."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from tutelage.core.words import finite


def box(classes: str = "", tag: str = "div", *, role: str = "", label: str = "") -> Element:
    """An element to put others into."""
    found = ui.element(tag).classes(classes)
    if role:
        found.props["role"] = role
    if label:
        found.props["aria-label"] = label
    return found


def text(said: str = "", classes: str = "", tag: str = "div") -> TextElement:
    """Text, shown as it is: markup in it is not read."""
    return TextElement(tag=tag, text=said).classes(classes)


def button(
    said: str, act: Callable[[], Any], kind: str = "", *, label: str = "", key: str = "", key_says: str = ""
) -> ui.button:
    """A button. `kind`: main, risk, plain, tiny; `key` is the shortcut that does the same."""
    found = ui.button(on_click=act, color=None).classes(f"b {kind}").props("no-caps unelevated")
    with found:
        found.said = text(said, tag="span")  # type: ignore[attr-defined]  # a name can change: Pause, Resume
        if key:
            text(key, "q-ml-sm", tag="kbd")
    if label:
        found.props["aria-label"] = label
    if key:
        found.props["aria-keyshortcuts"] = key_says or key.lower()
    return found


def rename(found: ui.button, said: str) -> None:
    found.said.set_text(said)  # type: ignore[attr-defined]


def field(label: str, value: str = "", *, classes: str = "", hint: str = "", on_change: Any = None) -> ui.input:
    """A line to type into, with its name."""
    found = ui.input(label=label, value=value, on_change=on_change).props("outlined dense").classes(classes)
    return found.props(f'hint="{escape(hint)}"') if hint else found


def draw(svg: str, classes: str = "") -> ui.html:
    """A drawing of our own, whose texts are escaped where it was made."""
    return ui.html(svg, sanitize=False).classes(classes)


def curve(values: list[float], *, said: str) -> str:
    """A small line without axes."""
    line = [value for value in values if finite(value)]
    if len(line) < 2:
        return ""
    low, high = min(line), max(line)
    step, tall = 100 / (len(line) - 1), (high - low) or 1.0
    way = "L".join(f"{i * step:.1f} {2 + 20 * (high - value) / tall:.1f}" for i, value in enumerate(line))
    return (
        f'<svg viewBox="0 0 100 24" preserveAspectRatio="none" role="img" aria-label="{escape(said)}">'
        f'<path d="M{way}"/></svg>'
    )


def table(head: list[str], rows: list[list[str]], *, words: int = 1, said: str) -> None:
    """A table of text; the first `words` columns are set left."""
    with box("scroll", role="region", label=said).props("tabindex=0"), box("plain", "table"):
        with box(tag="thead"), box(tag="tr"):
            for i, name in enumerate(head):
                text(name, "words" if i < words else "", "th").props("scope=col")
        with box(tag="tbody"):
            for row in rows:
                with box(tag="tr"):
                    for i, cell in enumerate(row):
                        text(cell, "words" if i < words else "", "td")
