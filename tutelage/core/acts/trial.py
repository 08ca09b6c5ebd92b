"""What a request's earlier actions would already have changed when its later ones are checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tutelage.base.clock import Clock
from tutelage.base.method import Method

if TYPE_CHECKING:
    from tutelage.core.stage import Run


@dataclass
class Trial:
    """What a request's earlier actions would already have changed when its later ones are checked."""

    methods: dict[str, Method]
    added: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    mix: dict[str, float] | None = None
    trained: set[str] = field(default_factory=set)  # parameters, by name
    clock: Clock = field(default_factory=Clock)
    answered: set[str] = field(default_factory=set)  # of what waits for a person

    @staticmethod
    def of(run: Run) -> Trial:
        steered = run.steered
        return Trial(
            {m.name(): m.model_copy() for m in run.methods.all()},
            set(steered.added),
            set(steered.dropped),
            steered.mix,
            set(run.engine.params),
            run.clock.copy(),
        )

    def factor(self, run: Run) -> float:
        """The schedule's share of the base rate, as it would be then."""
        return float(self.methods[run.methods.slots["schedule"].name()].factor(self.clock))

    def own(self, run: Run) -> list[str]:
        names = [*run.node.stage.data, *self.added]
        return [name for name in names if name not in self.dropped]
