"""What every tab is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from nicegui.element import Element

if TYPE_CHECKING:
    from tutelage.server.page import Viewer


class Panel:
    """A tab: `build` once, `update` each second while it is seen. `self.root` is where it stands."""

    title: ClassVar[str]
    root: Element

    def __init__(self, viewer: Viewer) -> None:
        self.viewer = viewer
        self.built = False
        self._seen: Any = None

    def show(self) -> None:
        """It was opened."""
        with self.root:
            if not self.built:
                self.built = True
                self.build()
        self.update()

    def build(self) -> None:
        raise NotImplementedError

    def update(self) -> None:
        """Look whether something is new."""

    def changed(self, *what: Any) -> bool:
        """Whether any of this differs from the last time it was asked."""
        if what == self._seen:
            return False
        self._seen = what
        return True
