"""The file of a new method: its hooks by axis, and gaps that the card's lint names until somebody fills them in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tutelage.base import card, registry
from tutelage.base.card import GAP
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.hooks import HOOKS
from tutelage.base.registry import AXES

HOUSE = Path("tutelage/methods")  # below the checkout that the command runs in


@dataclass(frozen=True)
class Axis:
    """What methods of an axis look like: the hooks they have, and a setting that switches them off where one can."""

    hooks: tuple[str, ...]
    knob: str = ""  # of float type, neutral at 0
    no_off: str = ""
    baseline: str = ""  # the entry that the run without it has
    entry: str = "methods"  # the recipe's key


_LISTED = Axis(("batch",), "rate")
KINDS: dict[str, Axis] = {
    "mix": Axis(("weights",), no_off="a stage always has a mix", baseline="mix/fixed", entry="mix"),
    "select": Axis(("weigh",), "share"),
    "filter": _LISTED,
    "curriculum": Axis(("shape",), no_off="leave the slot out instead", entry="curriculum"),
    "condition": _LISTED,
    "packing": Axis(("pack",), no_off="a stage always has a packing rule", entry="packing"),
    "synth": Axis(("make",), no_off="it makes data, and a stage without it makes none", entry="make"),
    "objective": Axis(
        ("loss",), no_off="a stage always has an objective", baseline="objective/causal_lm", entry="objective"
    ),
    "init": Axis(("grow",), no_off="it makes a model, and a stage without it makes none", entry="apply"),
    "grow": Axis(("grow",), no_off="it makes a model, and a stage without it makes none", entry="apply"),
    "arch": Axis(("grow",), no_off="it makes a model, and a stage without it makes none", entry="apply"),
    "param": Axis(("wrap", "fold"), no_off="without it the weights themselves are trained"),
    "optim": Axis(("build",), no_off="a stage always has an optimizer", baseline="optim/adamw", entry="optim"),
    "schedule": Axis(
        ("factor",), no_off="a stage always has a schedule", baseline="schedule/constant", entry="schedule"
    ),
    "continual": Axis(("begin", "penalty"), "strength"),
    "merge": Axis(("tensor",), no_off="it makes a model, and a stage without it makes none", entry="apply"),
    "distill": Axis(("auxiliary",), "strength"),
    "selftrain": Axis(("source",), "rate"),
    "align": Axis(("loss",), no_off="a stage always has an objective", baseline="align/sft", entry="objective"),
    "rl": Axis(("loss",), no_off="a stage always has an objective", baseline="align/sft", entry="objective"),
    "steer": Axis(("observe",), "strength"),
    "probe": Axis(("measure",), no_off="it only measures"),
    "predict": Axis(("measure",), no_off="it only measures"),
    "infer": Axis(("measure",), no_off="it only measures"),
}

# Parameters of each hook with their types, as the methods of the house write them.
_SIGNATURES = {
    "weights": "names: dict[str, Any], view: Any) -> dict[str, float]",
    "shape": "view: Any) -> tuple[int, int]",
    "source": "view: Any) -> dict[str, tuple[Any, float]]",
    "weigh": "batch: Batch, view: Any) -> Tensor",
    "batch": "batch: Batch, view: Any) -> Batch",
    "pack": "lengths: list[int], length: int) -> list[int]",
    "loss": "model: Callable[[Batch], Out], batch: Batch, view: Any) -> Sum",
    "auxiliary": "out: Out, batch: Batch, view: Any) -> Sum",
    "begin": "model: nn.Module, view: Any) -> None",
    "penalty": "params: dict[str, Tensor], view: Any) -> Tensor",
    "observe": "batch: Batch, loss: float, view: Any) -> None",
    "wrap": "layer: nn.Module, name: str, view: Any) -> nn.Module | None",
    "fold": "module: Any) -> Tensor",
    "build": "groups: list[dict[str, Any]]) -> torch.optim.Optimizer",
    "factor": "clock: Clock) -> float",
    "tensor": "name: str, tensors: list[Tensor], base: Tensor | None) -> Tensor",
    "grow": "config: dict[str, Any], tensors: dict[str, Tensor], view: Any) -> tuple[dict[str, Any], dict[str, Tensor]]",
    "make": "sources: dict[str, Any], view: Any) -> Iterator[dict[str, Any]]",
    "measure": "model: nn.Module, view: Any) -> dict[str, float | str]",
}
_IMPORTS = {
    "Iterator": "from collections.abc import Iterator",
    "Callable": "from collections.abc import Callable",
    "torch.optim": "import torch",
    "Field": "from pydantic import Field",
    "Clock": "from tutelage.base.clock import Clock",
    "Out": "from tutelage.core.out import Out",
}


def write_method(name: str, *, console: Console) -> None:
    """Write the file of `axis/name`: within a checkout where it belongs, else beside, as a user's own."""
    axis, _, short = name.partition("/")
    if not short or not re.fullmatch(r"[a-z][a-z0-9_]*", short):
        raise UserError(f"'{name}': a method's name is axis/name, in small letters: continual/anchor, say")
    if axis not in KINDS:
        raise UserError(f"no axis '{axis}'{did_you_mean(axis, KINDS)} (axes: {', '.join(AXES)})")
    if name in registry.names():
        raise UserError(f"{name} is there already: {registry.path_of(name)}")
    inside = HOUSE.is_dir()
    place = HOUSE / f"{name}.py" if inside else Path(f"{short}.py")
    if place.exists():
        raise UserError(f"{place} is there already; give another name")
    place.parent.mkdir(parents=True, exist_ok=True)
    kind, cls = KINDS[axis], _class_name(short)
    use = name if inside else f"{short}:{cls}"
    place.write_text(template(kind, cls, use=use), encoding="utf-8")
    console.print(f"Wrote {place}: a template with {', '.join(kind.hooks)}, and gaps to fill in:", markup=False)
    for gap in card.lint(place):
        console.print(f"  {gap}", soft_wrap=True, markup=False)
    console.print(f"In a recipe: {_entry(kind, use)}", soft_wrap=True, markup=False)
    if not inside:
        console.print(
            f"'{use}' is found from this folder, or where Python finds modules: install the package that holds it and "
            "write package.module:Class.",
            soft_wrap=True,
            markup=False,
        )
    console.print("docs/writing-a-method.md goes from here to a verdict.", soft_wrap=True, markup=False)


