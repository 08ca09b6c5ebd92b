"""What probes share: held-out rows as the objective wants them, and nats per byte.

Shape letters: B rows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Seen
from tutelage.core.out import Out, token_nll
from tutelage.core.types import IGNORE, Batch


class Bits(NamedTuple):
    """Bits per byte of a column: of all rows asked for, and of the first few, which every evaluation measures."""

    whole: float
    few: float


def heldout(view: Any, column: str) -> Iterator[Batch]:
    """The column's first `view.passages` rows, prepared by the objective; nothing when none is held out."""
    data = view.measured(column)
    if any(len(source.chunks) for source in data.sources.values()):
        for batch in data.once(view.passages):
            batch = view.prepared(batch)
            if "bytes" in batch:
                yield batch


def measured_bytes(batch: Batch) -> Tensor:
    """Bytes that each label stands for, [B, T]; 0 where nothing is predicted or measured."""
    return torch.where(batch["labels"] == IGNORE, 0, batch["bytes"])


def bits_per_byte(view: Any, column: str, model: Callable[[Batch], Out] | None = None) -> Bits | None:
    """Bits that the model (of now, or another) needs per byte of held-out rows; None when there is no byte to measure.

    Rows are summed one by one, so that the first few are the same rows however many follow them.
    """
    nats: list[float] = []
    sizes: list[int] = []
    for batch in heldout(view, column):
        bytes_BT = measured_bytes(batch)
        labels_BT = torch.where(bytes_BT > 0, batch["labels"], IGNORE)
        nll_BT = token_nll((model or view.model)(batch), labels_BT.to(view.engine.device))
        nats += nll_BT.double().sum(dim=1).tolist()
        sizes += bytes_BT.sum(dim=1).tolist()
    if not sum(sizes):
        return None
    few = view.few if sum(sizes[: view.few]) else len(sizes)
    return Bits(*(math.fsum(nats[:n]) / math.log(2) / sum(sizes[:n]) for n in (len(sizes), few)))


def nats_per_label(view: Any, column: str, *, rows: int) -> float:
    """The model's mean loss over the labels of a column's first rows, the work shared by the ranks and counted.

    Raises UserError where nothing is held out.
    """
    found = torch.zeros(2, dtype=torch.float64, device=view.engine.device)
    data = view.measured(column)
    some = any(len(source.chunks) for source in data.sources.values())
    for i, batch in enumerate(data.once(rows) if some else ()):
        if i % view.engine.world.size != view.rank:
            continue
        batch = view.prepared(batch)
        labels_BT = batch["labels"].to(view.engine.device)
        key = ("held out", *(tuple(value.shape) for value in batch.fields.values()))
        nll_BT = view.counted(key, partial(_nll, view, batch, labels_BT))
        found += torch.stack([nll_BT.double().sum(), (labels_BT != IGNORE).sum().double()])
    nats, labels = view.sum(found).tolist()
    if not labels:
        raise UserError(f"no loss can be taken on '{column}': nothing of it is held out; hold out more with `val`")
    return float(nats / labels)


def _nll(view: Any, batch: Batch, labels_BT: Tensor) -> Tensor:
    return token_nll(view.model(batch), labels_BT)


def moved(run: Seen, column: str) -> float:
    """How far a column's bits per byte went from where they began, either way; for `effect`."""
    values = [row["values"] for row in run.rows if row["kind"] == "eval"]
    series = [found[f"bits_per_byte/{column}"] for found in values if f"bits_per_byte/{column}" in found]
    return max(abs(value - series[0]) for value in series)
