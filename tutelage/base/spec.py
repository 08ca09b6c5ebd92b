"""The recipe's schema: every key a recipe may hold, with its meaning. The class is the documentation."""

from __future__ import annotations

from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import did_you_mean


class Strict(BaseModel):
    """A model that forbids unknown keys."""

    model_config = ConfigDict(extra="forbid")


class Late(dict[str, str]):
    """`{of: law, value: ratio}` in the place of a number or a span, until stage `law` has measured it.

    `unit` says what a span is counted in (`{of: law, value: tokens, unit: tok}`); steps, or rows of a batch, without.
    """

    def __str__(self) -> str:
        return f"{self['value']} of {self['of']}" + (f" ({self['unit']})" if "unit" in self else "")


def is_late(tree: Any) -> bool:
    """Whether this is `{of: stage, value: name}`, a value that a stage will write."""
    known = isinstance(tree, dict) and {"of", "value"} <= set(tree) <= {"of", "value", "unit"}
    return known and all(isinstance(item, str) for item in tree.values())


def kinds(schema: Any) -> set[Any]:
    """The plain types that a field may hold: `{float, NoneType}` of `float | None`."""
    origin, args = get_origin(schema), get_args(schema)
    if origin is Annotated:
        return kinds(args[0])
    if origin in (Union, UnionType):
        return {kind for arm in args for kind in kinds(arm)}
    return {origin or schema}


class Waiting(Strict):
    """A part of a recipe in which a number or a span may be a value that another stage has yet to write."""

    @field_validator("*", mode="wrap")
    @classmethod
    def _wait(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        late = is_late(value) and kinds(field.annotation) & {int, float, Span}
        return Late(value) if late else handler(value)

    @field_serializer("*", mode="wrap")
    def _written(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        return dict(value) if isinstance(value, Late) else handler(value)


class SourceSpec(Waiting):
    """One body of data. Write a path or `stdlib:prose` alone as shorthand for `{path: …}`."""

    path: str | list[str] | None = Field(None, description="file, folder, glob, or `stdlib:prose` / `stdlib:code`")
    hub: str | None = Field(None, description="a `datasets` data set: hub name or a folder written by save_to_disk")
    stage: str | None = Field(None, description="a stage that made data")
    use: str | None = Field(None, description="a generator of records, `package.module:Class`")
    args: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of `use`, or of `hub` (name, split)"
    )
    field: str | None = Field(None, description="the record's text field; found by itself when left out")
    template: str | bool | None = Field(
        None,
        description="true or `chat`: render `messages` (or prompt/answer pairs) with the tokenizer's chat template",
    )
    val: str | float = Field("1%", description="share of documents held out for measurement, or a path of its own")
    weight: float | None = Field(None, ge=0, description="share in the mixture; equal when left out")
    bad: Literal["skip", "fatal"] = Field("skip", description="what to do with a malformed record, always counted")
    order: Literal["shuffled", "stored"] = Field(
        "shuffled",
        description="of its documents: anew in every pass, or as they are stored (packing may look a few ahead)",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, (str, list)) else value

    @model_validator(mode="after")
    def _one_origin(self) -> SourceSpec:
        given = [key for key in ("path", "hub", "stage", "use") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"a source names exactly one of path, hub, stage, use (here: {', '.join(given) or 'none'})"
            )
        return self


def _batch(value: Any) -> Any:
    span = Span(float(value), "sample") if isinstance(value, int) else Span.parse(value)
    if span.unit not in ("tok", "sample") or span.value < 1:
        raise ValueError(f"a batch is counted in tokens or rows (128ktok, 8sample), not '{value}'")
    return span


BatchField = Annotated[Span, BeforeValidator(_batch), PlainSerializer(str)]
"""Tokens or rows of a step; a bare number counts rows."""

Entry = str | dict[str, Any]
"""A method in a recipe: `axis/name`, or `{use: axis/name, setting: value}`."""


class EvalSpec(Waiting):
    """Measurement inside a stage."""

    every: str | int = Field("log", description="`log` (log-spaced, then even), a span, or `none`")
    run: list[Entry] | None = Field(None, description="probes; bits per byte, forgetting and samples when left out")
    budget: str = Field("5%", description="share of training time that measurement may take; thinned to stay under it")
    passages: int = Field(32, ge=1, description="held-out rows measured per source inside a stage")
    final: int = Field(256, ge=1, description="held-out rows measured per source when a stage ends")


class SaveSpec(Waiting):
    """Checkpoints inside a stage, for resume and branch."""

    every: SpanField = Field(Span(10, "min"), description="span between checkpoints")
    keep: int = Field(2, ge=1, description="how many of the newest to keep")


class EngineSpec(Waiting):
    """How a step is computed; apart from `quantize`, none of it changes what is learned beyond rounding."""

    clip: float | None = Field(1.0, gt=0, description="largest norm of the whole gradient; null for none")
    micro: int | None = Field(None, ge=1, description="rows of a micro-batch; found by trial when left out")
    compile: bool = Field(False, description="torch.compile the backbone")
    checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, a third more compute"
    )
    fused_backward: bool = Field(
        False, description="step each parameter within backward and free its gradient; needs `clip: null`"
    )
    deterministic: bool = Field(True, description="same bits on every run; false gives back its cost and the promise")
    quantize: Literal["nf4", "fp4"] | None = Field(
        None, description="hold frozen linear weights in four bits, as QLoRA does; needs bitsandbytes"
    )
    device: str | None = Field(None, description="`cpu`, `cuda`; the best one there when left out")
    threads: int | None = Field(None, ge=1, description="CPU threads; one for small models when left out")


