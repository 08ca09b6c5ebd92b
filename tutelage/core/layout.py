"""What each axis of each weight counts, found by sending numbers through the model instead of reading its source.

The model is built without memory for its weights. Every linear layer answers with a number for each of its outputs; where
they arrive in attention says which head each output feeds, however the model fuses and interleaves them. The numbers that
attention answers with say the same of the layer that reads it. One token at position 0 is sent, which rotary embedding
leaves as it is. Which axes count the neurons of a block shows when these are made one more.
"""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tutelage.base.errors import UserError
from tutelage.core.anatomy import Anatomy, anatomy
from tutelage.core.types import Axis, Layout

INNER = ("intermediate_size", "n_inner", "d_ff", "ffn_dim")  # keys of the number of neurons
Part = tuple[int, int]  # unit, part of it


def layout(config: dict[str, Any]) -> Layout:
    """The layout of the model of a `config.json`. Raises `UserError` for a model that it cannot see through."""
    model = outline(config)
    parts = anatomy(model)
    key = next((key for key in INNER if key in config), None)
    if key is None or not parts.hidden:
        raise UserError(f"{config['model_type']}: the configuration gives no {INNER[0]} or no hidden size")
    inner = config[key] or 4 * parts.hidden
    more = outline({**config, key: inner + 1}).state_dict()
    seen = Trace(model, parts)
    seen.run()
    if not seen.heads_out:
        raise UserError(f"{config['model_type']}: no attention with heads was seen; its width cannot be told apart")
    axes: dict[str, tuple[Axis, ...]] = {}
    files = saved_names(model)
    for name, value in model.state_dict().items():
        grown = [more[name].shape[i] - n for i, n in enumerate(value.shape)]
        axes[files[name]] = tuple(
            neurons(n, inner, grown[i], read=reads(name, i, model, parts))
            if grown[i]
            else place(name, i, n, model=model, parts=parts, seen=seen)
            for i, n in enumerate(value.shape)
        )
    first = parts.embeddings[0] if parts.embeddings else None
    tied = any({f"{parts.head}.weight", f"{first}.weight"} <= set(group) for group in parts.tied)
    owners = {name: name.rpartition(".")[0] for name in files}
    return Layout(
        axes=axes,
        sizes={"hidden": parts.hidden, "mlp": inner, "heads": seen.units},
        blocks=frozenset(
            files[name].partition(".0.")[0]
            for name in files
            if any(name.startswith(f"{stack.name}.0.") for stack in parts.stacks)
        ),
        norms=frozenset(files[name] for name in files if owners[name] in parts.norms),
        tied=tied,
        before_head=tuple(files[name] for name in files if owners[name] == seen.before_head),
    )


