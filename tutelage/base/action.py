"""What may be done to a running stage: a closed vocabulary, each action a schema with bounds.

An action is written down before it is applied, and applied between steps; a recipe's `actions:` and a journal's lines
hold the same words, so a steered run is a recipe. docs/steering.md says how they travel.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator

from tutelage.base.clock import Span, SpanField
from tutelage.base.errors import UserError, did_you_mean
from tutelage.base.spec import SourceSpec, Strict

Actor = Literal["person", "agent", "policy", "recipe"]
MOST = 50  # actions of a request: each may take seconds, and the stage waits
ROWS = 1_000_000  # of a source that one action goes past
DEEPEST = 64  # lists and mappings within each other in a request
RANK = {"recipe": 0, "person": 1, "agent": 2, "policy": 3}  # who is heard first, and whose word stands

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.=-]{0,63}$")]
Pattern = Annotated[str, Field(max_length=1000)]  # longer ones take minutes to compile
Patterns = Annotated[list[Pattern], Field(min_length=1, max_length=4096)]
Path = Annotated[str, Field(max_length=1000)]
Id = Annotated[str, Field(max_length=200)]  # of a request


class Set(Strict):
    """A declared value becomes `to` from now on: `optim.lr`, or a method's (`continual/ewc.strength`)."""

    do: Literal["set"] = "set"
    path: Path
    to: Annotated[float, Field(allow_inf_nan=False)] | str | None

    @field_validator("to", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a value is a number or a span, not true or false")
        try:
            return float(value)  # `3e-4` is text in YAML 1.1
        except (TypeError, ValueError, OverflowError):
            return value


class Scale(Strict):
    """A declared value is multiplied by `by`."""

    do: Literal["scale"] = "scale"
    path: Path
    by: float = Field(gt=0, le=1000)


class Mix(Strict):
    """New shares of the sources, instead of what the mix method says; none gives them back to it."""

    do: Literal["mix"] = "mix"
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class AddSource(Strict):
    """A source as under `data:` joins and takes `weight` of the mixture. Without `source`: one that was dropped."""

    do: Literal["add_source"] = "add_source"
    name: Name
    source: SourceSpec | None = None
    weight: float = Field(0.1, gt=0, lt=1)


class DropSource(Strict):
    """Nothing more is drawn from a source; its share goes to the others."""

    do: Literal["drop_source"] = "drop_source"
    name: str


class SkipData(Strict):
    """Go past the next rows of a source."""

    do: Literal["skip_data"] = "skip_data"
    source: str
    rows: int = Field(ge=1, le=ROWS)


class Freeze(Strict):
    """What matches is not trained from now on; it keeps its optimizer state."""

    do: Literal["freeze"] = "freeze"
    modules: Patterns


class Unfreeze(Strict):
    """What matches is trained from now on."""

    do: Literal["unfreeze"] = "unfreeze"
    modules: Patterns


class Reset(Strict):
    """What matches begins anew, as in a fresh model, without optimizer state."""

    do: Literal["reset"] = "reset"
    modules: Patterns


class Save(Strict):
    """A checkpoint now, kept until it is deleted by hand."""

    do: Literal["save"] = "save"


class Eval(Strict):
    """Measure now."""

    do: Literal["eval"] = "eval"


class Sample(Strict):
    """Text from the current weights."""

    do: Literal["sample"] = "sample"
    prompt: str = Field("", max_length=20_000)
    tokens: int = Field(64, ge=1, le=512)
    temperature: float = Field(1.0, ge=0, le=5)

    @field_validator("temperature")
    @classmethod
    def _cold(cls, value: float) -> float:
        return value if value >= 1e-3 else 0.0  # logits over less than that are infinite in half precision


class Pause(Strict):
    """Wait before the next step."""

    do: Literal["pause"] = "pause"


class Resume(Strict):
    """Go on."""

    do: Literal["resume"] = "resume"


class Step(Strict):
    """Take some steps, then pause."""

    do: Literal["step"] = "step"
    n: int = Field(1, ge=1, le=1_000_000)


class Extend(Strict):
    """A new end of the stage."""

    do: Literal["extend"] = "extend"
    until: SpanField


class EndStage(Strict):
    """The stage ends `after` a span (now, when left out). `decay`: the schedule's last fall begins here and takes it."""

    do: Literal["end_stage"] = "end_stage"
    after: SpanField = Span(0, "step")
    decay: bool = False


class Rollback(Strict):
    """Back to the newest save at or before tick `to`. `skip`: the data since then are not seen again."""

    do: Literal["rollback"] = "rollback"
    to: Annotated[int, Field(ge=0)] | Literal["last"] = "last"
    skip: bool = False


class Branch(Strict):
    """Keep a save to branch from: the newest at or before `to`, or one made now."""

    do: Literal["branch"] = "branch"
    name: Name
    to: Annotated[int, Field(ge=0)] | None = None
    sets: dict[str, Any] = Field(default_factory=dict)
    run: Literal["beside", "after", "no"] = "no"


class Undo(Strict):
    """Put back what a request changed, from now on; with `weights`, from the save made before it. `acts` is found by itself."""

    do: Literal["undo"] = "undo"
    id: Id
    weights: bool = False
    acts: list[dict[str, Any]] | None = None


class Approve(Strict):
    """Do what waits under this id. For persons."""

    do: Literal["approve"] = "approve"
    id: Id


class Refuse(Strict):
    """Do not do what waits under this id. For persons."""

    do: Literal["refuse"] = "refuse"
    id: Id


class Lock(Strict):
    """Refuse these actors from now on: the kill switch. For persons."""

    do: Literal["lock"] = "lock"
    actors: list[Literal["agent", "policy"]] = Field(default=["agent", "policy"], min_length=1)


class Unlock(Strict):
    """Hear these actors again. For persons."""

    do: Literal["unlock"] = "unlock"
    actors: list[Literal["agent", "policy"]] = Field(default=["agent", "policy"], min_length=1)


class Note(Strict):
    """A remark in the journal."""

    do: Literal["note"] = "note"
    text: str = Field(max_length=20_000)


KINDS: tuple[type[Strict], ...] = (
    Set, Scale, Mix, AddSource, DropSource, SkipData, Freeze, Unfreeze, Reset, Save, Eval, Sample, Pause, Resume, Step,
    Extend, EndStage, Rollback, Branch, Undo, Approve, Refuse, Lock, Unlock, Note,
)  # fmt: skip
Action = Annotated[
    Set | Scale | Mix | AddSource | DropSource | SkipData | Freeze | Unfreeze | Reset | Save | Eval | Sample | Pause
    | Resume | Step | Extend | EndStage | Rollback | Branch | Undo | Approve | Refuse | Lock | Unlock | Note,
    Field(discriminator="do"),
]  # fmt: skip
_ADAPTER: TypeAdapter[Action] = TypeAdapter(Action)
NAMES = [str(kind.model_fields["do"].default) for kind in KINDS]

CHANGES = frozenset(
    {"set", "scale", "mix", "add_source", "drop_source", "skip_data", "freeze", "unfreeze", "reset"}
    | {"extend", "end_stage", "rollback", "undo"}
)  # of these, the weights come out otherwise
PERSONS_ONLY = frozenset({"approve", "refuse", "lock", "unlock"})
TARGETS = {
    "mix": "mix", "add_source": "mix", "drop_source": "mix", "skip_data": "mix", "freeze": "modules",
    "unfreeze": "modules", "reset": "modules", "extend": "end", "end_stage": "end", "rollback": "weights",
    "undo": "weights", "pause": "pause", "resume": "pause", "step": "pause",
}  # fmt: skip


def target(action: Any) -> str | None:
    """What an action lays hands on: two actors cannot both have it. None for what disturbs nobody."""
    if action.do in ("set", "scale"):  # a schedule says which share of the rate is in use
        return "optim.lr" if action.path == "optim.base" or action.path.startswith("schedule/") else str(action.path)
    return TARGETS.get(action.do)


def parse(value: dict[str, Any], *, place: str) -> Action:
    """An action from a journal's line, a request or a recipe; UserError names the place."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: an action is a mapping such as {{do: note, text: …}} (got {value!r})")
    if value.get("do") not in NAMES:
        raise UserError(
            f"{place}: do: there is no action {value.get('do')!r}{did_you_mean(str(value.get('do')), NAMES)}"
        )
    try:
        return _ADAPTER.validate_python({k: v for k, v in value.items() if k not in ("tick", "why")})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        got = repr(first.get("input"))
        got = got if len(got) <= 200 else f"{got[:200]} …"
        said = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{place}: {key or 'do'}: {said}{'' if got in said else f' (got {got})'}") from error