class GroupSpec(Waiting):
    """Parameters (or modules, for dropout) with settings of their own."""

    match: str | list[str] = Field(description="patterns over parameter names, as in `train`")
    rate: float | None = Field(None, ge=0, description="factor on the learning rate")
    decay: float | None = Field(None, ge=0, description="weight decay instead of the optimizer's")
    dropout: float | None = Field(None, ge=0, lt=1, description="dropout of the modules that match")


def _steps(value: Any) -> Any:
    span = Span.parse(value)
    if span.unit != "step":
        raise ValueError(f"counted in steps (200step), not '{value}'")
    return span


StepsField = Annotated[Span, BeforeValidator(_steps), PlainSerializer(str)]
"""A span in steps."""


class LimitSpec(Strict):
    """How far a value may be moved within a number of steps, as a factor on what it was."""

    by: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(gt=0)]] = Field(
        description="lowest, highest factor"
    )
    per: StepsField = Field(Span(200, "step"), description="the steps it is counted over")


class ActorSpec(Strict):
    """What agents, or policies, may do to a running stage."""

    limits: dict[str, LimitSpec] = Field(default_factory=dict, description="by steerable value")
    budget: int = Field(100, ge=0, description="requests done in this stage")
    approve: list[str] = Field(default_factory=list, description="actions that wait for a person")

    @field_validator("approve")
    @classmethod
    def _actions(cls, value: list[str]) -> list[str]:
        from tutelage.base.action import NAMES  # which reads this module

        for name in value:
            if name not in NAMES:
                raise ValueError(f"there is no action '{name}'{did_you_mean(name, NAMES)}")
            if name == "undo":
                raise ValueError("an `undo` waits as what it does would: name that (`set`, `rollback`)")
        return value


class AgentSpec(ActorSpec):
    """Agents: what a recipe does not say of them stays as it is here."""

    limits: dict[str, LimitSpec] = Field(
        default_factory=lambda: {"optim.lr": LimitSpec(by=(0.5, 2.0))}, description="by steerable value"
    )
    approve: list[str] = Field(
        default_factory=lambda: ["rollback", "reset", "end_stage", "add_source", "drop_source", "branch"],
        description="actions that wait for a person",
    )


class PolicySpec(ActorSpec):
    """Policies: what a recipe does not say of them stays as it is here."""

    limits: dict[str, LimitSpec] = Field(
        default_factory=lambda: {"optim.lr": LimitSpec(by=(0.1, 10.0))}, description="by steerable value"
    )
    budget: int = Field(1000, ge=0, description="requests done in this stage")


class SteeringSpec(Strict):
    """Who may change a running stage, and how far. Persons may do everything."""

    agent: AgentSpec = Field(default_factory=AgentSpec)
    policy: PolicySpec = Field(default_factory=PolicySpec)
    hold: StepsField = Field(Span(200, "step"), description="so long nobody else changes what a person has set")
    replay: bool = Field(False, description="policies only follow; what they did stands under `actions`")


class RuleSpec(Waiting):
    """A way out of a training stage: while `signal` is above or below a bound, the stage ends and `enter` is made."""

    signal: str | None = Field(None, description="a measure (`forgetting/prose`) or a number of a step (`loss`)")
    above: float | None = Field(None, description="holds while the signal is above it")
    below: float | None = Field(None, description="holds while the signal is below it")
    otherwise: bool = Field(False, description="taken when the stage ends and no other rule held")
    enter: str = Field(description="the stage that is made then; it starts from this one, or from a later one")

    @model_validator(mode="after")
    def _one_sense(self) -> RuleSpec:
        bounds = [key for key in ("above", "below") if getattr(self, key) is not None]
        if self.otherwise and (self.signal or bounds or self.times > 1):
            raise ValueError("`otherwise` asks for nothing: write {otherwise: true, enter: stage}")
        if not self.otherwise and not (self.signal and bounds):
            raise ValueError(
                "a rule is {signal: name, above: number (or below), enter: stage}, or {otherwise: true, enter: stage}"
            )
        return self

    @property
    def times(self) -> int:
        """How many measurements (or steps) in a row it must hold."""
        return int(getattr(self, "for"))

    def __str__(self) -> str:
        if self.otherwise:
            return "otherwise"
        bounds = {"above": self.above, "below": self.below}
        said = [f"{key} {b if isinstance(b, Late) else f'{b:g}'}" for key, b in bounds.items() if b is not None]
        return f"{self.signal} {' and '.join(said)}" + (f", {self.times} times in a row" if self.times > 1 else "")


