"""What every method is: a pydantic model whose fields are its YAML keys, and whose hooks the engine asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, PrivateAttr

from tutelage.base.hooks import HOOKS, hooks_of


class Method(BaseModel):
    """One published method. Its fields are its settings; `state` is all that it remembers between steps.

    `state` holds tensors, numbers and dicts of these, nothing else: it is saved with every checkpoint and read back
    before the next step, so that a cut run retraces. State under a parameter's name belongs to that parameter.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    off: ClassVar[dict[str, Any] | None] = None  # the neutral setting, at which the engine drops the method
    no_off: ClassVar[str | None] = None  # why there is none (a merge, an optimizer)
    needs: ClassVar[frozenset[str]] = frozenset()  # of the forward pass: "hidden", "attentions"
    refs: ClassVar[frozenset[str]] = frozenset()  # frozen models it asks for: `start` of `view.ref`; of a fit, `starts`
    wants_base: ClassVar[bool] = False  # a merge whose first input is what the others are compared with
    takes: ClassVar[int | None] = None  # how many models it starts from, a base among them; or any, to grow one
    tokenizer_of: ClassVar[int] = 0  # of a transformation: which of its starts gives the tokenizer
    unrelated: ClassVar[bool] = False  # a merge for models that share no start: it is tried on such
    steerable: ClassVar[frozenset[str]] = frozenset()  # fields that an action may set in a running stage
    guards: ClassVar[bool] = False  # a policy that is asked what to do about a loss that is no number
    freezes: ClassVar[bool] = True  # a wrapper: what it does not wrap is not trained, unless `train` says so
    helpers: ClassVar[frozenset[str]] = frozenset()  # labels of its `modules` that training alone needs, in no artifact
    separable: ClassVar[bool] = False  # an optimizer that steps each parameter without looking at the others
    last: ClassVar[str | None] = None  # a schedule's field that says over which last span the rate falls
    tolerance: ClassVar[float] = 1e-5  # two processes against one

    on: ClassVar[dict[str, Any]] = {}  # settings for the toy run in which its mechanism must show
    baseline: ClassVar[dict[str, Any] | None] = None  # without `off`: the entry that the toy run without it has
    toys: ClassVar[tuple[str, ...]] = ("llama", "qwen2", "gpt2")  # models it is tried on; the first shows its effect

    _state: dict[str, Any] = PrivateAttr(default_factory=dict)

    if TYPE_CHECKING:  # whether a method has a hook is only known when it is found

        def __getattr__(self, name: str) -> Any: ...

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    @classmethod
    def name(cls) -> str:
        """`axis/name` for a method of the house, `package.module:Class` for a user's own."""
        prefix = "tutelage.methods."
        if cls.__module__.startswith(prefix):
            return cls.__module__.removeprefix(prefix).replace(".", "/")
        return f"{cls.__module__}:{cls.__qualname__}"

    def files(self) -> list[Path]:
        """Files that it reads, besides the data: their content enters the stage's fingerprint."""
        return []

    def suits(self, models: int, sources: list[str]) -> None:
        """Of a merge with `fit`, asked before anything runs: UserError where it cannot work on so many models, or sources
        of these names. The error begins with the key of the stage: `apply.inputs: …`."""

    def keeps_function(self) -> bool:
        """Whether a model that it grows must answer as its start does, which is checked after `grow`."""
        return False

    def trains(self, name: str) -> bool:
        """Whether a parameter of one of its wrappers is trained (`name` within the wrapper)."""
        return True

    @classmethod
    def hooks(cls) -> list[str]:
        return hooks_of(cls)

    @classmethod
    def slot(cls) -> str | None:
        """The exclusive recipe key it is written under, if it has one."""
        return next((HOOKS[hook].slot for hook in cls.hooks() if HOOKS[hook].slot), None)

    def is_off(self) -> bool:
        """Whether the settings are the neutral ones."""
        return self.off is not None and all(getattr(self, key) == value for key, value in self.off.items())


@dataclass(frozen=True)
class Bench:
    """How a claim is measured: a base recipe, the arm's changes to it, the number read and what counts as better.

    `arm` and `baseline` are merged into stage `stage` of the base recipe (its last stage when left out). `tune` maps a
    dotted key to the values tried, with the same number of trials for arm (`tune`) and baseline (`tune_baseline`).
    `tune_by` is what the trials are chosen by, where that is not the metric: a rate chosen for forgetting alone would
    be the one that learns nothing. A name without a column (`bits_per_byte`) is the mean over columns,
    one with several (`bits_per_byte/code,prose`) over these.
    `margin` is the smallest difference that would matter, in the metric's unit, fixed beforehand.
    """

    base: str
    arm: dict[str, Any]
    metric: str
    better: Literal["lower", "higher"]
    margin: float
    stage: str | None = None
    baseline: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, list[Any]] = field(default_factory=dict)
    tune_baseline: dict[str, list[Any]] = field(default_factory=dict)
    tune_by: str | None = None
    scale: str = ""  # the paper's scale, as it is shown beside the verdict


class Seen(Protocol):
    """A finished toy run, as `effect` sees it: nothing tells whether the method was on."""

    rows: list[dict[str, Any]]  # the stage's metrics: kind `train` and `eval`
    folder: Path

    def weights(self) -> dict[str, Any]:
        """Tensors that the stage ended with, by name."""
        ...

    def start(self) -> dict[str, Any]:
        """Tensors that the stage began with (of its first start), by name."""
        ...
