"""LoRA: freeze the weights and learn a low-rank addition to each linear layer.

Paper:   Hu et al. 2021, arXiv:2106.09685; `rslora`: Kalajdzievski 2023, arXiv:2312.03732
Use:     r 8 to 64, alpha 2r, ten times the rate of full fine-tuning; all linear layers of the blocks
Works:   any model with linear layers (GPT-2's Conv1D too); experts in one 3-D tensor stay frozen
Costs:   about 1 % more parameters to hold; gradients and optimizer state only for these
With:    PEFT: `adapter/` beside the model loads with PeftModel, and `initial` starts from one
Differs: wraps every linear layer of the blocks by default, where the paper wraps the attention's query and value; the
    first factor begins uniform, as in the authors' code and PEFT, where the paper writes of normal numbers
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Seen
from tutelage.methods._kit import adapters
from tutelage.methods._kit.lora import Additions

SHARED = {"r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "rslora": "use_rslora"}


class LoRA(Additions):
    initial: str | None = Field(None, description="folder of an adapter in PEFT's format to start from")

    no_off = "without it the weights themselves are trained"
    baseline = {}
    on = {"r": 4}

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_adapter(cls, values: Any) -> Any:
        """Rank and scale come from the adapter's folder; saying something else is an error."""
        if not (isinstance(values, dict) and isinstance(values.get("initial"), str)):
            return values
        if values.get("targets") is not None:
            raise ValueError("the adapter in `initial` says which layers it adds to; leave `targets` out")
        config = adapters.read_config(Path(values["initial"]))
        found = {key: config.get(theirs) for key, theirs in SHARED.items() if config.get(theirs) is not None}
        for key in ("r", "alpha", "rslora"):
            if key in values and values[key] != found.get(key, values[key]):
                raise ValueError(f"{key} is {found[key]} in {values['initial']}, not {values[key]}; leave it out")
        return {**found, **values}

    def files(self) -> list[Path]:
        return [] if self.initial is None else [Path(self.initial)]

    def start(self, first: Tensor, second: Tensor, name: str, view: Any) -> None:
        """As PEFT draws it, but the same on every rank and whatever else is wrapped; or as the adapter has it."""
        if self.initial is None:
            drawn = torch.empty(first.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=view.rng(f"lora|{name}"))
            first.copy_(drawn)
        else:
            a, b = adapters.factors(Path(self.initial), name)
            first.copy_(adapters.fitting(a, first, name))
            second.copy_(adapters.fitting(b, second, name))

    def chosen(self, anatomy: Any) -> set[str]:
        if self.initial is None:
            return super().chosen(anatomy)
        found = adapters.names(Path(self.initial))
        odd = sorted(found - set(anatomy.linears))
        if odd:
            raise UserError(f"param/lora.initial: {self.initial} adapts {odd[0]}, which is no linear layer here")
        return found


def effect(run: Seen) -> dict[str, float]:
    """The highest rank of what was added to a matrix, and the share of tensors left as they were."""
    start, end = run.start(), run.weights()
    ranks = [0]
    for name, before in start.items():
        moved = end[name].float() - before.float()
        if before.ndim == 2 and moved.any():
            ranks.append(int(torch.linalg.matrix_rank(moved, rtol=1e-3)))
    still = sum(end[name].equal(before) for name, before in start.items())
    return {"rank": float(max(ranks)), "still": still / len(start)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    return 0 < on["rank"] <= LoRA.on["r"] < off["rank"] and on["still"] > off["still"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "param/lora", "r": 16, "alpha": 32}], "optim": {"use": "optim/adamw", "lr": 1e-2}},
    metric="forgetting/prose",
    better="lower",
    margin=0.01,
    scale="125 M to 175 B parameters; that it forgets less: Biderman et al. 2024, 7 B",
)
