"""A share of a whole in a recipe, as people write it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field


def read(value: Any) -> Any:
    """`5%` and 0.05 are the same."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


Portion = Annotated[float, BeforeValidator(read), Field(ge=0, lt=1)]
"""A share below the whole: `5%` or 0.05."""
