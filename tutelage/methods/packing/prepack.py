"""Prepacking: rows are filled longest piece first, in training and where prompts are read for generation.

Paper:   Zhao et al. 2024 (prepacking), arXiv:2404.09529, and its public code
Use:     documents much shorter than a row; `look_ahead` 64. With lognormal lengths (median 100, σ 0.6, rows of 256) rows
    are padded by 1.8 % where `packing: documents` leaves 8 %, and by 4.6 % with the same look-ahead of 8. Prompts of
    such lengths (median 64, σ 0.9, at most 512) take 2.2 times less processor time to the first token, 16 of them
    together (1.4 to 4.6 in seven rounds), and 4.1 times, 64 of them (bench/prepack.py)
Works:   text whose documents may share rows (checked when the stage begins); prompts: decoders whose cache is keys and
    values of all positions, without sliding windows, others are read padded
Costs:   `look_ahead` pieces a source wait and are named in each step's line of the metrics
With:    any objective, mix and curriculum but pieces of one length; samples, probes and requests that write from prompts of
    unequal length read them in shared rows, 16 at a time
Differs: prompts are packed first-fit decreasing, where their code takes a library's heuristic of the kind; what is written
    from a prompt is the same but for rounding. Prompts are packed within a batch alone, where their code may pack a whole
    data set before it is cut into batches. Training rows are packed by the same rule, of which the paper says nothing
"""

from __future__ import annotations

from pydantic import Field

from tutelage.base.method import Method, Seen


class Prepack(Method):
    look_ahead: int = Field(64, ge=2, description="pieces of a source that a row is chosen from")

    no_off = "`packing: documents` is what it is compared with"
    baseline = {}
    toys = ("llama",)

    def pack(self, lengths: list[int], length: int) -> list[int]:
        """The longest first, then always the longest that still fits; among equals the oldest."""
        taken, room = [], length
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            if lengths[i] <= room or not taken:  # only the first may be longer than the row, and is cut
                taken.append(i)
                room -= lengths[i]
        return taken


def effect(run: Seen) -> dict[str, float]:
    """The share of padding in all rows, and the most pieces that waited."""
    rows = [row for row in run.rows if row["kind"] == "train"]
    waiting = max(len(pending) for row in rows for _, pending in row["cursors"].values())
    return {"padding": sum(row["padding"] for row in rows) / len(rows), "waiting": float(waiting)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Less than half of the padding, chosen among more than the built-in rule looks at."""
    return on["padding"] < 0.5 * off["padding"] and on["waiting"] > 8 >= off["waiting"]


BENCH = None  # it claims time: bench/prepack.py measures prompts read in shared rows beside padded ones
