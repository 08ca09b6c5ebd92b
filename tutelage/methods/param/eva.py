"""EVA: LoRA that begins with the directions in which a layer's inputs vary most, and has its ranks where they vary.

Paper:   Paischer et al. 2024, arXiv:2410.07170
Use:     as `param/lora`; rho 1 (every layer at r) or 2, between which the paper chooses (beyond 2 little changes), tau 0.99;
         passages of a few thousand tokens
Works:   any model with linear layers whose inputs are at least 2·rho·r wide
Costs:   LoRA's, and before training some passes without gradients over `passages`, until the directions settle
With:    PEFT's implementation computes them; `adapter/` beside the model loads with PeftModel, its ranks included
Differs: alpha is 16 by default, as LoRA's, where the paper sets 1; wraps the linear layers of the blocks by default, where
         the paper wraps the head too. As in PEFT (the authors'): inputs are centered, a direction counts by its share of
         all the variance of its layer's inputs (formula 6 divides by the sum of the singular values found), only what a
         layer's rank needs must settle, positions that the loss leaves out do not count, and alpha follows a layer's
         rank, so that all additions have one factor
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn

from tutelage.base.errors import UserError
from tutelage.base.method import Bench, Seen
from tutelage.core.types import IGNORE, Batch
from tutelage.methods._kit import adapters
from tutelage.methods._kit.lora import Additions

MOST = 1000  # minibatches until directions that have not settled are an error


class EVA(Additions):
    rho: float = Field(2.0, ge=1, description="a layer's rank is at most rho times r")
    tau: float = Field(0.99, gt=0, le=1, description="cosine between two minibatches' directions, at which they settle")
    whiten: bool = Field(False, description="divide each direction by the root of its singular value")
    passages: int = Field(
        64, ge=1, description="of the rows that training begins with, looked at again until all settle"
    )
    at_once: int = Field(8, ge=1, description="rows of a minibatch")

    no_off = "without it the weights themselves are trained"
    baseline = {"use": "param/lora", "r": 4}
    on = {"r": 4, "passages": 16}

    def rank(self, name: str) -> int:
        return int(self.state.get("ranks", {}).get(name, self.r))

    def begin(self, model: nn.Module, view: Any) -> None:
        """Find each layer's directions and rank. The directions are let go of once they are in the factors."""
        names = sorted(self.chosen(view.engine.anatomy))
        for name in names:
            inputs = (
                getattr(model.get_submodule(name), "in_features", None) or model.get_submodule(name).weight.shape[0]
            )
            if 2 * round(self.rho * self.r) > inputs:
                raise UserError(
                    f"param/eva: 2·rho·r is {2 * round(self.rho * self.r)}, more than the {inputs} inputs of {name}; "
                    "lower r or rho, or leave the layer out of `targets`"
                )
        found = directions(model, names, self, view)
        self.state["ranks"] = {name: len(found[name]) for name in names}
        self.state["directions"] = {name: first for name, first in found.items() if len(first)}

    def start(self, first: Tensor, second: Tensor, name: str, view: Any) -> None:
        held: dict[str, Tensor] = self.state.get("directions", {})
        if name in held:  # else the checkpoint's factors are about to be read
            first.copy_(held.pop(name))
        if not held:
            self.state.pop("directions", None)


def directions(model: nn.Module, names: list[str], settings: EVA, view: Any) -> dict[str, Tensor]:
    """For each layer the right-singular vectors that it begins with, [its rank, inputs], by PEFT.

    Every rank sees the same rows, so all find the same. Positions count that the loss counts.
    """
    from peft import EvaConfig, LoraConfig
    from peft.tuners.lora.eva import get_eva_state_dict

    eva = EvaConfig(rho=settings.rho, tau=settings.tau, whiten=settings.whiten)
    make: Any = LoraConfig
    config = make(r=settings.r, target_modules=names, init_lora_weights="eva", eva_config=eva)
    batches = [view.prepared(batch) for batch in view.sample(settings.passages).split(settings.at_once)]
    seen = 0

    def forward(model: nn.Module, batch: Batch) -> None:
        nonlocal seen
        seen += 1
        if seen > MOST:
            raise UserError(
                f"param/eva.tau: the directions of some layer have not settled after {MOST} minibatches of at most "
                f"{settings.at_once} rows; lower tau or rho, or give more `passages` or rows `at_once`"
            )
        view.model(batch)

    return get_eva_state_dict(
        model,
        batches,
        config,
        forward_fn=forward,
        prepare_model_inputs_fn=lambda batch, config: masks(batch),
        prepare_layer_inputs_fn=counted,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def masks(batch: Batch) -> list[Tensor]:
    """Which positions of a batch count, [B, T]: those with something to learn, and of a source all that are there."""
    found = [batch["labels"] != IGNORE]
    return found + ([batch["source_mask"].bool()] if "source_mask" in batch else [])


def counted(inputs: Any, masks: list[Tensor], name: str) -> Tensor:
    """A layer's inputs at the positions that count, [N, inputs]; all of them where it sees no positions."""
    x = inputs[0] if isinstance(inputs, tuple) else inputs
    for mask in masks:
        if x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def effect(run: Seen) -> dict[str, float]:
    """How many different ranks the layers have, the sum of all, and how far directions of a layer are from one another.

    The last is the mean absolute cosine between two of a layer's: 0 where they are singular vectors.
    """
    path = run.folder / "artifact" / "adapter" / adapters.FILE
    with safe_open(str(path), framework="pt") as read:
        firsts = [read.get_tensor(key) for key in read.keys() if ".lora_A." in key]  # noqa: SIM118 - no mapping
    alike = []
    for first in (first for first in firsts if len(first) > 1):
        rows = torch.nn.functional.normalize(first.float(), dim=1)
        alike.append(float((rows @ rows.T).fill_diagonal_(0).abs().sum()) / (len(rows) * (len(rows) - 1)))
    ranks = [len(first) for first in firsts]
    return {"different": len(set(ranks)), "sum": sum(ranks), "alike": sum(alike) / len(alike)}


def holds(on: dict[str, float], off: dict[str, float]) -> bool:
    """Ranks are divided anew and none is lost, and layers still learn along directions that hardly overlap."""
    return on["different"] > off["different"] and on["sum"] == off["sum"] and on["alike"] < 0.8 * off["alike"]


BENCH = Bench(
    base="recipes/bench/two-domains.yaml",
    arm={"methods": [{"use": "param/eva", "r": 8, "alpha": 16}]},
    baseline={"methods": [{"use": "param/lora", "r": 8, "alpha": 16}]},
    metric="bits_per_byte/code",
    better="lower",
    margin=0.01,
    tune={"optim.lr": [3e-3, 1e-2, 3e-2]},
    tune_baseline={"optim.lr": [3e-3, 1e-2, 3e-2]},
    scale="12 M to 70 B parameters; language, vision and control",
)
