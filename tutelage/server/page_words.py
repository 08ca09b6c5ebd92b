"""Numbers and actions as the page writes them."""

from __future__ import annotations

import math
from typing import Any

from tutelage.core.words import finite, number


def rate(value: Any) -> str:
    """A learning rate as people write it: `3.00e-4`; zero, and what is no number, as it is."""
    found = number(value)
    if not math.isfinite(found):
        return "–"
    return f"{found:.2e}".replace("e-0", "e-").replace("e+0", "e") if found else "0"


def plain(value: Any) -> str:
    """A number in few figures, a mapping as `name value, …`, anything else as text."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, (int, float)) and finite(value):
        size = abs(value)
        return rate(value) if 0 < size < 1e-3 else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(inner)}" for key, inner in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(inner) for inner in value) or "–"
    return str(value)


def spell(do: list[dict[str, Any]]) -> str:
    """Actions in words: `optim.lr × 0.5; eval`."""
    return "; ".join(_spell(act) for act in do)


def _spell(act: dict[str, Any]) -> str:
    kind = str(act.get("do"))
    if kind == "scale":
        return f"{act.get('path')} × {plain(act.get('by'))}"
    if kind == "set":
        return f"{act.get('path')} = {plain(act.get('to'))}"
    rest = ", ".join(f"{k} {plain(v)}" for k, v in act.items() if k != "do" and v not in (None, "", False, {}, []))
    return f"{kind.replace('_', ' ')} {rest}".strip()
