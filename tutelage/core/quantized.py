"""Frozen weights in four bits while a stage trains something else (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

The stage's linear layers in which nothing is trained hold their weights as NF4 or FP4 in blocks of 64, each block's
scale in eight bits (double quantization); products are computed in the stage's precision. Bitsandbytes packs and unpacks
the bits. The layer is written here because its own keeps what a checkpoint needs in copies, casts biases in place, packs
weights anew in evaluation on some CPUs (a resumed stage would end in other bits), and because bitsandbytes 0.50 unpacks
rows that are no multiple of 64 wide wrongly on CPUs with AVX-512: here it is always given the weights in one line.

A checkpoint holds the four bits, not what they stand for. What a stage leaves behind is made of the de-quantized
weights, not of those it opened: they are what the adapter was trained on and what was measured. (PEFT's merge also
de-quantizes, but rounds the sum to four bits again; the paper leaves the adapter beside the base.) So `adapter/` over
the same base in four bits answers like `model/`; over the base in full precision it answers a little differently.

Not here: a model opens in full precision on its device before it is quantized, so it must fit once.
"""

from __future__ import annotations

import importlib.util
import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tutelage.base.errors import UserError
from tutelage.base.spec import Stage

if TYPE_CHECKING:
    from tutelage.core.anatomy import Anatomy
    from tutelage.core.graph import Methods
    from tutelage.core.stage import Run

BLOCK, NESTED = 64, 256  # weights to a scale, scales to a scale of theirs: the paper's


class Linear4bit(nn.Linear):
    """A frozen linear layer (also transformers' Conv1D) with weights in four bits; gradients pass to its input.

    Its tensors are `weight` [⌈N/2⌉, 1] uint8, `scales` [⌈N/64⌉] uint8, `scales_of_scales` float32 and `offset` float32;
    `bias` stays as it was. The layer it stands for waits in `plain`, without its weights.
    """

    code: Tensor
    scales: Tensor
    scales_of_scales: Tensor
    scales_code: Tensor
    offset: Tensor

    def __init__(self, layer: Any, kind: str) -> None:
        from bitsandbytes.functional import quantize_4bit

        nn.Module.__init__(self)
        self.kind, self.dtype = kind, layer.weight.dtype
        self.turned = not isinstance(layer, nn.Linear)  # Conv1D keeps its weight transposed
        weight = layer.weight.detach()
        weight = weight.T.contiguous() if self.turned else weight
        self.out_features, self.in_features = weight.shape
        four, state = quantize_4bit(weight.flatten(), blocksize=BLOCK, compress_statistics=True, quant_type=kind)
        self.weight = nn.Parameter(four, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", state.absmax)
        self.register_buffer("scales_of_scales", state.state2.absmax)
        self.register_buffer("offset", state.offset)
        self.register_buffer("code", state.code, persistent=False)  # tables, the same for all
        self.register_buffer("scales_code", state.state2.code, persistent=False)
        layer.weight = nn.Parameter(torch.empty_like(layer.weight, device="meta"), requires_grad=False)
        self.plain = (layer,)  # a tuple, so that it is no part of the model

    @torch.no_grad()
    def whole(self, kind: torch.dtype) -> Tensor:
        """The weights that the four bits stand for, [out, in]."""
        from bitsandbytes.functional import QuantState, dequantize_4bit

        nested = QuantState(absmax=self.scales_of_scales, blocksize=NESTED, code=self.scales_code, dtype=torch.float32)
        state = QuantState(
            absmax=self.scales,
            shape=torch.Size([self.out_features * self.in_features]),
            dtype=kind,
            blocksize=BLOCK,
            code=self.code,
            quant_type=self.kind,
            offset=self.offset,
            state2=nested,
        )
        weight: Tensor = dequantize_4bit(self.weight, state)
        return weight.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] -> […, out], in the type that a plain layer would compute in."""
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        result: Tensor = _Product.apply(x.to(kind), self)
        return result if self.bias is None else result + self.bias.to(kind)

    def restored(self) -> nn.Module:
        """The plain layer, with the weights that the four bits stand for."""
        layer: Any = self.plain[0]
        weight = self.whole(self.dtype)
        layer.weight = nn.Parameter(weight.T.contiguous() if self.turned else weight, requires_grad=False)
        made: nn.Module = layer
        return made


class _Product(torch.autograd.Function):
    """x Wᵀ with W unpacked for the product alone, and once more for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.whole(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return grad @ ctx.layer.whole(grad.dtype), None


# -- a stage that asks for it -----------------------------------------------------------------------------------------


def check(name: str, stage: Stage, methods: Methods) -> None:
    """UserError for a stage that cannot have its weights in four bits."""
    if stage.engine.quantize is None:
        return
    place = f"stages.{name}.engine.quantize"
    if stage.until is None:
        raise UserError(f"{place}: only a stage that trains (`until`) holds weights in four bits")
    if stage.train is None and not methods.having("wrap"):
        raise UserError(
            f"{place}: weights in four bits cannot be trained; add param/lora to `methods`, or name in `train` what is"
        )
    for method in methods.having("penalty"):
        raise UserError(
            f"{place}: {method.name()} holds on to whole weights, which are in four bits here; leave one out"
        )


def check_library(stages: dict[str, Stage]) -> None:
    """UserError before anything is trained when bitsandbytes is not installed."""
    for name, stage in stages.items():
        if stage.engine.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"stages.{name}.engine.quantize: bitsandbytes is not installed; "
                "`pip install 'tutelage[quantize]'`, or take it out"
            )


