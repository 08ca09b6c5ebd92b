"""How many floating-point operations the work of a run takes, counted once for each shape.

Counted by torch's own formulas: matrix products, convolutions and attention, two operations for each multiply-add. As
there, elementwise work (norms, activations, a scan written out in PyTorch) counts nothing, attention counts its masked
half too, and a fused attention's backward counts the scores it computes again (5 products where plain attention has 4).
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils.flop_counter import (
    addmm_flop,
    baddbmm_flop,
    flop_registry,
    sdpa_backward_flop,
    sdpa_flop,
    shape_wrapper,
)

T = TypeVar("T")

# The kinds of work a run's ledger keeps apart.
KINDS = ("train", "select", "begin", "rollout", "generate", "eval", "optimizer", "other")


class FlopMeter:
    """A ledger of operations by kind of work.

    A piece of work is counted the first time its kind and key are seen, which takes some time, and looked up ever
    after, which takes none. The key must name everything that sets the amount of work: shapes above all.
    """

    def __init__(self) -> None:
        self.known: dict[str, int] = {}  # by kind and key, as text
        self.totals: Counter[str] = Counter()
        self.within = 0  # pieces of work that are being counted now, one in another

    def count(self, kind: str, key: Hashable, fn: Callable[[], T]) -> tuple[T, int]:
        """Run `fn`; returns its result and its operations, which are also added to the ledger under `kind`.

        Work within other work is the other's: a gradient that `begin` takes enters the ledger once.
        """
        name = f"{kind} {key}"
        flops = self.known.get(name)
        self.within += 1
        try:
            if flops is None:
                result, flops = count(fn)
                self.known[name] = flops
            else:
                result = fn()
        finally:
            self.within -= 1
        if not self.within:
            self.totals[kind] += flops
        return result, flops

    def add(self, kind: str, flops: int) -> None:
        """Enter work whose operations are known from elsewhere."""
        self.totals[kind] += int(flops)

    @property
    def total(self) -> int:
        return sum(self.totals.values())

    def state(self) -> dict[str, dict[str, int]]:
        """The ledger as JSON, with what each shape costs, so that a resumed run counts as the whole one does."""
        return {"totals": dict(self.totals), "known": dict(self.known)}

    def load(self, state: dict[str, dict[str, int]]) -> None:
        self.totals, self.known = Counter(state["totals"]), dict(state["known"])


def count(fn: Callable[[], T]) -> tuple[T, int]:
    """Run `fn` and count: (its result, operations forward and backward). Computes what `fn` alone computes, to the bit.

    The formulas are those of torch's `FlopCounterMode`, but not its mode: that one takes operators apart which have a
    kernel of their own (SiLU's backward for one), so a counted step would end in other bits than an uncounted one.
    """
    with _Counter() as counter:
        result = fn()
    return result, counter.flops


def counting() -> bool:
    """Whether work is being counted just now. Nothing can be compiled then: torch would leave what it meets alone for good."""
    return any(isinstance(mode, _Counter) for mode in _get_current_dispatch_mode_stack())


def uncounted() -> contextlib.AbstractContextManager[Any]:
    """Work within `count` that is not counted, as an optimizer's step never is."""
    made: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return made


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self.formulas = {**flop_registry, **_missed()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload) and _made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += int(formula(*args, **kwargs, out_val=out))
        return out


@functools.cache
def _made_of_others(func: Any) -> bool:
    """Whether an operator has no kernel of its own and so would be taken apart anyway (`linear` in inference mode)."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    name = func.name()
    return has(name, "CompositeImplicitAutograd") and not has(name, "CPU") and not has(name, "CUDA")


@functools.cache
def _missed() -> dict[Any, Callable[..., int]]:
    """Formulas, from shapes, for operators that torch's counter takes for free; those it has learned stay its own.

    On a CPU that is attention and its backward. Products that add in place serve the gradient of the output matrix,
    grouped products the experts of a mixture.
    """
    formulas = {
        "_scaled_dot_product_flash_attention_for_cpu": sdpa_flop,
        "_scaled_dot_product_flash_attention_for_cpu_backward": sdpa_backward_flop,
        "_scaled_dot_product_fused_attention_overrideable": sdpa_flop,
        "_scaled_dot_product_fused_attention_overrideable_backward": sdpa_backward_flop,
        "addmm_": addmm_flop,
        "baddbmm_": baddbmm_flop,
        "mv": _mv_flop,
        "_grouped_mm": _grouped_flop,
    }
    found: dict[Any, Callable[..., int]] = {}
    for name, formula in formulas.items():
        operator = getattr(torch.ops.aten, name, None)
        if operator is not None and operator not in flop_registry:
            own: Any = functools.partial(formula)  # a partial takes an attribute and leaves torch's formula without it
            own._get_raw = not formula.__name__.startswith("_")  # torch's turn tensors into shapes themselves
            found[operator] = own
    return found


@shape_wrapper
def _mv_flop(a_shape: Any, b_shape: Any, **_: Any) -> int:
    return 2 * math.prod(a_shape)


@shape_wrapper
def _grouped_flop(a_shape: Any, b_shape: Any, *_: Any, **__: Any) -> int:
    """A product for each group. Where the groups share out one dimension of `a`, they come to one product together."""
    rows = math.prod(a_shape)  # of a, or of every matrix in it
    return 2 * rows * b_shape[-1]


def measured_peak(device: torch.device | str, dtype: torch.dtype = torch.float32, *, seconds: float = 0.15) -> float:
    """FLOP/s of a large square matrix product here and now, on as many threads as torch may use.

    The best of repeated products within about `seconds`: what a share of the peak is measured against, rather than a
    figure from a data sheet.
    """
    device = torch.device(device)
    size = 4096 if device.type == "cuda" else 768
    one, other = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    out = one @ other  # warm
    wait()
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        torch.mm(one, other, out=out)
        wait()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > stop:
            return 2 * size**3 / best
