"""Another rotary base for a longer context: positions turn more slowly, and distant ones stay apart.

Paper:   Xiong et al. 2023 (RoPE ABF), arXiv:2309.16039; `interpolate` is Chen et al. 2023, arXiv:2306.15595
Use:     between two stages, before rows get longer: 10,000 to 500,000 for 4,096 to 32,768 tokens in the paper. The
         slowest pair of channels should not come round within the new rows
Works:   models whose configuration has `rope_parameters` of type default or linear; where layers differ in theirs, those
         with full attention. Not models with learned or no positions
Costs:   nothing: no weight changes. The loss is higher at first, and what follows must be trained on long rows
With:    schedule/rewarm or schedule/linear in the stage that follows, with a longer `length` and fewer rows
Differs: the paper's mixture with more long texts and its lengths in steps are the recipe's; xPos, its third variant, is
         not here
"""

from __future__ import annotations

import json
import math
from typing import Any

from pydantic import Field
from torch import Tensor

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Method, Seen

FULL = "full_attention"  # the entry of layers that see the whole row, where layers differ


class RopeBase(Method):
    base: float | None = Field(500_000.0, gt=1, description="new rotary base (`rope_theta`); null keeps the model's")
    interpolate: float = Field(1.0, ge=1, description="positions are divided by so much besides; 1 leaves them")
    positions: int | None = Field(None, ge=1, description="longest row that the model is for; null keeps the model's")

    no_off = "a change of the configuration is a stage of its own"
    baseline = {"use": "grow/rope_base", "base": None}
    on = {"base": 1_000_000.0}
    toys = ("llama", "qwen2")

    def grow(
        self, config: dict[str, Any], tensors: dict[str, Tensor], view: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        given = config.get("rope_parameters") or {}
        by_layer = FULL in given
        rope = dict(given[FULL] if by_layer else given)
        if "rope_theta" not in rope:
            raise UserError(
                f"{self.name()}: the configuration gives no rotary base (`rope_parameters`); this model has other positions"
            )
        kind = rope.get("rope_type", "default")
        if kind not in ("default", "linear"):
            raise UserError(
                f"{self.name()}: the model's positions are scaled as '{kind}' already; begin with one that is not"
            )
        if self.base is not None:
            rope["rope_theta"] = self.base
        if self.interpolate > 1:
            rope |= {"rope_type": "linear", "factor": rope.get("factor", 1.0) * self.interpolate}
        config = {**config, "rope_parameters": {**given, FULL: rope} if by_layer else rope}
        if self.positions is not None:
            config["max_position_embeddings"] = self.positions
        return config, tensors


def effect(run: Seen) -> dict[str, float]:
    """Positions after which the slowest pair of channels has come round, and how many weights are others."""
    config = json.loads((run.folder / "artifact" / "model" / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    size = config["hidden_size"] // config["num_attention_heads"]
    start, end = run.start(), run.weights()
    return {
        "period": 2 * math.pi * rope["rope_theta"] ** ((size - 2) / size) * rope.get("factor", 1.0),
        "others": float(sum(not end[name].equal(start[name]) for name in start)),
    }


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return on["period"] > 10 * off["period"] and on["others"] == off["others"] == 0


BENCH = Bench(
    base="recipes/bench/longer.yaml",
    arm={"start": "stretched"},
    stage="long",
    baseline={"start": "one"},
    metric="bits_per_byte/prose",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [1e-3, 3e-3]},
    tune_baseline={"optim.lr": [1e-3, 3e-3]},
    scale="7 B to 70 B parameters, 4,096 to 32,768 tokens",
)
