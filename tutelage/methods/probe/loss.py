"""Loss: what the stage's own objective is on held-out text, column by column, with whatever else the objective tells of it.

Paper:   none; the measure that training minimizes, taken where nothing is trained (Bishop 2006, chapter 1)
Use:     beside probe/bits_per_byte, and in its place for objectives that predict no text (objective/replaced_token);
    comparable between runs of one objective and tokenizer alone
Works:   stages that train, text
Costs:   the objective's forward pass over the measured rows (`evals.passages` inside a stage, `evals.final` at its end),
    twice where it has scores
With:    an objective with `scores(model, batch, view)` has its sums measured too, by name
Differs: nothing
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tutelage.base.method import Method, Seen


class Loss(Method):
    no_off = "it only measures"
    baseline = {}

    @torch.no_grad()
    def measure(self, model: nn.Module, view: Any) -> dict[str, float | str]:
        """`loss/<column>` in the objective's unit a counted position, and `<score>/<column>` where the objective has scores."""
        found: dict[str, float | str] = {}
        objective, training = view.engine.objective, model.training
        scores = getattr(objective, "scores", None)
        model.eval()
        try:
            for column in view.heldout:
                sums: dict[str, list[float]] = {}
                for batch in view.measured(column).once(view.passages):
                    batch = view.prepared(batch).to(view.engine.device)
                    with view.engine.precision():
                        parts = {"loss": objective.loss(view.engine.out, batch, view)}
                        parts |= scores(view.engine.out, batch, view) if scores else {}
                    for name, part in parts.items():
                        total = sums.setdefault(name, [0.0, 0.0])
                        total[0] += float(part.total)
                        total[1] += float(part.weight)
                found |= {f"{name}/{column}": total / weight for name, (total, weight) in sums.items() if weight}
        finally:
            model.train(training)
        return found


def effect(run: Seen) -> dict[str, float]:
    values = [row["values"] for row in run.rows if row["kind"] == "eval"]
    return {"columns": float(max((sum(k.startswith("loss/") for k in v) for v in values), default=0))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["columns"] >= 2 and off["columns"] == 0


BENCH = None  # a measure claims nothing