if TYPE_CHECKING:

    class Rule(RuleSpec):
        pass
else:  # `for` is a word of the language, and so no name in a class's body
    Rule = create_model(
        "Rule", __base__=RuleSpec, **{"for": (int, Field(1, ge=1, description="measurements (or steps) in a row"))}
    )


class Stage(Waiting):
    """One stage: trains `until`, or `apply`s a transformation, or `make`s data, or `measure`s a table."""

    start: Any = Field(None, description="a stage, folder, hub name, config file, {best: [...], by: metric}, or a list")
    data: dict[str, SourceSpec] = Field(default_factory=dict, description="sources by name")
    keep: Literal["self", "none"] | dict[str, SourceSpec] | None = Field(None, description="what must not be lost")
    tokenizer: Any = Field(
        None,
        description="folder, `bytes`, or {train: bpe, vocab: 2048}, for span denoisers with `sentinels: 100`; "
        "the start's when left out",
    )
    length: int = Field(512, ge=8, description="tokens of a row")
    batch: BatchField = Field(Span(16384, "tok"), description="tokens (or rows: `8sample`) of an optimizer step")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="bf16 only where the hardware has it")
    objective: Entry | None = Field(None, description="what is learned; the modality's own when left out")
    optim: Entry = Field("optim/adamw", description="the optimizer")
    schedule: Entry = Field("schedule/cosine", description="learning rate over time, as a share of the optimizer's")
    mix: Entry = Field("mix/fixed", description="shares of the sources")
    curriculum: Entry | None = Field(None, description="length and batch over time")
    step: Entry | None = Field(None, description="a method that replaces the whole step")
    packing: Entry | Literal["documents", "concat", "single"] = Field("documents", description="how pieces share a row")
    methods: list[Entry] = Field(default_factory=list, description="methods that add up, in order")
    train: list[str] | None = Field(None, description="patterns of what is trained; the rest is frozen")
    groups: list[GroupSpec] = Field(
        default_factory=list, description="patterns with a rate, decay or dropout of their own"
    )
    evals: EvalSpec = Field(default_factory=EvalSpec)
    save: SaveSpec = Field(default_factory=SaveSpec)
    until: SpanField | None = Field(None, description="where training ends")
    seed: int | None = Field(None, description="overrides the recipe's")
    carry: list[Literal["optimizer", "schedule", "data"]] = Field(
        default_factory=list, description="taken along from start"
    )
    actions: list[dict[str, Any]] = Field(
        default_factory=list, description="[{tick: 100, do: set, …}], as a journal has them"
    )
    steering: SteeringSpec = Field(default_factory=SteeringSpec, description="what agents and policies may do to it")
    apply: Entry | None = Field(None, description="a transformation of the start's tensors: merge, grow, …")
    make: Entry | None = Field(None, description="a method that writes data")
    measure: list[Entry] | None = Field(None, description="probes; makes a table")
    of: list[str] | None = Field(None, description="with `measure`: the stages measured, `code--*` allowed")
    engine: EngineSpec = Field(default_factory=EngineSpec)
    on: list[Rule] = Field(default_factory=list, description="ways out: a signal ends the stage and enters another")

    @model_validator(mode="after")
    def _one_product(self) -> Stage:
        given = [key for key in ("until", "apply", "make", "measure") if getattr(self, key) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise ValueError(f"a stage has exactly one of until, apply, make, measure (here: {what})")
        return self

    @property
    def inherits(self) -> set[str]:
        """Fields that are those of the start where they are not written, so that a default does not stand for them."""
        return {"length"} if self.until is None else set()

    @property
    def product(self) -> Literal["model", "data", "table"]:
        return "data" if self.make is not None else "table" if self.measure is not None else "model"


class Recipe(Strict):
    """A graph of stages by name. Sweeps and repeats are already unrolled."""

    stages: dict[str, Stage] = Field(min_length=1)
    modality: str = "text"
    seed: int = 0
    report_to: list[Literal["wandb", "tensorboard", "trackio"]] = Field(default_factory=list)
