"""Objective gate: plain learning until the loss stands still, then hidden states are compressed too, then plain again.

Paper:   Yu 2025 (GAPT, memorization–compression cycles), arXiv:2505.08727
Use:     `strength` 0.01–1; patience of 75 to 125 steps; `smooth` 0.9–0.98 for batches of a few thousand tokens, whose
    losses jump by more than `spike`, and 0, as in the paper, for batches of half a million
Works:   decoders and encoders with hidden states of every block; pretraining, where the loss comes to rest
Costs:   hidden states of every block are kept; in a compression phase a Gram matrix of 8 × 8 for each 8 tokens and block
With:    the phase is `steer/objective_gate.phase`: a person may set it, and every switch is in the journal
Differs: entropy of order 2, as in the author's code, so that no eigenvalues are needed; patches within one document, and
    tokens outside a whole patch weigh nothing; the losses are smoothed; the gate sees the step's loss, not a held-out
    one; blocks other than the first and the last, averaged, where the paper takes them in turn; both phases begin
    with no least loss, where the author's code keeps the one it has when plain learning begins again, so that what
    is won back after a rise counts as progress here alone
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Seen
from tutelage.core.out import Out
from tutelage.core.types import IGNORE, Batch, Sum
from tutelage.methods._kit.labels import row_weights
from tutelage.methods._kit.policy import Policy

# Shape letters: B rows, T positions, P patches of a row, S positions of a patch, D hidden width.


class ObjectiveGate(Policy):
    strength: float = Field(0.1, ge=0, description="weight of the entropy in a compression phase")
    phase: float = Field(0.0, ge=0, le=1, description="0 learns plainly, 1 compresses too; the gate moves it")
    patch: int = Field(8, ge=2, description="tokens whose hidden states are compared with each other")
    delta: float = Field(0.01, ge=0, description="least fall of the loss, or of the entropy, that is progress (nats)")
    spike: float = Field(0.1, gt=0, description="rise of the loss that ends a compression phase, as a share of it")
    plain: int = Field(125, ge=1, description="steps without progress of the loss before compression begins")
    compressing: int = Field(75, ge=1, description="steps without progress of the entropy before it ends")
    smooth: float = Field(0.0, ge=0, lt=1, description="weight of the past in the loss and entropy that are compared")

    off = {"strength": 0.0}
    on = {"strength": 1.0, "plain": 1, "compressing": 50, "delta": 10.0, "spike": 5.0}
    needs = frozenset({"hidden"})
    steerable = frozenset({"strength", "phase"})

    def auxiliary(self, out: Out, batch: Batch, view: Any) -> Sum:
        """strength · mean entropy of the middle blocks' patches, in nats, per token that the objective counts."""
        weight_BT = (batch["labels"] != IGNORE) * row_weights(batch)
        if not self.phase:
            return Sum(torch.zeros((), device=weight_BT.device), weight_BT.sum())
        blocks = middle(out)
        whole_BP = whole_patches(batch["segments"], self.patch)
        used = whole_BP.shape[1] * self.patch
        weight_BP = weight_BT[:, :used].unflatten(1, (-1, self.patch)).sum(2) * whole_BP
        entropies = [(entropy(patches(hidden, self.patch)) * weight_BP).sum() for hidden in blocks]
        return Sum(self.strength * self.phase * torch.stack(entropies).mean(), weight_BT.sum())

    def act(self, view: Any) -> list[dict[str, Any]]:
        """A switch of the phase: when nothing gets better in it, or when compressing hurts the loss too much."""
        if not self.strength or not math.isfinite(view.signals.get("loss", math.nan)):
            return []
        of = "entropy" if self.phase else "loss"
        if self.state.get("of") != of:  # also where a person has moved the phase
            self._anew()
            self.state["of"] = of
        loss = self._smoothed("loss", view.signals["loss"])
        if not self.phase:
            stands = self._stands(loss, self.plain)
            return self._switch(1.0, f"the loss stands at {loss:.4g}") if stands else []
        start = self.state.setdefault("before", loss)
        self.state["before"] = min(start, loss)
        if loss > self.state["before"] * (1 + self.spike):
            return self._switch(0.0, f"the loss rose from {self.state['before']:.4g} to {loss:.4g}")
        weight = self.strength * self.phase or 1.0  # their product may be too small for a number
        found = self._smoothed("entropy", view.signals.get("aux/steer/objective_gate", 0.0) / weight)
        stands = self._stands(found, self.compressing)
        return self._switch(0.0, f"the entropy stands at {found:.4g}") if stands else []

    def _switch(self, phase: float, why: str) -> list[dict[str, Any]]:
        """Ask for the other phase, and count anew, whatever becomes of it."""
        self._anew()
        return self.ask(why, {"do": "set", "path": "steer/objective_gate.phase", "to": phase})

    def _anew(self) -> None:
        for key in ("best", "flat", "of", "before", "mean_entropy", "weight_entropy"):
            self.state.pop(key, None)

    def _smoothed(self, what: str, value: float) -> float:
        """A running mean without the pull of its start."""
        mean = self.smooth * self.state.get(f"mean_{what}", 0.0) + (1 - self.smooth) * value
        weight = self.smooth * self.state.get(f"weight_{what}", 0.0) + 1 - self.smooth
        self.state[f"mean_{what}"], self.state[f"weight_{what}"] = mean, weight
        return float(mean / weight)

    def _stands(self, value: float, patience: int) -> bool:
        """Whether `patience` steps in a row brought no new least value by more than `delta`."""
        best = self.state.get("best")
        if best is not None and best - value > self.delta:
            self.state["flat"] = 0
        elif best is not None:
            self.state["flat"] = self.state.get("flat", 0) + 1
        self.state["best"] = value if best is None else min(best, value)
        return int(self.state.get("flat", 0)) >= patience


