"""Temperature mixing: shares that follow the sources' sizes, evened out by an exponent.

Paper:   Conneau & Lample 2019, arXiv:1901.07291; Xue et al. 2021 (mT5), arXiv:2010.11934
Use:     temperature 1 is proportional, 3.3 as in mT5, 100 all but equal
Works:   any modality whose sources count tokens
Costs:   small sources are repeated the more the higher the temperature
With:    continual/replay takes its rate first, these shares divide the rest
Differs: sizes are tokens where mT5 counts pages and XLM sentences; `cap` is T5's limit on a source's size
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.shares import mean_shares, normalized


class Temperature(Method):
    temperature: float = Field(3.3, gt=0, description="share ∝ tokens^(1/temperature)")
    cap: float | None = Field(None, gt=0, description="tokens above which a source counts as no larger")

    no_off = "a stage always has shares"
    baseline = {"use": "mix/fixed"}
    on = {"temperature": 1.0}
    steerable = frozenset({"temperature"})

    def weights(self, names: dict[str, dict[str, float]], view: Any) -> dict[str, float]:
        """Shares that add up to 1. `names` maps each source to its facts."""
        sizes = {name: min(facts["tokens"], self.cap or float("inf")) for name, facts in names.items()}
        largest = max(sizes.values(), default=1.0)  # divided out, so that a low temperature does not overflow
        powers = {name: (size / largest) ** (1.0 / self.temperature) for name, size in sizes.items()}
        return normalized(powers, place="mix")


def effect(run: Seen) -> dict[str, float]:
    return mean_shares(run)


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["unevenness"] > off["unevenness"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={
        "data": {"prose": "stdlib:prose"},
        "mix": {"use": "mix/temperature", "temperature": 3.3},
    },
    baseline={
        "data": {"prose": "stdlib:prose"},
        "mix": {"use": "mix/temperature", "temperature": 1.0},
    },
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3, 1e-2]},
    tune_baseline={"optim.lr": [1e-3, 3e-3, 1e-2]},
    scale="300 M to 13 B parameters, 101 languages",
)
