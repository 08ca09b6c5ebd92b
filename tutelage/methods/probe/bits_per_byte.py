"""Bits per byte: how many bits the model needs for a byte of held-out text, column by column.

Paper:   Gao et al. 2020 (the Pile), arXiv:2101.00027
Use:     measured by default; comparable between tokenizers, which a loss per token is not
Works:   text whose held-out batches carry `bytes`; columns are the stage's, its ancestors' and kept sources
Costs:   one forward pass over the measured rows (`evals.passages` inside a stage, `evals.final` at its end)
With:    probe/forgetting reads its numbers; write it before that one
Differs: predicted tokens only: nothing for a document's first token or its end; under a masked or prefix objective
    the bytes of the predicted part, so such numbers compare with their own kind alone
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.base.method import Method, Seen
from tutelage.methods._kit.heldout import bits_per_byte


class BitsPerByte(Method):
    no_off = "it only measures"
    baseline = {}

    def measure(self, model: nn.Module, view: Any) -> dict[str, float | str]:
        """`bits_per_byte/<column>`, and `bits_per_byte@<n>/<column>` of the first n rows, those measured in a stage.

        `unknown/<column>` is the share of the column's bytes that the tokenizer has no tokens for, where there are any:
        they cost next to nothing to predict, so bits per byte are too low.
        """
        found: dict[str, float | str] = {}
        for column in view.heldout:
            bits = bits_per_byte(view, column)
            if bits is None:
                found[f"unmeasured/{column}"] = (
                    "no held-out byte to measure: hold out more with `val`, or the objective predicts no text"
                )
                continue
            found[f"bits_per_byte/{column}"] = bits.whole
            if view.passages > view.few:
                found[f"bits_per_byte@{view.few}/{column}"] = bits.few
            unknown = max((s.facts.get("unknown", 0.0) for s in view.heldout[column].sources.values()), default=0.0)
            if unknown:
                found[f"unknown/{column}"] = unknown
        return found


def effect(run: Seen) -> dict[str, float]:
    values = [row["values"] for row in run.rows if row["kind"] == "eval"]
    return {"columns": float(max((sum(k.startswith("bits_per_byte/") for k in v) for v in values), default=0))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["columns"] >= 2 and off["columns"] == 0


BENCH = None  # a measure claims nothing
