"""Bandit mixing: sources with the largest learning signal are drawn more, and those seldom drawn are tried again.

Paper:   Wang et al. 2025 (DUMP), arXiv:2504.09710, and its public code
Use:     `signal: progress` (how much a source's held-out loss changed in a round) for text of several difficulties;
    `grad_norm` where loss moves slowly; `advantage` in stages that give it. `temperature` at the size of the signal: 0.1
    where losses move by tenths of a nat a round; much below it the noise of what nobody learns yet decides
Works:   `progress` and `grad_norm`: any data that hold something out; a given signal: steps whose numbers have it
Costs:   at every round a forward pass over `passages` held-out rows of each source (`grad_norm`: forward and backward),
    counted for the stage; a given signal costs nothing
With:    continual/replay takes its rate first, these shares divide the rest; mix/skill_it knows what helps what
Differs: the paper's signal is the mean absolute advantage of a policy's answers; no stage gives it yet, so two that
    supervised stages have stand beside it: progress in nats a label, either way, and norms in shares of the largest;
    the window counts rounds (steps for a given signal), not 300 samples; what was drawn is counted in rows, not in
    answers (16 a row there); shares are kept exactly, not sampled
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen
from tutelage.core.types import Batch
from tutelage.methods._kit.heldout import nats_per_label
from tutelage.methods._kit.signals import pushed

OURS = ("progress", "grad_norm")


class Bandit(Method):
    signal: str = Field(
        "progress",
        description="`progress`, `grad_norm`, or what steps give by source: `advantage` is `advantage/<source>`, there the "
        "mean size of its answers' advantages",
    )
    every: SpanField = Field(
        Span(5.0, "%"), description="length of a round, after which our own signals are asked again"
    )
    window: int = Field(3, ge=1, description="newest values of a source's signal that count: rounds, or steps")
    explore: float = Field(
        1.0, ge=0, le=1e6, description="weight of the bonus for sources seldom drawn; 1 in the paper"
    )
    temperature: float = Field(
        0.1, ge=1e-6, description="how even the shares are; 0.1 in the paper, large draws all alike"
    )
    passages: int = Field(64, ge=1, description="held-out rows of each source that a signal is taken on")

    no_off = "a stage always has a mix"
    baseline = {"use": "mix/fixed"}
    on = {"every": "2step", "window": 2, "explore": 0.2, "passages": 8}
    steerable = frozenset({"explore", "temperature"})

    def weights(self, names: dict[str, dict[str, float]], view: Any) -> dict[str, float]:
        """Shares that add up to 1, ∝ exp((mean signal + bonus) / temperature)."""
        if not names:
            return {}
        if view.clock.tick and self.signal in OURS:
            self.ask(list(names), view)
        drawn_N = self.state.get("drawn", torch.zeros(len(names), dtype=torch.float64)).cpu()
        scores_N = ucb(self.means(list(names), view), drawn_N, explore=self.explore)
        return dict(zip(names, torch.softmax(scores_N / self.temperature, dim=0).tolist(), strict=True))

    def observe(self, batch: Batch, loss: dict[str, float], view: Any) -> None:
        """Count the rows of each source; take over the signals that the step gave for those it drew."""
        rows = [_among(view.sources, row.source) for row in batch.rows]
        counts_N = torch.tensor([rows.count(name) for name in view.sources], dtype=torch.float64)
        self.state["drawn"] = self.state["drawn"].cpu() + counts_N if "drawn" in self.state else counts_N
        for i, name in enumerate(view.sources):
            value = loss.get(f"{self.signal}/{name}", math.nan)
            if counts_N[i] and math.isfinite(value) and self.signal not in OURS:
                self.push(i, value)

    def ask(self, names: list[str], view: Any) -> None:
        """Our own signals, after the first step and when a round is over."""
        now = int(view.clock.passed(self.every) + 1e-9)
        if now <= self.state.get("round", -1.0):
            return
        self.state["round"] = now
        if self.signal == "grad_norm":
            for i, name in enumerate(names):
                self.push(i, gradient_norm(view, name, rows=self.passages))
            return
        losses_N = torch.tensor([nats_per_label(view, n, rows=self.passages) for n in names], dtype=torch.float64)
        if "losses" in self.state:
            for i, change in enumerate((losses_N - self.state["losses"].cpu()).tolist()):
                self.push(i, change)
        self.state["losses"] = losses_N

    def push(self, i: int, value: float) -> None:
        """A new value of a source's signal; its size counts, as the paper's advantages do."""
        windows = self.state.setdefault("windows", {})
        known = windows.get(str(i))
        windows[str(i)] = pushed(None if known is None else known.cpu(), abs(value), size=self.window)

    def means(self, names: list[str], view: Any) -> Tensor:
        """Mean signal of each source within its window, [N] float64; 0 where there is none yet.

        Raises UserError for a signal that no step gives.
        """
        windows = self.state.get("windows", {})
        if view.clock.tick and self.signal not in OURS and not windows:
            raise UserError(
                f"mix.signal: no step of this stage gives '{self.signal}/{names[0]}'; supervised stages have: "
                + ", ".join(OURS)
            )
        found = [float(windows[str(i)].mean()) if str(i) in windows else 0.0 for i in range(len(names))]
        means_N = torch.tensor(found, dtype=torch.float64)
        largest = float(means_N.max())
        return means_N / largest if self.signal == "grad_norm" and largest else means_N


def ucb(means_N: Tensor, drawn_N: Tensor, *, explore: float) -> Tensor:
    """Upper confidence bounds, [N]: mean + explore · √(2 ln(n + 1) / (n_i + 1)), n the rows of all sources together."""
    return means_N + explore * torch.sqrt(2.0 * math.log(float(drawn_N.sum()) + 1.0) / (drawn_N + 1.0))


def gradient_norm(view: Any, column: str, *, rows: int) -> float:
    """Norm of the objective's gradient on a column's first held-out rows. Raises UserError where nothing is held out."""
    data = view.measured(column)
    if not any(len(source.chunks) for source in data.sources.values()):
        raise UserError(f"no gradient can be taken on '{column}': nothing of it is held out; hold out more with `val`")
    batch = next(iter(data.once(rows, rows=rows)))
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in view.grad(batch).values()))


def _among(names: list[str], source: str) -> str:
    """The source that a row is of: itself, or that whose piece of a length it is (`prose:64`)."""
    return source if source in names else source.rpartition(":")[0]


def effect(run: Seen) -> dict[str, float]:
    """The share of steps that had a mixture of their own, and the mean share of `b`, which is new where `a` is known."""
    rows = [row["weights"] for row in run.rows if row["kind"] == "train"]
    return {
        "changing": len({tuple(row.values()) for row in rows}) / len(rows),
        "new": sum(row["b"] for row in rows) / len(rows),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Counts change the shares in every step, and what has more to learn is drawn more."""
    return on["changing"] > 0.7 > off["changing"] and on["new"] > off["new"] + 0.05


# At equal FLOPs, of which the held-out passes take 7 %: twenty rounds, four sources, 16 rows of each.
BENCH = Bench(
    base="recipes/bench/four-domains.yaml",
    arm={"mix": {"use": "mix/bandit", "passages": 16}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"mix.temperature": [0.3, 1.0, 3.0], "optim.lr": [2e-3, 3e-3]},
    tune_baseline={"optim.lr": [5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3]},
    scale="7 B parameters, GRPO on puzzles of 12 difficulties; here supervised, by change of loss in place of advantage",
)
