"""Power-law rehearsal: what earlier stages learned from comes back, the rarer the longer ago it was practiced.

Paper:   Gandhi et al. 2024, arXiv:2401.10393, and its public code
Use:     `rate` 10–50 % for a fixed budget; leave it out and what is new competes by the same law, as in the authors'
    environment (with 9 earlier sources it keeps 38 % of the rows); `decay: 0` with a `rate` is uniform rehearsal
Works:   any modality; every earlier stage that trained on data, however many there are
Costs:   the rehearsed share: at equal compute, that much less of what is new
With:    takes the place of the mix, so shares among new sources are their `weight`s; continual/replay brings one stage
    at a fixed rate instead; adds to penalties and distillation
Differs: a source is a task, and the time since it was practiced is 1 for what the last stage learned, and what stages
    after it trained on over the mean of the earlier ones: with stages of equal length the authors' count of phases;
    rehearsal itself is no practice, as in their code; where their code fixes the budget it weighs by task number
    ((10 + j)⁴ for the j-th), here by the same law of time; old data are read again from the beginning, not sampled;
    shares are held in rows, not drawn; the budget is a share of the batch, not samples beside those of the new task
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, PrivateAttr

from tutelage.base.method import Bench, Method, Seen
from tutelage.methods._kit.portion import Portion
from tutelage.methods._kit.shares import normalized


class PowerLaw(Method):
    decay: float = Field(5.6, ge=0, description="exponent of the law; 0 rehearses all alike")
    delay: float = Field(10.0, gt=0, description="stages added to the time since practice; less favors the recent more")
    rate: Portion | None = Field(
        None, description="share of every batch that what was practiced before has together; left to the law without"
    )

    no_off = "a stage always has a mix"
    baseline = {"use": "mix/fixed"}
    on = {"decay": 2.0, "delay": 1.0}
    _own: dict[str, float] = PrivateAttr(default_factory=dict)  # shares of the stage's sources, from files that stay

    def source(self, view: Any) -> dict[str, tuple[Any, float]]:
        """What earlier stages learned from, under `stage/name`, each with its share; the stage's own are left out."""
        own = {name: view.source(name).sources[name] for name in view.sources}
        ages, weights = dict.fromkeys(own, 0.0), {n: source.facts.get("weight", 1.0) for n, source in own.items()}
        weights = {name: share * len(own) for name, share in normalized(weights, place="data").items()}  # 1 in the mean
        known = {source.fingerprint: name for name, source in own.items()}
        found = {}
        for stage, age in reversed(times(view.trained).items()):  # the last practice of a source counts
            for name, source in view.data(stage).sources.items():
                label = known.setdefault(source.fingerprint, f"{stage}/{name}")
                if label not in own:
                    found.setdefault(label, source)
                ages[label] = ages.get(label) or age
        shares = law(ages, weights, decay=self.decay, delay=self.delay, rate=self.rate)
        self._own = {name: shares[name] for name in own}
        return {label: (source, shares[label]) for label, source in found.items()}

    def weights(self, names: dict[str, dict[str, float]], view: Any) -> dict[str, float]:
        """Shares of the stage's own sources in what rehearsal leaves them; they add up to 1."""
        whole = sum(self._own[name] for name in names)
        return {name: self._own[name] / whole for name in names}


def times(trained: dict[str, float]) -> dict[str, float]:
    """Since each earlier stage ended, in stages of mean length: 1 for the last one. Unknown tokens count as the mean.

    trained: tokens of each, oldest first; 0 where nobody knows
    """
    known = [tokens for tokens in trained.values() if tokens]
    mean = sum(known) / len(known) if known else 1.0
    found, since = {}, 0.0
    for stage, tokens in reversed(trained.items()):
        found[stage] = 1.0 + since / mean
        since += tokens or mean
    return dict(reversed(found.items()))


def law(
    ages: dict[str, float], weights: dict[str, float], *, decay: float, delay: float, rate: float | None
) -> dict[str, float]:
    """Shares ∝ weight · (delay + age)^-decay, in sum 1; with a `rate` those of age above 0 have it together."""
    powers = {name: weights.get(name, 1.0) * (1.0 + age / delay) ** -decay for name, age in ages.items()}
    old = sum(power for name, power in powers.items() if ages[name])
    new = sum(power for name, power in powers.items() if not ages[name])
    if rate is None or not old or not new:
        return {name: power / (old + new) for name, power in powers.items()}
    return {name: power * (rate / old if ages[name] else (1.0 - rate) / new) for name, power in powers.items()}


def effect(run: Seen) -> dict[str, float]:
    """How much likelier the source that is new (`b`) is drawn than the one of the stage before (`a`), at least."""
    rows = [row["weights"] for row in run.rows if row["kind"] == "train"]
    return {"odds": min(row["b"] / row["a"] for row in rows)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """As the law says of one stage: (1 + 1) to the second."""
    return abs(on["odds"] - 4.0) < 0.01 and off["odds"] < 1.5


BENCH = Bench(
    base="recipes/bench/ciphers.yaml",
    arm={"start": "four--law", "mix": {"use": "mix/power_law", "rate": 0.25}},
    baseline={"start": "four--even", "mix": {"use": "mix/power_law", "rate": 0.25, "decay": 0}},
    metric="bits_per_byte",
    better="lower",
    margin=0.02,
    scale="permuted MNIST in 10 tasks, 4-layer networks 1,000 wide; claimed comparable or superior to uniform rehearsal",
)
