"""A toy stage at work in a thread of the test, so that whatever steers it can be tried beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.toy import graph
from tutelage import steering
from tutelage.base import load
from tutelage.core.run import run_graph

ONE = "runs/toy/one/1"


class Beside:
    """Stage `one` of the toy recipe, paused before the step at `pause` until somebody goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int = 12,
        pause: int | None = 3,
        stage: dict[str, Any] | None = None,
        more: Sequence[dict[str, Any]] = (),
    ) -> None:
        def change(recipe: dict[str, Any]) -> None:
            one = recipe["stages"]["one"]
            one.update(stage or {})
            if pause is not None:
                one["actions"] = [{"tick": pause, "do": "pause"}, *more]

        self.runs, self.folder = folder / "runs", folder / ONE
        self._graph = graph(folder, steps=steps, change=change)
        (self.runs / "toy").mkdir(parents=True, exist_ok=True)  # as the command leaves it, for branches
        (self.runs / "toy" / "recipe.yaml").write_text(load.dump(self._graph.recipe))
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            result = run_graph(self._graph, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
            assert not result.failed and not result.stopped, result.failed
        except BaseException as error:
            self.error = error

    def until(self, true: Callable[[], Any], *, seconds: float = 180) -> None:
        """Wait until something holds."""
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, "it never came"
            assert self._thread.is_alive() or true(), self.error
            time.sleep(0.01)

    def paused(self) -> Beside:
        self.until(lambda: self.folder.is_dir() and steering.controls(self.folder)["state"] == "paused")
        return self

    def person(self, *do: dict[str, Any], wait: bool = True) -> dict[str, Any]:
        """What a person asks for, and the answer."""
        id = steering.send(self.folder, list(do), by="ada")
        return steering.wait(self.folder, id, seconds=180) if wait else {}

    def finish(self) -> Path:
        """Let it go on to its end; its folder."""
        if steering.controls(self.folder)["state"] == "paused":
            self.person({"do": "resume"}, wait=False)
        self._thread.join(300)
        assert not self._thread.is_alive() and self.error is None, self.error
        return self.folder
