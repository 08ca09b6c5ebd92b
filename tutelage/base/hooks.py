"""The whole plug-in contract: every hook a method may have, who owns it and what it returns.

A method has a hook by defining a function of that name. It receives a read-only view of the run and returns a value;
gradients in `grads` and weights in `after` are lent for writing. See docs/writing-a-method.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hook:
    """One hook. `kind` says when it acts: in the training loop, to a whole stage, or outside training.

    `slot` is the recipe key that holds its owner when it is exclusive; None lets any number of methods share it.
    """

    signature: str
    does: str
    kind: Literal["train", "apply", "make", "measure"] = "train"
    slot: str | None = None


HOOKS: dict[str, Hook] = {
    # what the model sees
    "weights": Hook("weights(names, view) -> dict[str, float]", "shares of the sources at this step", slot="mix"),
    "shape": Hook("shape(view) -> (length, tokens)", "row length and tokens of this step", slot="curriculum"),
    "cut": Hook(
        "cut(size) -> list[int]",
        "pieces of a chunk, once, when the sources are built; a step draws those of its length",
        slot="curriculum",
    ),
    "grade": Hook(
        "grade(chunks) -> Iterable[int]",
        "the class of each chunk of a source by text and tokens, once, when the sources are built; with `classes`",
        slot="curriculum",
    ),
    "pick": Hook(
        "pick(view) -> dict[str, Tensor] | None",
        "before each step: numbers of the chunks that are drawn of a source from now on, of the others all; None: as so far",
        slot="curriculum",
    ),
    "classes": Hook(
        "classes(view) -> dict[int, float]", "how far each class is open at this step, 0 to 1", slot="curriculum"
    ),
    "source": Hook("source(view) -> dict[str, SourceRef]", "adds sources, each with the share it takes first"),
    "prefix": Hook(
        "prefix(records, rng) -> Iterator[str]", "what the rows of each document begin with: read, never learned"
    ),
    "weigh": Hook("weigh(batch, view) -> Tensor[B]", "row weights; rows of weight 0 leave before the training pass"),
    "batch": Hook("batch(batch, view) -> Batch", "changes a batch before the forward pass, in list order"),
    "pack": Hook(
        "pack(lengths, length) -> list[int]",
        "which waiting pieces (its field `look_ahead` says of how many) or prompts join in a row",
        slot="packing",
    ),
    # what is learned
    "loss": Hook("loss(model, batch, view) -> Sum", "the objective", slot="objective"),
    "measured": Hook("measured(batch, view) -> Batch", "prepares a batch for its loss without chance", kind="measure"),
    "auxiliary": Hook("auxiliary(out, batch, view) -> Sum", "a loss on the objective's output, added to it"),
    "begin": Hook("begin(model, view) -> None", "once, on a fresh stage, before wrapping; never on resume"),
    "penalty": Hook("penalty(params, view) -> Tensor", "a term on the weights, once a step"),
    "grads": Hook("grads(grads, view) -> None", "changes the gradients in place, in list order"),
    "after": Hook("after(params, view) -> None", "changes the weights after the optimizer step, in list order"),
    "observe": Hook("observe(batch, loss, view) -> None", "sees the finished step"),
    "act": Hook(
        "act(view) -> list[dict[str, Any]]", "actions it asks for after a step, as docs/steering.md names them"
    ),
    "step": Hook("step(engine, batch, view) -> dict[str, float]", "replaces the whole step", slot="step"),
    "modules": Hook("modules(model) -> dict[str, Module]", "trainable parts it owns, by label; asked again on resume"),
    # what the model is made of
    "freeze": Hook(
        "freeze(names, view) -> set[str]", "which of these parameters stay as they are; asked again on resume, so pure"
    ),
    "wrap": Hook("wrap(layer, name, view) -> Module | None", "a trainable wrapper for a layer, or None to leave it"),
    "fold": Hook("fold(module) -> Tensor", "the plain weight that a wrapper stands for, for export"),
    "adapter": Hook("adapter(modules) -> (config, tensors)", "what the wrappers hold, in PEFT's format"),
    "build": Hook("build(groups) -> Optimizer", "the optimizer", slot="optim"),
    "settings": Hook(
        "settings(group) -> dict[str, Any]", "a group's settings besides its rate, asked again when steered"
    ),
    "factor": Hook("factor(clock) -> float", "share of the base rate, pure", slot="schedule"),
    "fit": Hook(
        "fit(model, starts, view) -> Iterator[(dict[str, float], list[Batch])]",
        "finds on data what a merge needs, before its first `tensor`: after each step its numbers and what it read",
        kind="apply",
    ),
    "tensor": Hook("tensor(name, tensors, base, view) -> Tensor", "merges one tensor", kind="apply"),
    "grow": Hook(
        "grow(config, tensors, view) -> (config, tensors)", "a larger model from a smaller one's tensors", kind="apply"
    ),
    # beside training
    "make": Hook("make(sources, view) -> Iterator[Row]", "writes rows of data", kind="make"),
    "rewrite": Hook(
        "rewrite(documents) -> Iterator[Row]",
        "reads a stage's documents and writes rows of them; no model",
        kind="make",
    ),
    "retell": Hook(
        "retell(documents, writer) -> Iterator[Row]",
        "reads a stage's documents, asks a writer (the start's model, or one at `endpoint`), writes rows of the answers",
        kind="make",
    ),
    "measure": Hook("measure(model, view) -> dict[str, float]", "measures; changes nothing", kind="measure"),
}

SLOTS = ("objective", "optim", "schedule", "mix", "curriculum", "step", "packing")


def hooks_of(cls: type) -> list[str]:
    """The hooks a class defines, in the order of the table."""
    return [name for name in HOOKS if callable(getattr(cls, name, None))]