def middle(out: Out) -> list[Tensor]:
    """Hidden states after every block but the first and the last; of two blocks or fewer, all."""
    if out.hidden_states is None:
        raise UserError("steer/objective_gate needs a model that returns the hidden states of every block")
    blocks = list(out.hidden_states[1:])
    return blocks[1:-1] if len(blocks) > 2 else blocks


def patches(hidden_BTD: Tensor, size: int) -> Tensor:
    """[B, P, S, D]; a rest shorter than a patch is left out."""
    return hidden_BTD[:, : hidden_BTD.shape[1] // size * size].unflatten(1, (-1, size))


def whole_patches(segments_BT: Tensor, size: int) -> Tensor:
    """Which patches lie within one document, [B, P]."""
    segments_BPS = patches(segments_BT, size)
    return (segments_BPS[..., :1] == segments_BPS).all(-1) & (segments_BPS[..., 0] > 0)


def entropy(z_BPSD: Tensor) -> Tensor:
    """Matrix-based Rényi entropy of order 2 of each patch, [B, P], in nats.

    With the eigenvalues p of the Gram matrix over its trace: -log Σ p² = 2 log tr K - log ‖K‖². It is 0 where all
    states point one way, log S where S states are orthogonal and of one length.
    """
    z_BPSD = z_BPSD.float()
    gram_BPSS = z_BPSD @ z_BPSD.mT
    trace_BP = gram_BPSS.diagonal(dim1=-2, dim2=-1).sum(-1)
    share = gram_BPSS / trace_BP.clamp(min=1e-12)[..., None, None]  # first, so that nothing overflows when squared
    return -share.square().sum((-2, -1)).clamp(min=1e-12).log()


def effect(run: Seen) -> dict[str, float]:
    """The entropy of the last steps in which it counted against that of the first; 1 when it never did."""
    found = [row["aux/steer/objective_gate"] for row in run.rows if row.get("aux/steer/objective_gate")]
    return {"entropy": found[-1] / found[0] if found else 1.0}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["entropy"] < 0.9 and off["entropy"] == 1.0


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    stage="one",
    arm={"methods": [{"use": "steer/objective_gate", "smooth": 0.95, "plain": 40, "compressing": 25}]},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"methods.0.strength": [0.03, 0.3], "optim.lr": [1e-3, 3e-3]},
    tune_baseline={"optim.lr": [1e-3, 2e-3, 3e-3, 6e-3]},
    scale="claimed at 124 M parameters (GPT-2), 0.8 B tokens of FineWeb",
)
