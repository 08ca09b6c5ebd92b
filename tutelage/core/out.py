"""What a model's call returns: the last hidden state, and the model's own logits chunk by chunk, never whole.

Scaling, soft-caps, biases, a masked model's transform: all that a model does between its last hidden state and its
logits is done by the model's own `forward`, run once more for each chunk with the backbone answering what it is told.
So no class of model needs code here.

    out = forward(model, inputs, anatomy=anatomy(model))
    loss = cross_entropy(out, labels_BT)                          # Sum(total, weight), differentiable
    total = out.reduce(fn, labels_BT, keep=labels_BT != IGNORE)   # any sum over positions

Compile `anatomy.backbone`, not the whole model: the head is called with a different number of positions every time.

Shape letters: B rows, T positions, N positions of a chunk, D hidden width, V vocabulary, S positions of an encoder.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tutelage.base.errors import UserError
from tutelage.core.anatomy import Anatomy
from tutelage.core.head import Head, answering, call, leaves_of, plain_call
from tutelage.core.types import IGNORE, Sum

# Most numbers one chunk of logits may hold. In float32 a chunk takes four times as many bytes, and computing a
# gradient about four such tensors at once. A constant, so that equal shapes give equal bits.
CHUNK = {"cpu": 2**24, "cuda": 2**26}
_CLONE = 2**20  # gradients below this size are copied rather than checked for sharing memory


@dataclass(eq=False)
class Out:
    """A model's answer to one batch. `hidden_BTD` is the last hidden state, the decoder's where there are two."""

    hidden_BTD: Tensor
    head: Head | None  # None: the model writes no tokens
    hidden_states: tuple[Tensor, ...] | None = None  # of every block, if `needs` asked for "hidden"
    attentions: tuple[Tensor, ...] | None = None  # [B, heads, T, T] of every block, if asked for "attentions"
    encoder_BSD: Tensor | None = None
    extra_loss: Tensor | None = None  # a mean, already times its own coefficient (routers of mixtures of experts)
    raw: Any = field(default=None, repr=False)  # the model's own output, of models without a token head

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T): what aligned tensors must begin with."""
        return self.hidden_BTD.shape[0], self.hidden_BTD.shape[1]

    def reduce(
        self,
        fn: Callable[..., Tensor],
        *aligned: Tensor | Out,
        keep: Tensor | None = None,
        budget: int | None = None,
        recompute: bool = False,
    ) -> Tensor:
        """Sum over chunks of `fn(logits_NV, *aligned_N…)`, a scalar or a small 1-D tensor of sums.

        `aligned` are tensors [B, T, …], cut like the positions, or other `Out`s of the same shape, which give their
        logits for the same positions without gradient. `keep`, a mask [B, T] or the flat numbers [K] of positions
        (ascending), drops positions before the head is run. `budget` is the most numbers in a chunk of logits.

        Differentiable with respect to the hidden states, the head, and whatever trainable tensors `aligned` or `fn`
        bring. With many chunks the gradients of a scalar are computed on the way forward and only scaled on the way
        back, so backward may run once; `recompute=True` runs each chunk's forward again instead, for a second
        backward or for gradients of gradients. It is chosen by itself for vectors, for trainable tensors that `fn`
        closes over, and for sharded parameters.
        """
        hidden_ND, parts, _ = self._flat(aligned, keep)
        bounds = self._bounds(len(hidden_ND), budget)

        def chunk(hidden_ND: Tensor, *cut: Tensor) -> Tensor:
            return fn(self._head(hidden_ND), *cut)

        if len(bounds) == 1:
            return chunk(hidden_ND, *(_cut(part, 0, len(hidden_ND)) for part in parts))
        carried = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
        trains = torch.is_grad_enabled() and (hidden_ND.requires_grad or carried or self._head.leaves)
        if trains and not recompute and not self._head.sharded:
            try:
                return _Reduce.apply(_Work(self._head, chunk, bounds, parts), hidden_ND, *self._head.leaves, *carried)
            except _Unfit:
                pass
        run = functools.partial(checkpoint, chunk, use_reentrant=False) if trains else chunk
        total = None
        for start, stop in bounds:
            value = run(hidden_ND[start:stop], *(_cut(part, start, stop) for part in parts))
            total = value if total is None else total + value
        assert total is not None
        return total

    def chunks(
        self, *aligned: Tensor | Out, keep: Tensor | None = None, budget: int | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """(logits_NV, *aligned_N…) chunk by chunk, logits recomputed in backward.

        What the caller's own operations on the logits save for backward stays until then: sum with `reduce`, or get
        numbers of single positions from `each`, where memory matters.
        """
        hidden_ND, parts, _ = self._flat(aligned, keep)
        bounds = self._bounds(len(hidden_ND), budget)
        again = torch.is_grad_enabled() and len(bounds) > 1
        for start, stop in bounds:
            hidden = hidden_ND[start:stop]
            logits = checkpoint(self._head, hidden, use_reentrant=False) if again else self._head(hidden)
            yield logits, *(_cut(part, start, stop) for part in parts)

    def each(
        self,
        fn: Callable[..., Tensor],
        *aligned: Tensor | Out,
        keep: Tensor | None = None,
        budget: int | None = None,
    ) -> Tensor:
        """`fn(logits_NV, *aligned_N…) -> [N, …]` put back in place: [B, T, …], zero at positions not kept.

        Differentiable; each chunk is recomputed in backward. Arguments as in `reduce`.
        """
        hidden_ND, parts, index = self._flat(aligned, keep)
        bounds = self._bounds(len(hidden_ND), budget)

        def chunk(hidden_ND: Tensor, *cut: Tensor) -> Tensor:
            return fn(self._head(hidden_ND), *cut)

        again = torch.is_grad_enabled() and len(bounds) > 1
        run = functools.partial(checkpoint, chunk, use_reentrant=False) if again else chunk
        values = [run(hidden_ND[i:j], *(_cut(part, i, j) for part in parts)) for i, j in bounds]
        value_N = values[0] if len(values) == 1 else torch.cat(values)
        rows, length = self.shape
        if index is not None:
            value_N = value_N.new_zeros(rows * length, *value_N.shape[1:]).index_copy(0, index, value_N)
        return value_N.view(rows, length, *value_N.shape[1:])

    @property
    def _head(self) -> Head:
        if self.head is None:
            raise UserError("this model has no token head, so it has no logits to take a loss on; see `Out.raw`")
        return self.head

    def _bounds(self, count: int, budget: int | None) -> list[tuple[int, int]]:
        """Chunks of nearly equal size; a single empty one when no position counts."""
        if budget is None:
            budget = CHUNK["cpu"] if self.hidden_BTD.device.type == "cpu" else CHUNK["cuda"]
        pieces = max(1, -(-count // max(1, budget // self._head.vocab)))
        size = max(1, -(-count // pieces))
        return [(i, min(i + size, count)) for i in range(0, count, size)] or [(0, 0)]

    def _flat(
        self, aligned: tuple[Tensor | Out, ...], keep: Tensor | None
    ) -> tuple[Tensor, list[Tensor | tuple[Head, Tensor]], Tensor | None]:
        """Kept positions in one line: hidden states, aligned parts, and their numbers (None: all)."""
        count = self.shape[0] * self.shape[1]
        index = keep
        if keep is not None and keep.dtype == torch.bool:
            assert tuple(keep.shape) == self.shape, f"keep {tuple(keep.shape)} does not fit {self.shape}"
            index = keep.flatten().nonzero().flatten()
        if index is not None and len(index) == count:
            index = None

        def line(value_BT: Tensor) -> Tensor:
            assert tuple(value_BT.shape[:2]) == self.shape, f"{tuple(value_BT.shape)} does not fit {self.shape}"
            flat = value_BT.flatten(0, 1)
            return flat if index is None else flat.index_select(0, index.to(flat.device))

        parts = [(a._head, line(a.hidden_BTD).detach()) if isinstance(a, Out) else line(a) for a in aligned]
        return line(self.hidden_BTD), parts, index


def forward(model: nn.Module, inputs: dict[str, Any], *, anatomy: Anatomy, needs: frozenset[str] = frozenset()) -> Out:
    """Run a model up to its last hidden state.

    `inputs` are keyword arguments of the model's own forward, without labels; `needs` may hold "hidden" (every
    block's output) and "attentions". The model's whole forward runs, wrappers and hooks included; only its head sees
    one position, from which the logits' parameters are learned. Raises `UserError` if attentions cannot be had.
    """
    assert "labels" not in inputs, "labels belong to the loss, not to the model's call"
    kwargs = {**inputs, **plain_call(anatomy.root), **{_NEEDS[need]: True for need in needs}}
    injected = _router_mask(kwargs, anatomy)
    seen: list[Any] = []
    real = call(anatomy.backbone, compiled=True)
    cut = anatomy.owner is not anatomy.backbone and anatomy.kind != "other"

    def record(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **{**kwargs, **injected})
        seen.append(output)
        if not cut:
            return output
        one = _hidden(output)[:1, :1].detach()
        return (one, *output[1:]) if isinstance(output, tuple) else type(output)(**{**output, "last_hidden_state": one})

    if model is anatomy.backbone:
        result = record(**kwargs)
    else:
        with answering(anatomy.backbone, record):
            result = call(model)(**kwargs)
    assert len(seen) == 1, f"the backbone ran {len(seen)} times in one call"
    output = seen[0]
    head = None
    if cut:
        assert anatomy.head_module is not None, "a model without a head is of the other kind"
        head = Head(anatomy.owner, anatomy.backbone, anatomy.head_module, like=output, logits=result.logits)
    return Out(
        hidden_BTD=_hidden(output),
        head=head,
        hidden_states=_first(output, "hidden_states", "decoder_hidden_states") if "hidden" in needs else None,
        attentions=_attentions(output) if "attentions" in needs else None,
        encoder_BSD=_first(result, "encoder_last_hidden_state"),
        extra_loss=_extra(result, anatomy.root.config),
        raw=result if not cut else None,
    )


def cross_entropy(out: Out, labels_BT: Tensor, weight_BT: Tensor | None = None, *, budget: int | None = None) -> Sum:
    """Summed cross-entropy in nats over labels other than `IGNORE`, each times its weight; float32 inside.

    The weight of the sum is the number of labels that count, or the sum of their weights.
    """
    keep = labels_BT != IGNORE
    if weight_BT is not None:
        keep = keep & (weight_BT != 0)
    index = keep.flatten().nonzero().flatten()
    if weight_BT is None:
        total = out.reduce(_sum_of_nll, labels_BT, keep=index, budget=budget)
        return Sum(total, float(len(index)))
    total = out.reduce(_weighted_nll, labels_BT, weight_BT, keep=index, budget=budget)
    return Sum(total, weight_BT.flatten().index_select(0, index).float().sum())


def token_logprob(out: Out, labels_BT: Tensor, *, budget: int | None = None) -> Tensor:
    """Log-probability in nats of each label, float32 [B, T], differentiable; zero where the label is `IGNORE`."""
    return out.each(_logprob, labels_BT, keep=labels_BT != IGNORE, budget=budget)


@torch.no_grad()
def token_nll(out: Out, labels_BT: Tensor, *, budget: int | None = None) -> Tensor:
    """Negative log-likelihood in nats of each label, float32 [B, T], no gradient; zero where the label is `IGNORE`."""
    return -token_logprob(out, labels_BT, budget=budget)


def kl(
    out: Out,
    ref: Out,
    *,
    keep: Tensor | None = None,
    weight_BT: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
    budget: int | None = None,
) -> Sum:
    """Summed KL divergence in nats from `ref` to `out`: Σ p_ref (log p_ref − log p_out), or with `reverse` the other.

    Differentiable with respect to `out`. Both are taken at `temperature`; the usual factor temperature² is the
    caller's. The weight is the number of positions kept, or the sum of their weights.
    """
    keep = _compared("KL", out, ref, keep)

    def divergence(logits_NV: Tensor, ref_NV: Tensor, *weight_N: Tensor) -> Tensor:
        ours = F.log_softmax(logits_NV.float() / temperature, dim=-1)
        theirs = F.log_softmax(ref_NV.float() / temperature, dim=-1)
        one, other = (theirs, ours) if reverse else (ours, theirs)
        if not weight_N:
            return F.kl_div(one, other, reduction="sum", log_target=True)
        return (F.kl_div(one, other, reduction="none", log_target=True).sum(-1) * weight_N[0]).sum()

    if weight_BT is None:
        count = len(keep) if keep is not None else out.shape[0] * out.shape[1]
        return Sum(out.reduce(divergence, ref, keep=keep, budget=budget), float(count))
    flat = weight_BT.flatten() if keep is None else weight_BT.flatten().index_select(0, keep)
    return Sum(out.reduce(divergence, ref, weight_BT, keep=keep, budget=budget), flat.float().sum())


def js(out: Out, ref: Out, *, keep: Tensor | None = None, budget: int | None = None) -> Sum:
    """Summed Jensen-Shannon divergence in nats (Lin 1991): (KL(p_out || m) + KL(p_ref || m)) / 2, m = (p_out + p_ref) / 2.

    Between 0 and log 2 at each position. Differentiable with respect to `out`; the weight is the number of positions kept.
    """
    keep = _compared("JS", out, ref, keep)

    def divergence(logits_NV: Tensor, ref_NV: Tensor) -> Tensor:
        ours, theirs = (F.log_softmax(logits.float(), dim=-1) for logits in (logits_NV, ref_NV))
        middle = torch.logaddexp(ours, theirs) - math.log(2.0)
        found = [F.kl_div(middle, one, reduction="sum", log_target=True) for one in (ours, theirs)]
        return 0.5 * (found[0] + found[1])

    count = len(keep) if keep is not None else out.shape[0] * out.shape[1]
    return Sum(out.reduce(divergence, ref, keep=keep, budget=budget), float(count))


def _compared(what: str, out: Out, ref: Out, keep: Tensor | None) -> Tensor | None:
    """The flat numbers of the positions that are kept, of two answers that can be compared."""
    if out.shape != ref.shape or out._head.vocab != ref._head.vocab:
        raise UserError(
            f"{what} compares like with like: the model answers {out.shape} positions over {out._head.vocab} tokens, "
            f"the reference {ref.shape} over {ref._head.vocab}"
        )
    return keep.flatten().nonzero().flatten() if keep is not None and keep.dtype == torch.bool else keep


def _sum_of_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum")


def _weighted_nll(logits_NV: Tensor, labels_N: Tensor, weight_N: Tensor) -> Tensor:
    return (F.cross_entropy(logits_NV.float(), labels_N, reduction="none") * weight_N).sum()


def _logprob(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return -F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


@dataclass(slots=True)
class _Work:
    """What `_Reduce` sums: a function of a chunk, where the chunks are, and what is cut alike."""

    head: Head
    chunk: Callable[..., Tensor]
    bounds: list[tuple[int, int]]
    parts: list[Tensor | tuple[Head, Tensor]]


class _Unfit(Exception):
    """The sum cannot have its gradient computed on the way forward."""


class _Reduce(torch.autograd.Function):
    """A scalar sum over chunks whose gradients are computed while its value is, so no chunk outlives its turn."""

    @staticmethod
    def forward(ctx: Any, work: _Work, hidden_ND: Tensor, *leaves: Tensor) -> Tensor:
        carried = {id(part): n for n, part in enumerate(work.parts) if isinstance(part, Tensor) and part.requires_grad}
        params = leaves[: len(leaves) - len(carried)]
        grads: list[Tensor | None] = [None] * (1 + len(leaves))
        total = None
        with work.head.collecting() as collected:
            for start, stop in work.bounds:
                hidden = hidden_ND[start:stop].detach().requires_grad_(ctx.needs_input_grad[1])
                cut = [_cut(part, start, stop) for part in work.parts]
                for n in carried.values():
                    cut[n] = cut[n].detach().requires_grad_()
                wanted = [hidden] * hidden.requires_grad + list(params) + [cut[n] for n in carried.values()]
                with torch.enable_grad():
                    value = work.chunk(hidden, *cut)
                if value.ndim:
                    raise _Unfit
                if total is None and not {id(leaf) for leaf in leaves_of(value.grad_fn)} <= {id(w) for w in wanted}:
                    raise _Unfit  # fn closes over something trainable
                total = value.detach().clone() if total is None else total.add_(value.detach())
                if not value.requires_grad:
                    continue
                found = list(torch.autograd.grad(value, wanted, allow_unused=True))
                del value, cut
                found = found if hidden.requires_grad else [None, *found]
                _place(grads, 0, found[0], hidden_ND, start, stop)
                for n, grad in enumerate(found[1 : 1 + len(params)], start=1):
                    grads[n] = _added(grads[n], grad)
                for n, grad in enumerate(found[1 + len(params) :], start=1 + len(params)):
                    _place(grads, n, grad, leaves[n - 1], start, stop)
                del found
        for n, leaf in enumerate(params, start=1):
            if leaf in collected:
                grads[n] = _added(collected[leaf], grads[n])
        ctx.grads = grads
        ctx.dtypes = [hidden_ND.dtype, *(leaf.dtype for leaf in leaves)]
        assert total is not None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place: a second copy of the head's gradient is too dear
        if grads is None:
            raise RuntimeError("the gradients of this sum were already taken; use reduce(..., recompute=True)")
        scaled = [None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return None, *scaled


def _place(grads: list[Tensor | None], n: int, grad: Tensor | None, like: Tensor, start: int, stop: int) -> None:
    """Put the gradient of a chunk's positions where they belong."""
    if grad is not None:
        if grads[n] is None:
            grads[n] = torch.zeros_like(like)
        grads[n][start:stop] = grad


def _added(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """A running sum owned by nobody else, in float32 at least."""
    if grad is None:
        return total
    if total is not None:
        return total.add_(grad)
    if grad.dtype in (torch.bfloat16, torch.float16):
        return grad.float()
    shared = grad.numel() < _CLONE or grad._base is not None or not grad.is_contiguous()
    return grad.clone(memory_format=torch.contiguous_format) if shared else grad


def _cut(part: Tensor | tuple[Head, Tensor], start: int, stop: int) -> Tensor:
    if isinstance(part, Tensor):
        return part[start:stop]
    head, hidden_ND = part
    with torch.no_grad():
        return head(hidden_ND[start:stop])


_NEEDS = {"hidden": "output_hidden_states", "attentions": "output_attentions"}


def _router_mask(kwargs: dict[str, Any], anatomy: Anatomy) -> dict[str, Any]:
    """Packed rows carry a mask that routers' losses cannot read: hand it to the backbone alone."""
    mask = kwargs.get("attention_mask")
    if mask is None or not getattr(anatomy.root.config, "output_router_logits", False):
        return {}
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return {}
    return {"attention_mask": kwargs.pop("attention_mask")}


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def _first(output: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(output, name, None)) is not None), None)


def _attentions(output: Any) -> tuple[Tensor, ...]:
    found = _first(output, "attentions", "decoder_attentions")
    if not found or any(value is None for value in found):
        raise UserError("this model's attention keeps no weights; load it with attn_implementation='eager'")
    return tuple(found)


def _extra(result: Any, config: Any) -> Tensor | None:
    """Losses the model makes of its own routers, times the coefficients of its configuration."""
    total = None
    for name, key in (("aux_loss", "router_aux_loss_coef"), ("z_loss", "router_z_loss_coef")):
        for side in ("", "encoder_", "decoder_"):
            value = getattr(result, side + name, None)
            if isinstance(value, Tensor):
                value = value * getattr(config, key, 0.0)
                total = value if total is None else total + value
    return total
