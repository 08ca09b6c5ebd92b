"""Small models tuned from one base, each to texts of its own, for merges that look at data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.core.tiny import tiny
from tests.methods.small import Texts, data_of, view_of
from tutelage.base import registry
from tutelage.core.fitting import Starts
from tutelage.core.surgery import Weights

TEXTS = {
    "letters": ["abcabcabcabcabcabc", "bcabcabcabcabca", "cabcabcabcabc"],
    "digits": ["1234512345123451", "34512345123451234", "5123451234512"],
}
STEPS = {"letters": 12, "digits": 40}  # the second task is learned for longer, so its vector is longer


def tuned(kind: str, home: Path) -> list[Path]:
    """Folders of a base and of a model for each of the texts."""
    tiny(kind).save_pretrained(home / "base")
    objective = registry.make("objective/causal_lm")
    for name, texts in TEXTS.items():
        view = view_of(kind, objective=objective)
        model, (batch,) = view.engine.model, data_of([Texts(name, texts)]).once(3)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(STEPS[name]):
            found = objective.loss(view.engine.out, batch, view)
            (found.total / found.weight).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(home / name)
    return [home / name for name in ("base", *TEXTS)]


def beginning(kind: str, folders: list[Path]) -> tuple[Any, Starts]:
    """A view on the base, with a source of each name, and the starts."""
    view = view_of(kind, objective=registry.make("objective/causal_lm"), model=tiny(kind).eval())
    view._source = lambda name: data_of([Texts(name, TEXTS[name])])
    view.sources = list(TEXTS)
    return view, Starts([Weights(folder) for folder in folders], ["base", *TEXTS], view)
