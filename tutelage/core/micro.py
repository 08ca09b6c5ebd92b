"""How many rows a micro-batch has, when the recipe does not say: as many as memory holds, found once and journaled.

On a GPU the whole batch is tried, and halved when memory runs out. A process on a CPU that asks for too much is ended
by the system rather than told, so there the choice is made beforehand, from shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tutelage.base.errors import UserError
from tutelage.core import memory
from tutelage.core.anatomy import Anatomy, anatomy

if TYPE_CHECKING:
    from tutelage.core.stage import Run

SHARE = 0.5  # of what is free: other stages, teachers and the allocator's waste have the rest
EASY = 0.1  # of the room: a bound this far below it needs no tracing, which takes a fifth of a second


def begin(run: Run) -> None:
    """Set the engine's micro-batch: the recipe's, the one chosen before a cut, or a new one. Changes are journaled."""
    engine = run.engine
    if engine.fused is not None:  # the whole batch, always
        found = find(run)
        if found < run.rows:
            raise UserError(
                f"stages.{run.node.name}.engine.fused_backward: memory holds {found} of the {run.rows} rows of a step, "
                "which cannot be split; lower `batch` or `length`, or set engine.checkpointing"
            )
        return
    write = engine.world.rank == 0

    def note(rows: int) -> None:
        run.journal.append(tick=run.clock.tick, by="engine", do=[{"do": "micro", "rows": rows}], write=write)

    engine.on_micro = note
    if engine.micro is not None:
        return
    first = next((act["rows"] for line in run.journal.lines for act in line["do"] if act["do"] == "micro"), None)
    engine.micro = first or engine.world.agree(find(run))
    if first is None:
        note(engine.micro)


def resumed(now: int | None, saved: int | None) -> int | None:
    """After a cut: what was saved, or less if the recipe has been given less since (it ran out of memory, say)."""
    return min((rows for rows in (now, saved) if rows is not None), default=None)


def find(run: Run) -> int:
    """Rows of a micro-batch on this machine, for the weights that are trained now; at most this rank's part."""
    engine, stage = run.engine, run.node.stage
    rows = -(-run.rows // engine.world.size)
    if engine.device.type != "cpu":
        return rows  # running out is told there, and halves
    each = 3 if engine.fused is None else 2  # gradients and two numbers for each
    states = each * sum(p.numel() * p.element_size() for p in engine.params.values())
    room = SHARE * (memory.available("cpu") - states) / engine.world.size
    return fit(
        engine.model,
        rows=rows,
        length=stage.length,
        room=room,
        parts=engine.anatomy,
        autocast=engine.autocast,
        checkpointing=stage.engine.checkpointing,
    )


def fit(
    model: nn.Module,
    *,
    rows: int,
    length: int,
    room: float,
    parts: Anatomy | None = None,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """All of `rows` if what they keep for backward fits into `room` bytes, else the largest power of two that does."""
    parts = parts or anatomy(model)
    if bound(parts, rows=rows, length=length) < EASY * room:
        return rows
    options: dict[str, Any] = {"autocast": autocast, "checkpointing": checkpointing, "device": device}

    def need(count: int) -> int:
        found = memory.estimate(model, batch_rows=count, length=length, **options)
        return found["activations"] + found["logits"]

    whole = need(rows)
    if whole <= room:
        return rows
    count = 1 << max(0, int(max(1.0, rows * room / whole)).bit_length() - 1)
    while count > 1 and need(count) > room:
        count //= 2
    return count


def bound(parts: Anatomy, *, rows: int, length: int) -> float:
    """Bytes that a step of a common model stays under, from its sizes alone."""
    blocks = sum(len(stack.blocks) for stack in parts.stacks)
    heads = max(1, parts.hidden // 32)
    each = 64 * parts.hidden + heads * length  # numbers a block keeps of a position, its row of scores among them
    return 4.0 * rows * length * (blocks * each + 4 * (parts.vocab or 0))
