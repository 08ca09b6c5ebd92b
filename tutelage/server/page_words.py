"""Numbers and actions as the page writes them."""

from __future__ import annotations

import math
from typing import Any

from tutelage.core.words import finite, number

MANY = {"agent": "agents", "policy": "policies"}


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


def bounds(target: dict[str, Any]) -> str:
    """The bounds of a value, as words; empty where it has none."""
    low, high = target.get("low"), target.get("high")
    if low is None and high is None:
        return ""
    if high is None:
        return f"{plain(low)} or more"
    return f"{plain(high)} or less" if low is None else f"from {plain(low)} to {plain(high)}"


def rules_said(rules: dict[str, Any]) -> list[str]:
    """What a stage's `steering` allows, a sentence an actor."""
    found = []
    for actor, many in MANY.items():
        rule = rules.get(actor)
        if not rule:
            continue
        limits = [
            f"{path} × {plain(limit['by'][0])} to × {plain(limit['by'][1])} within {limit['per']}"
            for path, limit in (rule.get("limits") or {}).items()
        ]
        waits = [name.replace("_", " ") for name in rule.get("approve") or []]
        parts = [", ".join(limits) or "no limits", f"at most {rule.get('budget', 0):,} requests"]
        parts += [f"{', '.join(waits)} wait for a person"] if waits else []
        found.append(f"{many.capitalize()}: {'; '.join(parts)}.")
    if rules.get("hold"):
        found.append(f"What a person set is theirs for {rules['hold']}.")
    return [*found, *(["Policies only follow what the recipe says they did."] if rules.get("replay") else [])]
