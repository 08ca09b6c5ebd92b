"""A prompt for the current weights and, beside them, for another stage's: a branch, or where this one came from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from nicegui import ui

from tutelage import steering
from tutelage.core.words import number
from tutelage.server.page_act import WRONG
from tutelage.server.page_bits import box, button, field, text
from tutelage.server.page_panel import Panel


class Talk(Panel):
    title = "Talk"

    def build(self) -> None:
        with box("card pile wide", "section", label="talk to the weights"):
            text("Talk to the weights", tag="h3")
            says = (
                "A running stage answers between two steps; of one that is not running, the last save is loaded apart."
            )
            text(says, "soft small", "p")
            self.prompt = ui.textarea("Prompt").props("outlined autogrow dense").style("width: 100%")
            self.prompt.on("keydown.ctrl.enter", self.ask)
            with box("line wrap"):
                self.tokens = field("Tokens", "48").style("width: 6rem")
                self.heat = field("Temperature", "0").style("width: 7rem")
                self.other = (
                    ui.select([], label="Beside it", clearable=True).props("outlined dense").style("min-width: 13rem")
                )
                self.go = button("Ask", self.ask, "main")
                text("Ctrl + Enter", tag="kbd").classes("hide-small")
            self.place = box("grid2")
        self.task = asyncio.create_task(self._list())

    async def _list(self) -> None:
        found = await self.viewer.house.stages()
        if not self.viewer.gone:
            self.other.set_options([info.name for info in found if info.name != self.viewer.live.name])

    async def ask(self) -> None:
        prompt = str(self.prompt.value or "")
        tokens, heat = number(self.tokens.value), number(self.heat.value)
        if not prompt or not 1 <= tokens <= 512 or not heat >= 0:
            self.viewer.say("Talk: a prompt, 1 to 512 tokens, a temperature of 0 or more", "bad")
            return
        if not self.go.enabled:
            return
        self.go.set_enabled(False)
        folders = [self.viewer.live.folder]
        if self.other.value:
            folders.append(await self.viewer.house.folder(str(self.other.value)))
        self.place.clear()
        with self.place:
            places = [self._slot(steering.name_of(folder)) for folder in folders]
        both = zip(folders, places, strict=True)
        asked = [self._fill(folder, place, prompt, int(tokens), heat) for folder, place in both]
        await asyncio.gather(*asked)
        if not self.viewer.gone:
            self.go.set_enabled(True)

    def _slot(self, name: str) -> tuple[Any, Any]:
        with box("pile"):
            head = text(f"{name} · thinking …", "soft small")
            return head, text("", "said mono")

    async def _fill(self, folder: Path, place: tuple[Any, Any], prompt: str, tokens: int, heat: float) -> None:
        """Ask one stage, and put down what it said and which step it speaks from."""
        viewer, name = self.viewer, steering.name_of(folder)
        job: dict[str, Any] = {"prompts": [prompt], "tokens": tokens, "temperature": heat, "seed": 0, "tick": None}
        now = await viewer.house.desk.feeds.look(lambda: steering.controls(folder))
        if now["state"] == "stopped":
            job["tick"] = max((save["tick"] for save in now["saves"]), default=now["tick"])
        try:
            found = await viewer.house.desk.attempt(viewer.who, folder, job, address=viewer.address)
        except WRONG as error:
            found = {"error": str(error)}
        if viewer.gone:
            return
        where = {"running": "the weights at", "paused": "the weights at", "stopped": "the save of"}.get(now["state"])
        said = f"{where} tick {found.get('tick')}" if where else "its finished weights"
        head, body = place
        text_ = next(iter(found.get("texts") or []), None)
        head.set_text(f"{name} · " + (f"speaks from {said}" if text_ is not None else "no answer"))
        body.set_text(f"{prompt}{text_}" if text_ is not None else str(found.get("error") or found.get("state")))
        body.classes(add="bad" if text_ is None else "")
