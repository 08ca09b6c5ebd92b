"""Low-rank additions to linear layers, as PEFT's own layers: what `param/lora` and its other beginnings share."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tutelage.base.method import Method
from tutelage.methods._kit import adapters

LABEL = "default"  # PEFT's name of a layer's one adapter


class Additions(Method):
    """Wraps linear layers with PEFT's. A method says with which values both factors begin, and may give each layer a rank."""

    r: int = Field(8, ge=1, description="rank of the addition")
    alpha: float = Field(16.0, description="the addition is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the addition's input")
    targets: list[str] | None = Field(
        None, description="patterns of layers to wrap, or their last names (q_proj); the blocks' linears when left out"
    )
    rslora: bool = Field(False, description="divide alpha by the root of r, so that high ranks learn as fast")

    def rank(self, name: str) -> int:
        """Of a layer's addition; 0 leaves the layer as it is."""
        return self.r

    def start(self, first: Tensor, second: Tensor, name: str, view: Any) -> None:
        """Fill the factors of a layer, [r, inputs] and [outputs, r] (zeros so far)."""
        raise NotImplementedError

    def wrap(self, layer: nn.Module, name: str, view: Any) -> nn.Module | None:
        from peft.tuners.lora.layer import dispatch_default

        if name not in self.chosen(view.engine.anatomy) or not self.rank(name):
            return None
        scale = {"r": self.rank(name), "lora_alpha": self.scaled(name)}
        wrapper: Any = dispatch_default(layer, LABEL, config=self.config(layer), **scale)
        with torch.no_grad():
            self.start(wrapper.lora_A[LABEL].weight, wrapper.lora_B[LABEL].weight, name, view)
        made: nn.Module = wrapper
        return made

    def scaled(self, name: str) -> float:
        """A layer's alpha: the same factor on all additions, whatever their ranks."""
        share = self.rank(name) / self.r
        return self.alpha if share == 1 else self.alpha * (share**0.5 if self.rslora else share)

    def chosen(self, anatomy: Any) -> set[str]:
        """Names of the layers to wrap."""
        if self.targets is not None:
            patterns = [p if set(p) & set("*?[.:") else f"*.{p}" for p in self.targets]
            return set(anatomy.match(patterns, names=anatomy.linears))
        return {name for name in anatomy.linears if anatomy.block_index(name) is not None}

    def config(self, layer: nn.Module) -> Any:
        from peft import LoraConfig

        made: Any = LoraConfig
        return made(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_rslora=self.rslora,
            fan_in_fan_out=not isinstance(layer, nn.Linear),  # Conv1D keeps its weight transposed
        )

    def trains(self, name: str) -> bool:
        return name.startswith(("lora_A.", "lora_B."))

    @torch.no_grad()
    def fold(self, module: Any) -> Tensor:
        """The layer's weight with the addition in it, in the layer's own layout."""
        weight: Tensor = module.get_base_layer().weight + module.get_delta_weight(LABEL)
        return weight

    def adapter(self, modules: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What PEFT reads: its configuration, and both factors of every wrapped layer under its names."""
        layer = next(iter(modules.values())).get_base_layer()
        config: dict[str, Any] = self.config(layer).to_dict()
        config["target_modules"] = sorted(modules)
        ranks = {name: self.rank(name) for name in sorted(modules) if self.rank(name) != self.r}
        config["rank_pattern"], config["alpha_pattern"] = ranks, {name: self.scaled(name) for name in ranks}
        config["inference_mode"] = True  # PEFT loads it frozen, ready to use
        tensors = {
            adapters.key(name, label): getattr(module, label)[LABEL].weight.detach()
            for name, module in modules.items()
            for label in ("lora_A", "lora_B")
        }
        return config, tensors