def per_token(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the weights with a row for each token of the vocabulary; of tied ones a file holds but one.

    Raises `UserError` for a configuration without `vocab_size`.
    """
    if not isinstance(config.get("vocab_size"), int):
        raise UserError(f"{config.get('model_type')}: the configuration gives no vocab_size")
    model, more = outline(config), outline({**config, "vocab_size": config["vocab_size"] + 1}).state_dict()
    files = saved_names(model)
    return tuple(files[n] for n, t in model.state_dict().items() if t.ndim and more[n].shape[0] > t.shape[0])


def saved_names(model: nn.Module) -> dict[str, str]:
    """The name in files of every entry of the state dict: transformers saves some under a name of an older version."""
    from transformers.core_model_loading import revert_weight_conversion

    names = list(model.state_dict())
    saved = revert_weight_conversion(model, {name: torch.tensor([i]) for i, name in enumerate(names)})
    back = {names[int(mark[0])]: name for name, mark in saved.items() if mark.numel() == 1}
    if len(back) < len(names):
        raise UserError(f"{type(model).__name__}: its weights are saved joined or parted, and are not understood so")
    return back


def outline(config: dict[str, Any]) -> nn.Module:
    """The transformers model of a configuration, its weights without memory, its buffers real."""
    from transformers import AutoConfig

    cls = class_of(config)
    made = AutoConfig.for_model(**config)
    made.dtype = torch.float32
    try:
        with weightless():
            return cls._from_config(made, attn_implementation="sdpa").eval()
    except ValueError as error:
        raise UserError(f"{cls.__name__}: {str(error).splitlines()[0].split('. Please')[0]}") from None


def open_whole(folder: Path) -> nn.Module:
    """The transformers model of a folder in float32, in evaluation mode."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return class_of(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def class_of(config: dict[str, Any]) -> Any:
    import transformers

    names = config.get("architectures") or ["(architectures is empty)"]
    cls = getattr(transformers, names[0], None)
    if cls is None or "model_type" not in config:
        raise UserError(f"config.json: transformers has no class {names[0]}")
    return cls


@contextlib.contextmanager
def weightless() -> Iterator[None]:
    """Parameters of modules made here take no memory."""
    register = nn.Module.register_parameter

    def shed(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(self, name, parameter)

    nn.Module.register_parameter = shed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Trace(TorchFunctionMode):
    """One token through the model, every linear layer answering with numbers that no other answers with."""

    def __init__(self, model: nn.Module, parts: Anatomy) -> None:
        super().__init__()
        self.model, self.parts = model, parts
        self.begins: list[int] = []  # for each answer of a linear layer, its first number
        self.owners: list[str] = []  # and that layer
        self.next = 1
        self.answered: Tensor | None = None  # by the last attention
        self.stood: list[Part] = []  # for what each of its numbers stands
        self.heads_out: dict[str, dict[int, Part]] = {}  # linear layer -> place among its outputs -> unit, part
        self.heads_in: dict[str, list[Part]] = {}
        self.units = 0
        self.last: str | None = None
        self.before_head: str | None = None

    def run(self) -> None:
        parts = self.parts
        for name in parts.linears:
            self._answer(name, self._linear)
        for name in parts.norms:
            self._answer(name, self._norm)
        for name in parts.embeddings:
            self._answer(name, self._embedding)
        if parts.head is not None:
            self._answer(parts.head, self._head)
        try:
            with torch.no_grad(), self:
                self.model(input_ids=torch.zeros(1, 1, dtype=torch.long))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            kind = type(parts.root).__name__
            raise UserError(f"{kind}: its layout cannot be seen: {str(error).splitlines()[0]}") from None

    def _answer(self, name: str, how: Any) -> None:
        module = self.model.get_submodule(name)
        module.forward = lambda x, *rest, **more: how(name, module, x)

    def _linear(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        if self.answered is not None and x.numel() == self.answered.numel() and name not in self.heads_in:
            sent = {int(v): i for i, v in enumerate(self.answered.tolist())}
            found = [sent.get(int(v)) for v in x.flatten().tolist()]
            if None not in found:
                self.heads_in[name] = [self.stood[i] for i in found if i is not None]
                self.answered = None
        count = width(module)[0]
        self.begins.append(self.next)
        self.owners.append(name)
        self.next += count
        self.last = name
        if self.next > 1 << 24:  # whole numbers end here in float32
            raise UserError(f"{type(self.parts.root).__name__}: too large to see its layout")
        return torch.arange(self.begins[-1], self.next, dtype=torch.float32).expand(*x.shape[:-1], count)

    def _norm(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        self.last = name
        return x

    def _embedding(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape, int(module.embedding_dim))  # type: ignore[arg-type]

    def _head(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        self.before_head = self.last
        return torch.zeros(*x.shape[:-1], width(module)[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            return self._attention(*(given[name] for name in names))
        return func(*args, **(kwargs or {}))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v: 1 × heads × 1 × size, holding the numbers of the outputs that they were made of."""
        q_HD, k_HD, v_HD = (t[0, :, -1].tolist() for t in (q, k, v))
        size, shared = len(q_HD[0]), len(q_HD) // len(k_HD)
        order = list(dict.fromkeys(int(row[0]) for row in k_HD))  # a key head may stand here repeated
        unit = [order.index(int(row[0])) for row in k_HD for _ in range(shared)]
        turn = [unit[:h].count(u) for h, u in enumerate(unit)]  # of a query head among those of its key head
        group = max(turn) + 1
        self.units = len(order)
        for h, row in enumerate(q_HD):
            self._feeds(row, unit[h], turn[h] * size)
        for h in range(0, len(unit), shared):
            self._feeds(k_HD[h // shared], unit[h], group * size)
            self._feeds(v_HD[h // shared], unit[h], (group + 1) * size)
        self.stood = [(unit[h], turn[h] * size + d) for h in range(len(unit)) for d in range(size)]
        self.answered = -torch.arange(1, len(self.stood) + 1, dtype=torch.float32)
        return self.answered.view(1, len(unit), 1, size)

    def _feeds(self, row: list[float], unit: int, part: int) -> None:
        for d, number in enumerate(row):
            if number != int(number) or not 0 < number < self.next:
                raise UserError(f"{type(self.parts.root).__name__}: attention reads what no linear layer gives alone")
            at = bisect_right(self.begins, number) - 1
            self.heads_out.setdefault(self.owners[at], {})[int(number) - self.begins[at]] = (unit, part + d)


def width(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer, also of one whose weight is stored the other way round."""
    rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
    return (int(rows), int(columns)) if isinstance(module, nn.Linear) else (int(columns), int(rows))


def reads(name: str, axis: int, model: nn.Module, parts: Anatomy) -> bool:
    """Whether an axis of a weight is summed over: the inputs of a linear layer or of a head that is one of its own."""
    owner, _, key = name.rpartition(".")
    if key != "weight" or (owner not in parts.linears and owner != parts.head):
        return False
    if parts.canonical.get(name, name).rpartition(".")[0] in parts.embeddings:
        return False  # a tied head is an embedding
    return axis == (1 if isinstance(model.get_submodule(owner), nn.Linear) else 0)


def neurons(n: int, inner: int, runs: int, *, read: bool) -> Axis:
    """An axis that counts neurons, in `runs` runs one after the other (gate and up in one weight are two)."""
    at = torch.arange(n)
    if n != inner * runs:
        raise UserError(f"an axis of {n} grows by {runs} with each of {inner} neurons; its order cannot be told")
    return Axis("mlp", at % inner, at // inner, read)


def place(name: str, axis: int, n: int, *, model: nn.Module, parts: Anatomy, seen: Trace) -> Axis:
    """An axis that counts parts of heads, channels, or something that no width changes."""
    owner, _, _ = name.rpartition(".")
    read = reads(name, axis, model, parts)
    heads: list[Part] | None = None
    if owner in parts.linears:
        if read:
            heads = seen.heads_in.get(owner)
        elif owner in seen.heads_out:
            fed = seen.heads_out[owner]
            if len(fed) != n:
                raise UserError(f"{owner}: attention reads {len(fed)} of its {n} outputs; their order cannot be told")
            heads = [fed[i] for i in range(n)]
    if heads is not None:
        unit_N, part_N = torch.tensor(heads).T
        return Axis("heads", unit_N.contiguous(), part_N.contiguous(), read)
    known = owner in parts.linears or owner in parts.norms or owner in parts.embeddings or owner == parts.head
    counts_rows = (owner in parts.embeddings or owner == parts.head) and axis == 0
    hidden = known and n == parts.hidden and not counts_rows
    at = torch.arange(n)
    return Axis("hidden" if hidden else "", at, torch.zeros_like(at), read)
