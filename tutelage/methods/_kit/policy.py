"""What policies share: a reason for what they ask, which the journal keeps."""

from __future__ import annotations

from typing import Any

from tutelage.base.method import Method


class Policy(Method):
    """A method with `act`. `why` is the reason of what it asked for last."""

    @property
    def why(self) -> str:
        return str(self.state.get("why", ""))

    def ask(self, why: str, *acts: dict[str, Any]) -> list[dict[str, Any]]:
        """These actions, for this reason."""
        self.state["why"] = why
        return list(acts)
