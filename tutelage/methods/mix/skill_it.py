"""Skill-it: sources that help others, and those that are still hard, are drawn more; asked anew every few steps.

Paper:   Chen et al. 2023, arXiv:2307.14430, and its public code
Use:     skills that build on one another, a source each; `eta` 0.2–1 where the graph is written with entries around
    0.5 and losses are near 1 nat, more where the pilots' entries are small; `window` 3; 5 to 10 rounds a stage. A graph
    that is nearly empty or complete says nothing about an order: leave the method out there
Works:   text whose sources hold something out; `targets` may be other columns, of `keep` or of ancestors
Costs:   before the first step `pilot` training steps for each source, whose operations count for the stage while its
    tokens and steps do not; at every round a forward pass over `passages` held-out rows of each target, counted too
With:    continual/replay takes its rate first, these shares divide the rest; under param/lora the pilots still train
    whole weights
Differs: the estimated graph is the relative fall of each loss, max(0, (L_j − L_j after training on i) / L_j), as the
    authors' later graphs are (HazyResearch/aioli), not their search over pairs; pilots run at the optimizer's full
    rate without a schedule and without other methods; the window counts rounds, where the code counts evaluations, of
    which it makes several a round (LEGO: 20, so that 3 of them are the round's last); with `targets` it sums over the
    window as elsewhere, where the code takes the mean; shares are kept exactly, not sampled
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.heldout import nats_per_label

Graph = dict[str, dict[str, float]]


class SkillIt(Method):
    eta: float = Field(
        0.5, ge=0, le=1e6, description="how strongly shares follow influence times loss; 0 draws all alike"
    )
    every: SpanField = Field(Span(10.0, "%"), description="length of a round, after which losses are asked again")
    window: int = Field(3, ge=1, description="rounds whose losses add up")
    pilot: int = Field(
        100, ge=0, description="steps on each source alone that estimate the graph; with 0 each helps itself alone"
    )
    graph: Graph | None = Field(
        None, description="what training on a source (outer) does for a target (inner); itself 1 unless written"
    )
    targets: list[str] | None = Field(None, description="columns whose loss counts; the stage's sources if left out")
    passages: int = Field(64, ge=1, description="held-out rows of each target that a loss is taken on")

    no_off = "a stage always has a mix"
    baseline = {"use": "mix/fixed"}
    on = {"eta": 4.0, "every": "3step", "window": 1, "pilot": 4, "passages": 8}
    steerable = frozenset({"eta"})

    def begin(self, model: nn.Module, view: Any) -> None:
        """Estimate the graph: from the start's weights, `pilot` steps on each source, and what they did to every loss."""
        if self.graph is not None or not self.pilot:
            return
        targets = self.targets or list(view.sources)
        before = self.losses(targets, view)
        found = []
        for name in view.sources:
            batches = view.source(name).batches(self.pilot, rows=max(1, view.tokens // view.length))
            after = view.tried(batches, lambda: self.losses(targets, view))
            found.append(((before - after) / before.clamp(min=1e-9)).clamp(min=0.0))
        self.state["graph"] = torch.stack(found)

    def weights(self, names: dict[str, dict[str, float]], view: Any) -> dict[str, float]:
        """Shares that add up to 1, ∝ exp(η Σ_j A_ij Σ_τ L_j(θ_τ)) over the last `window` rounds; at first L is 1."""
        if not names:
            return {}
        targets = self.targets or list(names)
        influence_NM = self.influence(list(names), targets)
        if influence_NM is None:  # asked before `begin`
            return dict.fromkeys(names, 1.0 / len(names))
        now = int(view.clock.passed(self.every) + 1e-9)
        if "shares" not in self.state:
            self.state["round"] = now
            self.state["shares"] = shares(influence_NM, torch.ones(1, len(targets), dtype=torch.float64), eta=self.eta)
        elif now > self.state["round"]:
            self.state["round"] = now
            known = self.state.get("losses", torch.zeros(0, len(targets), dtype=torch.float64)).cpu()
            losses_WM = torch.cat([known, self.losses(targets, view)[None]])[-self.window :]
            self.state["losses"] = losses_WM
            self.state["shares"] = shares(influence_NM, losses_WM, eta=self.eta)
        return dict(zip(names, self.state["shares"].tolist(), strict=True))

    def losses(self, targets: list[str], view: Any) -> Tensor:
        """Nats per label of each target's held-out rows, [M] float64."""
        return torch.tensor([nats_per_label(view, name, rows=self.passages) for name in targets], dtype=torch.float64)

    def influence(self, names: list[str], targets: list[str]) -> Tensor | None:
        """The graph as a matrix, [N, M] float64: what training on a source does for a target."""
        if self.graph is None and self.pilot:
            found = self.state.get("graph")
            return None if found is None else found.cpu()
        graph = self.graph or {}
        inner = [target for row in graph.values() for target in row]
        for given, known in ((list(graph), names), (inner, targets)):
            wrong = next((name for name in given if name not in known), None)
            if wrong is not None:
                hint = did_you_mean(wrong, known) or f"; there are: {', '.join(known)}"
                raise UserError(f"mix.graph: nothing is called '{wrong}' here{hint}")
        rows = [[graph.get(n, {}).get(m, float(n == m)) for m in targets] for n in names]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(names), len(targets))


def shares(influence_NM: Tensor, losses_WM: Tensor, *, eta: float) -> Tensor:
    """softmax_i(η Σ_τ Σ_j A_ij L_τj), [N] float64: multiplicative weights that forget what is out of the window."""
    return torch.softmax(eta * influence_NM @ losses_WM.sum(dim=0), dim=0)


def effect(run: Seen) -> dict[str, float]:
    """How often the shares changed, and the share of `b`, which is new where `a` is known: the first, and the mean."""
    rows = [row["weights"] for row in run.rows if row["kind"] == "train"]
    return {
        "mixtures": float(len({tuple(row.values()) for row in rows})),
        "first": rows[0]["b"],
        "new": sum(row["b"] for row in rows) / len(rows),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """The graph alone, before any round's losses, draws more of what helps more; losses then set it anew every round."""
    return on["mixtures"] >= 3 > off["mixtures"] and min(on["first"] - off["first"], on["new"] - off["new"]) > 0.05


# At equal FLOPs, pilots (60 steps in all) and held-out passes included; equal shares, the paper's rival for RedPajama's sources.
BENCH = Bench(
    base="recipes/bench/four-domains.yaml",
    arm={"mix": {"use": "mix/skill_it", "pilot": 15, "passages": 16}},
    metric="bits_per_byte",
    better="lower",
    margin=0.01,
    tune={"mix.eta": [0.05, 0.2, 0.5], "optim.lr": [2e-3, 3e-3]},
    tune_baseline={"optim.lr": [5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3]},
    scale="125 M to 3 B parameters; LEGO in 5 skills; RedPajama's sources, 1 B to 3 B tokens",
)
