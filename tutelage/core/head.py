"""The way from a last hidden state to a model's own logits, whatever the model does in between.

The model's own `forward` is run with its backbone answering what it is told: no class of model needs code here.

Shape letters: N positions, D hidden width, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tutelage.core import flops


class Head:
    """From hidden states to the model's own logits; made by `forward`.

    `like` is what the backbone returned, `logits` those of one position, in whose graph the head's parameters lie.
    """

    def __init__(self, owner: nn.Module, backbone: nn.Module, layer: nn.Module, *, like: Any, logits: Tensor):
        self.owner, self.backbone, self.vocab = owner, backbone, logits.shape[-1]
        self._layer = layer  # the output embeddings
        self._like = type(like)
        self._node = logits.grad_fn
        self._device = logits.device.type
        self._autocast = _autocast_state(self._device)  # hooks may ask for logits outside of the engine's context

    def __call__(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], differentiable, in the model's own precision."""
        hidden_1ND = hidden_ND.unsqueeze(0)
        answer = (hidden_1ND,) if issubclass(self._like, tuple) else self._like(last_hidden_state=hidden_1ND)
        names = _signature(type(self.owner).forward)
        kwargs = plain_call(self.owner)
        if "output_router_logits" in names:
            kwargs["output_router_logits"] = False
        if "encoder_outputs" in names:  # else the encoder would run
            kwargs["encoder_outputs"] = _encoded_type()(last_hidden_state=hidden_1ND[:, :1].detach())
        if "input_ids" in names and names["input_ids"].default is inspect.Parameter.empty:
            kwargs["input_ids"] = torch.zeros(hidden_1ND.shape[:2], dtype=torch.long, device=hidden_ND.device)
        with answering(self.backbone, lambda *_, **__: answer):
            if _autocast_state(self._device) == self._autocast:
                return call(self.owner)(**kwargs).logits.squeeze(0)
            enabled, dtype = self._autocast
            with torch.autocast(self._device, dtype=dtype, enabled=enabled):
                return call(self.owner)(**kwargs).logits.squeeze(0)

    @functools.cached_property
    def leaves(self) -> list[Tensor]:
        """The trainable parameters between hidden states and logits."""
        return leaves_of(self._node)

    @contextmanager
    def collecting(self) -> Iterator[dict[Tensor, Tensor]]:
        """While it lasts, the gradient of the output matrix is added up in place: {weight: its running sum}.

        Autograd would make a matrix of the vocabulary's size for each chunk, which costs as much time as memory. Empty
        where the output layer is anything but a plain one in float32; its gradient then takes autograd's way.
        """
        layer = self._layer
        plain = type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks)
        plain = plain and not (layer._backward_hooks or layer._backward_pre_hooks or layer._compiled_call_impl)
        if not plain or not layer.weight.requires_grad or self._autocast[0] or layer.weight.dtype != torch.float32:
            yield {}
            return
        assert isinstance(layer, nn.Linear)
        into = torch.zeros_like(layer.weight, memory_format=torch.contiguous_format)

        def linear(x: Tensor) -> Tensor:
            y = _Linear.apply(x, layer.weight, into)
            return y if layer.bias is None else y + layer.bias

        with answering(layer, linear):
            yield {layer.weight: into}

    @functools.cached_property
    def sharded(self) -> bool:
        from torch.distributed.tensor import DTensor

        return any(isinstance(parameter, DTensor) for parameter in self.owner.parameters())


class _Linear(torch.autograd.Function):
    """A product with a matrix whose gradient goes straight into a running sum instead of back to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, into_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_VD)
        ctx.into_VD = into_VD
        return F.linear(x, weight_VD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight_VD = ctx.saved_tensors
        ctx.into_VD.addmm_(grad.flatten(0, -2).t(), x.flatten(0, -2))
        return (grad @ weight_VD if ctx.needs_input_grad[0] else None), None, None


def _autocast_state(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def leaves_of(node: Any) -> list[Tensor]:
    """The leaf tensors a graph ends in, in a fixed order."""
    found, seen, stack = [], set(), [node] if node is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        stack += [following for following, _ in node.next_functions if following is not None]
    return found


@contextmanager
def answering(module: nn.Module, answer: Callable[..., Any]) -> Iterator[None]:
    """Let calls of one module be answered by a function, hooks and compiled code left out.

    `nn.Module.__call__` looks here first, for the sake of `module.compile()`; setting `forward` instead would be
    traced into compiled code and would run the module's hooks on answers that are none of its own.
    """
    own = vars(module)
    before = own.get("_compiled_call_impl")
    own["_compiled_call_impl"] = answer
    try:
        yield
    finally:
        if before is None:
            del own["_compiled_call_impl"]
        else:
            own["_compiled_call_impl"] = before


def call(module: nn.Module, *, compiled: bool = False) -> Callable[..., Any]:
    """A module's call with its hooks; a model compiled as a whole runs as written, since it must meet our answers.

    `compiled`: as compiled, if it is; while operations are counted, as written.
    """
    whole = vars(module).get("_compiled_call_impl")
    if whole is None:
        return module if not compiled else module._call_impl
    return whole if compiled and not flops.counting() else module._call_impl


@functools.cache
def _signature(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(forward).parameters)


@functools.cache
def _encoded_type() -> type:
    from transformers.modeling_outputs import BaseModelOutput

    return type("Encoded", (BaseModelOutput,), {"router_logits": None})  # which mixtures of experts ask for


def plain_call(model: nn.Module) -> dict[str, Any]:
    """What a transformers model is asked for besides its inputs: no cache, and outputs by name."""
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in _signature(type(model).forward) else {}
    if getattr(getattr(model, "config", None), "return_dict", True) is not True:
        kwargs["return_dict"] = True
    return kwargs
