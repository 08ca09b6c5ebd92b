"""What a request's earlier actions would already have changed when its later ones are checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tutelage.base.clock import Clock, Span
from tutelage.base.errors import UserError
from tutelage.base.method import Method
from tutelage.core import checkpoint
from tutelage.core.measure import planned

if TYPE_CHECKING:
    from tutelage.core.stage import Run


@dataclass
class Trial:
    """What a request's earlier actions would already have changed when its later ones are checked."""

    methods: dict[str, Method]
    added: dict[str, float] = field(default_factory=dict)  # sources that joined, with their weights
    dropped: set[str] = field(default_factory=set)
    mix: dict[str, float] | None = None
    trained: set[str] = field(default_factory=set)  # parameters, by name
    clock: Clock = field(default_factory=Clock)
    answered: set[str] = field(default_factory=set)  # of what waits for a person
    values: dict[str, float] = field(default_factory=dict)  # of the engine and the model, by path
    opened: set[str] = field(default_factory=set)  # what rows of a source that joined are drawn from
    saves: dict[int, dict[str, float]] = field(default_factory=dict)  # made by then: tick, and what the clock counted

    @staticmethod
    def of(run: Run) -> Trial:
        steered = run.steered
        return Trial(
            {m.name(): m.model_copy() for m in run.methods.all()},
            {name: added["weight"] for name, added in steered.added.items()},
            set(steered.dropped),
            steered.mix,
            set(run.engine.params),
            run.clock.copy(),
        )

    def factor(self, run: Run) -> float:
        """The schedule's share of the base rate, as it would be then."""
        return float(self.methods[run.methods.slots["schedule"].name()].factor(self.clock))

    def told(self, run: Run, place: str) -> None:
        """UserError where the rate, a span before the end or the measurements could not be told then."""
        try:
            self.factor(run)
            for method in self.methods.values():
                for span in (getattr(method, name) for name in method.steerable):
                    if isinstance(span, Span):
                        self.clock.left(span)
            planned(run.evals.spec, self.clock.total)
        except UserError as error:
            raise UserError(f"{place}: {error}") from error

    def save(self) -> None:
        self.saves[self.clock.tick] = {key: getattr(self.clock, key) for key in checkpoint.COUNTS}

    def own(self, run: Run) -> list[str]:
        names = [*run.node.stage.data, *self.added]
        return [name for name in names if name not in self.dropped]