def quantize(run: Run) -> None:
    """Put four bits in the place of every linear layer's weights in which nothing is trained, where a stage says so."""
    kind, model = run.node.stage.engine.quantize, run.engine.model
    if kind is None:
        return
    check_library({run.node.name: run.node.stage})
    names = chosen(model, run.engine.anatomy)
    if not names:
        raise UserError(
            f"stages.{run.node.name}.engine.quantize: every linear layer here is trained, and weights in four bits "
            "cannot be; add param/lora to `methods`, or name less in `train`"
        )
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Linear4bit(model.get_submodule(name), kind))


def chosen(model: nn.Module, parts: Anatomy) -> list[str]:
    """Names of the linear layers that are frozen, without the head and what transformers wants in full precision.

    A layer that shares its weights with another is left, and so is a class of its own, whose weights may be read
    elsewhere than in its call.
    """
    from transformers.pytorch_utils import Conv1D

    shared = {name for group in parts.tied for name in group}
    keep = getattr(parts.root, "_keep_in_fp32_modules", None) or ()  # T5's `wo`, whose weights' type is asked for
    found = []
    for name in parts.linears:
        layer = model.get_submodule(name)
        wanted = type(layer) in (nn.Linear, Conv1D) and not any(p.requires_grad for p in layer.parameters())
        path = name.split(".")
        if wanted and f"{name}.weight" not in shared and not any(re.fullmatch(k, part) for k in keep for part in path):
            found.append(name)
    return found


def restore(model: nn.Module) -> bool:
    """Put plain layers back in the place of quantized ones, on the CPU; whether there were any."""
    found = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    if found:
        model.to("cpu")
    for name in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, model.get_submodule(name).restored())
    return bool(found)


# -- for estimates ----------------------------------------------------------------------------------------------------


def sides(layer: Any) -> tuple[int, int]:
    """The two sizes of a linear layer's weight, whichever way round."""
    return (layer.out_features, layer.in_features) if isinstance(layer, Linear4bit) else tuple(layer.weight.shape)


def stand_in(layer: Linear4bit, *, dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A frozen plain layer of its shape, with contents of no meaning."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device=device, dtype=dtype)
    return made.requires_grad_(False)


def saved(model: nn.Module, parts: Anatomy, *, item: int) -> int:
    """Bytes that quantizing saves of a model (its shapes suffice) whose weights have `item` bytes each."""
    total = 0
    for name in chosen(model, parts):
        count = math.prod(sides(model.get_submodule(name)))
        scales = math.ceil(count / BLOCK)
        total += count * item - (math.ceil(count / 2) + scales + 4 * math.ceil(scales / NESTED))
    return total
