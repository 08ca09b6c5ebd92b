"""A plan as people read it: a few lines a stage, and what all of it comes to."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from tutelage.core import rules
from tutelage.core.graph import Graph
from tutelage.display import spell
from tutelage.planning import Later, number, plan, size


def show(graph: Graph, console: Console) -> None:
    """Print the plan, a few lines a stage, and what all of it comes to."""
    rows = plan(graph)
    for row in rows:
        for line in lines(row):
            console.print(line, soft_wrap=True, markup=False)
    seconds = sum(row.get("seconds", 0.0) + sum(b["seconds"] for b in row.get("besides", [])) for row in rows)
    some = " with every stage that a rule may enter" if any(row.get("only_if") for row in rows) else ""
    disk = sum(row.get("disk", {}).get("total", 0.0) for row in rows)
    free = next((row["disk"]["free"] for row in rows if "free" in row.get("disk", {})), None)
    told = f"all{some}: training {spell(seconds)} one stage after another, measuring apart; disk {size(disk)}"
    console.print(told + (f" of {size(free)} free" if free else ""), soft_wrap=True, markup=False)
    if free and disk > free:
        console.print("the disk is too small: free some, or lower save.keep", soft_wrap=True, style="red")


def lines(row: dict[str, Any]) -> list[str]:
    """One stage of the plan as text."""
    out = [f"{row['stage']}  {row['does']}  {_state(row)}"]
    if row["state"] == "changed":
        out.append(f"  changed   {row['difference']}; run with --retrain (beside the old one) or --reuse")
    if row["start"]:
        params = ""
        if "params" in row:
            some = "all" if row["trained"] == row["params"] else number(row["trained"])
            params = f", {number(row['params'])}parameters" + (f", {some} trained" if "rows" in row else "")
        out.append(f"  start     {', '.join(row['start'])}{params}")
    if row.get("only_if"):
        out.append(f"  made if   {' or '.join(row['only_if'])} enters it")
    if row.get("entered"):
        out.append(f"  entered   {row['entered']}")
    else:
        out += [f"  on        {way}" for way in row["on"]]
    for name, found in row.get("data", {}).items():
        tokens = "tokens unknown" if found["tokens"] is None else f"{number(found['tokens'])}tokens"
        exact = (
            f"; {found['known']}"
            if found["tokens"] is None
            else ""
            if found["stored"]
            else f", estimated from {found['known']}"
        )
        out.append(f"  data      {name}: {found['from']}, {tokens}{exact}")
    if "rows" in row:
        out += _training(row)
    for more in row.get("besides", []):
        guess = f" ({row['seconds_from']})" if "steps" not in row else ""
        out.append(f"  besides   {more['what']}: {spell(more['seconds'])} for {number(more['flops'])}FLOPs{guess}")
    if row.get("disk", {}).get("total"):
        parts = ", ".join(f"{k} {size(v)}" for k, v in row["disk"].items() if k not in ("total", "free") and v)
        out.append(f"  disk      {size(row['disk']['total'])}: {parts}")
    return out + [f"  note      {note}" for note in row["notes"]]


def _state(row: dict[str, Any]) -> str:
    if row["state"] in ("done", "reused"):
        values = [
            f"{k} {v:.3f}" for k, v in row["values"].items() if isinstance(v, float) and k.startswith("bits_per_byte/")
        ]
        return f"there already: {row['folder']}" + (f" ({', '.join(values)})" if values else "")
    if row["state"] == "partial":
        return f"goes on from step {row['done_steps']:,}"
    known = {"new": "new", "changed": "to be made anew", rules.UNMADE: rules.UNMADE}
    return known.get(row["state"]) or f"({Later(row['waits'])})"


def _training(row: dict[str, Any]) -> list[str]:
    memory = row["memory"]
    step = f"{row['rows']} × {row['length']} tokens a step, {memory['micro']} rows at once"
    if "steps" in row:
        step = f"{row['steps']:,} steps of {step}; {number(row['tokens'])}tokens"
        step += f", {row['epochs']:.3g} epochs" if "epochs" in row else ""
    out = [f"  steps     {step}"]
    if "flops" in row:
        out.append(f"  time      {spell(row['seconds'])} for {number(row['flops'])}FLOPs ({row['seconds_from']})")
    names = ("weights", "gradients", "optimizer", "activations", "logits", "frozen")
    parts = ", ".join(f"{name} {size(memory[name])}" for name in names if memory[name])
    parts += f"; frozen weights in {memory['quantize']}" if memory["quantize"] else ""
    free = "" if memory["available"] is None else f" of {size(memory['available'])} free ({memory['device']})"
    out.append(f"  memory    {size(memory['total'])}{free}: {parts}")
    if memory["available"] is not None and memory["total"] > memory["available"]:
        ways = "; ".join(f"{key}: {value} → {size(total)}" for key, (value, total) in memory["lower"].items())
        out.append(f"  too much  lower one of: {ways or 'nothing helps but a smaller model'}")
    return out
