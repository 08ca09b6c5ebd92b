"""Early stop: the learning curve is continued to the end of the stage, and a stage that will not get there ends now.

Paper:   Domhan, Springenberg & Hutter 2015 (IJCAI), «Speeding up automatic hyperparameter optimization of deep neural
    networks by extrapolation of learning curves»
Use:     `goal`: the best of other runs, as in the paper; without one `gain`, what the rest of the stage must still bring;
    `chance` 0.05; a rate that is constant or falls slowly, as no curve knows of a fall that is yet to come: `decay: 10%`
    lets the rate fall when the stage ends early
Works:   any measure that follows a power law of the steps; set `evals: {every: 50step, budget: 100%}`
Costs:   a least-squares fit for each of 300 exponents at each measurement, milliseconds
With:    steer/plateau and schedules that fall change the curve; steer/rollback's repeated steps are taken out of it
Differs: one family of curves, y = a + b·x^-c, where the paper weighs eleven; the exponent is integrated over a grid, and
    offset, slope and noise exactly, where the paper samples by MCMC; no condition on the predictive deviation; a curve
    may also get worse, which the paper's prior rules out, and all points weigh the same, where the authors' code weighs
    the newest more; a fixed number of first points is left out, where that code looks for the rise; `gain` and
    `patience` are ours (the paper stops at the first such forecast)
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy import stats

from tutelage.base.clock import SpanField
from tutelage.base.method import Bench, Seen
from tutelage.methods._kit.policy import Policy
from tutelage.methods._kit.signals import news, pushed

EXPONENTS = np.geomspace(0.05, 3.0, 300)
KEPT = 512  # points of a curve; more than these, and the oldest are forgotten


class Forecast(NamedTuple):
    """What a curve will be at one place: a mixture of t distributions, one for each exponent."""

    weights: np.ndarray
    means: np.ndarray
    scales: np.ndarray
    freedom: int

    def below(self, value: float) -> float:
        """The probability of a number below `value`."""
        return float(self.weights @ stats.t.cdf(value, self.freedom, loc=self.means, scale=self.scales))

    @property
    def mean(self) -> float:
        return float(self.weights @ self.means)

    def interval(self, share: float = 0.9) -> tuple[float, float]:
        """The middle `share` of the probability."""
        ends = [np.asarray(stats.t.ppf(q, self.freedom, self.means, self.scales)) for q in (1e-4, 1 - 1e-4)]
        places = np.linspace(ends[0].min(), ends[1].max(), 1001)
        below = self.weights @ stats.t.cdf(places[None], self.freedom, self.means[:, None], self.scales[:, None])
        low, high = np.interp([(1 - share) / 2, (1 + share) / 2], below, places)
        return float(low), float(high)


def forecast(x: np.ndarray, y: np.ndarray, *, at: float) -> Forecast:
    """y = a + b·x^-c with normal noise, fitted to at least four points [n], as it will be measured at `at`.

    Priors are flat in a, in what the curve falls over the points seen, in log σ and in log c. So a fit with exponent
    c has the weight RSS^(-(n-2)/2), and its prediction is Student's, as for a straight line in x^-c.
    """
    assert len(x) == len(y) >= 4 and (x > 0).all()
    free = len(x) - 2
    power = (x[None] / x.max()) ** -EXPONENTS[:, None]
    middle, spread = power.mean(1, keepdims=True), power.std(1, keepdims=True)
    z_CN = (power - middle) / spread  # of each exponent C, with mean 0 and mean square 1
    z_C = (((at / x.max()) ** -EXPONENTS) - middle[:, 0]) / spread[:, 0]
    slope_C = z_CN @ (y - y.mean()) / len(x)
    rss_C = ((y - y.mean() - slope_C[:, None] * z_CN) ** 2).sum(1)
    rss_C = np.maximum(rss_C, 1e-12 * max(1e-12, float(((y - y.mean()) ** 2).sum())))
    log_C = -free / 2 * np.log(rss_C)
    weights = np.exp(log_C - log_C.max())
    scales = np.sqrt(rss_C / free * (1 + (1 + z_C**2) / len(x)))
    return Forecast(weights / weights.sum(), y.mean() + slope_C * z_C, scales, free)


class EarlyStop(Policy):
    watch: str = Field("bits_per_byte", description="a measure (the mean over its columns), or `loss` of training")
    every: int = Field(20, ge=1, description="steps averaged into one number, of the training loss")
    better: Literal["lower", "higher"] = Field("lower", description="which way is better")
    goal: float | None = Field(None, description="what the stage must reach by its end; left out, `gain` counts")
    gain: float = Field(0.01, ge=0, description="what the rest must still bring, in the measure's unit")
    chance: float = Field(0.05, ge=0, lt=1, description="the stage ends when reaching it is less likely than this")
    skip: int = Field(1, ge=0, description="first numbers left out: an untrained model is on no power law")
    points: int = Field(6, ge=4, description="numbers before the first forecast")
    patience: int = Field(2, ge=1, description="forecasts in a row that must say so")
    decay: SpanField | None = Field(None, description="let the rate fall over this span first, as the schedule ends")

    off = {"chance": 0.0}
    on = {"watch": "loss", "every": 1, "goal": 0.0, "skip": 0, "points": 9, "patience": 1}
    steerable = frozenset({"chance", "gain"})

    def act(self, view: Any) -> list[dict[str, Any]]:
        """The end of the stage, once the rest of it is unlikely to bring what is wanted."""
        value = news(self.state, view, self.watch, every=self.every)
        if value is None or not self.chance or self.state.get("asked"):
            return []
        clock = view.clock
        here, end = clock.count(clock.until), clock.total[clock.until]
        x, y = self._curve(here, value)
        if here <= 0 or here >= end or len(x) < self.points:
            return []
        sign = 1.0 if self.better == "lower" else -1.0
        ahead = forecast(x, sign * y, at=end)
        best = float((sign * y).min())
        wanted = best - self.gain if self.goal is None else sign * self.goal
        likely = 1.0 if self.goal is not None and best <= wanted else ahead.below(wanted)
        self.state["poor"] = self.state.get("poor", 0) + 1 if likely < self.chance else 0
        if self.state["poor"] < self.patience:
            return []
        self.state["asked"] = 1
        low, high = sorted(sign * end for end in ahead.interval())
        why = f"{self.watch} {sign * wanted:.4g} is unlikely ({likely:.2g}): at the end {low:.4g} to {high:.4g}"
        after = {"after": str(self.decay), "decay": True} if self.decay else {}
        return self.ask(why, {"do": "end_stage", **after})

    def _curve(self, here: float, value: float) -> tuple[np.ndarray, np.ndarray]:
        """Where and what was measured, [n] each; what was rolled back is forgotten."""
        x, y = self.state.get("x"), self.state.get("y")
        if x is not None:
            keep = x < here
            x, y = x[keep], y[keep]
        if self.state.get("skipped", 0) < self.skip or here <= 0:
            self.state["skipped"] = self.state.get("skipped", 0) + 1
        elif math.isfinite(value):
            x, y = pushed(x, here, size=KEPT), pushed(y, value, size=KEPT)
        if x is None:
            return np.empty(0), np.empty(0)
        self.state["x"], self.state["y"] = x, y
        return x.numpy(), y.numpy()


def effect(run: Seen) -> dict[str, float]:
    return {"steps": float(sum(row["kind"] == "train" for row in run.rows))}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["steps"] < off["steps"]


BENCH = Bench(
    base="recipes/bench/instructions.yaml",
    arm={
        "data": {"asked": {"args": {"count": 60}}},  # so few that they are learned by heart
        "methods": [{"use": "steer/early_stop", "watch": "bits_per_byte/asked", "gain": 0.01}],
    },
    baseline={"data": {"asked": {"args": {"count": 60}}}},
    metric="bits_per_byte/asked",
    better="lower",
    margin=0.01,
    tune={"methods.0.chance": [0.02, 0.1, 0.3], "optim.lr": [5e-4, 1e-3]},
    tune_baseline={"optim.lr": [1e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]},
    scale="claimed for small convolutional and fully connected networks, as time saved at equal accuracy",
)