def _class_name(short: str) -> str:
    return "".join(word.capitalize() for word in short.split("_"))


def _entry(kind: Axis, use: str) -> str:
    if "measure" in kind.hooks:
        return f"evals: {{run: [{use}]}}"
    return f"methods: [{{use: {use}}}]" if kind.entry == "methods" else f"{kind.entry}: {{use: {use}}}"


def template(kind: Axis, cls: str, *, use: str) -> str:
    """The file's text. It imports and can be named by a recipe; what it does not do yet, it says loudly."""
    body = [*_settings(kind), *(line for hook in kind.hooks for line in _hook(hook))]
    rest = [f"class {cls}(Method):", *body, "", "", *_claims(kind, use)]
    text = "\n".join(rest) + "\n"
    return "\n".join([*_card(), "", *_imports(text), "", "", text])


def _card() -> list[str]:
    return [
        f'"""{GAP} title: what it does, in one sentence.',
        "",
        f"Paper:   {GAP} authors, year, arXiv number; or where the idea comes from",
        f"Use:     {GAP} the range of its settings, and when to raise them",
        f"Works:   {GAP} kinds of models and data",
        f"Costs:   {GAP} memory and compute beside a plain step",
        f"With:    {GAP} what it adds to, and what it makes redundant",
        f"Differs: {GAP} every departure from the paper",
        '"""',
        "",
        "from __future__ import annotations",
    ]


def _imports(text: str) -> list[str]:
    used = [line for word, line in _IMPORTS.items() if re.search(rf"\b{re.escape(word)}\b", text)]
    standard = [line for line in used if "collections" in line]
    standard += ["from typing import Any"] if re.search(r"\bAny\b", text) else []
    from_torch = [name for name in ("Tensor", "nn") if re.search(rf"\b{name}\b", text)]
    outside = [line for line in used if line == "import torch" or "pydantic" in line]
    outside += [f"from torch import {', '.join(from_torch)}"] if from_torch else []
    from_types = [name for name in ("Batch", "Sum") if re.search(rf"\b{name}\b", text)]
    house = [line for line in used if "tutelage" in line] + ["from tutelage.base.method import Bench, Method, Seen"]
    house += [f"from tutelage.core.types import {', '.join(from_types)}"] if from_types else []
    return [*standard, *([""] if standard else []), *outside, *([""] if outside else []), *sorted(house)]


def _settings(kind: Axis) -> list[str]:
    if kind.knob:
        return [
            f'    {kind.knob}: float = Field(1.0, ge=0, description="{GAP} what it weighs")',
            "",
            f'    off = {{"{kind.knob}": 0.0}}  # at which a run is the run without it, to the bit',
            f"    on = {{}}  # {GAP} settings for the toy run in which its mechanism must show",
        ]
    lines = [f'    no_off = "{kind.no_off}"']
    entry = f'{{"use": "{kind.baseline}"}}' if kind.baseline else "{}"
    return [*lines, f"    baseline = {entry}  # {GAP} what the toy run without it has in its place"]


def _hook(name: str) -> list[str]:
    signature = f"    def {name}(self, {_SIGNATURES[name]}:"
    return [
        "",
        *([signature] if len(signature) <= 120 else _wrapped(signature)),
        f'        """{HOOKS[name].does[0].upper()}{HOOKS[name].does[1:]}."""',
        f'        raise NotImplementedError("{GAP} {name}")',
    ]


def _wrapped(signature: str) -> list[str]:
    head, _, rest = signature.partition("(")
    inside, _, answer = rest.partition(") ->")
    return [f"{head}(", f"        {inside}", f"    ) ->{answer}"]


def _claims(kind: Axis, use: str) -> list[str]:
    arm = {"methods": f'{{"methods": [{{"use": "{use}"}}]}}'}.get(kind.entry, f'{{"{kind.entry}": {{"use": "{use}"}}}}')
    if "measure" in kind.hooks:
        arm = f'{{"evals": {{"run": ["{use}"]}}}}'
    return [
        "def effect(run: Seen) -> dict[str, float]:",
        '    """What the mechanism should move, read from a toy run; nothing tells whether the method was on in it."""',
        f'    raise NotImplementedError("{GAP} effect, from run.rows, run.weights() and run.start()")',
        "",
        "",
        "def holds(on: dict[str, float], off: dict[str, float]) -> bool:",
        '    """Whether it was moved as the paper says; false of two runs without the method."""',
        f'    return on["{GAP} number"] < off["{GAP} number"]',
        "",
        "",
        "BENCH = Bench(",
        '    base="recipes/bench/two-domains.yaml",',
        f"    arm={arm},",
        f'    metric="{GAP} forgetting/prose, say",',
        '    better="lower",',
        f"    margin=0.01,  # {GAP} the smallest difference that would matter, fixed before the first run",
        '    tune={"optim.lr": [3e-4, 1e-3, 3e-3]},',
        '    tune_baseline={"optim.lr": [3e-4, 1e-3, 3e-3]},',
        f'    scale="{GAP} the size and tokens at which the paper claims it",',
        ")",
    ]
