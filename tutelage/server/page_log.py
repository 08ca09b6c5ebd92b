"""Everything that was asked for, by whom and why, and what became of it."""

from __future__ import annotations

from typing import Any

from tutelage.server.page_act import back_to_before, show_effects
from tutelage.server.page_bits import box, button, text
from tutelage.server.page_panel import Panel
from tutelage.server.page_words import spell

MOST = 60  # entries shown; all are in the journal


class Log(Panel):
    title = "Log"

    def build(self) -> None:
        with box("card", "section", label="log of actions"):
            self.place = box()

    def update(self) -> None:
        live = self.viewer.live
        entries = live.entries
        if not self.changed([(e["id"], e["state"]) for e in entries]):
            return
        self.place.clear()
        with self.place:
            if not entries:
                text("Nobody has steered this stage yet.", "soft")
            for entry in reversed(entries[-MOST:]):
                self._entry(entry)
            if len(entries) > MOST:
                text(f"and {len(entries) - MOST} before, in journal.jsonl", "soft small")

    def _entry(self, entry: dict[str, Any]) -> None:
        state = entry["state"]
        with box("entry pile tight"):
            with box("line wrap"):
                text(state, f"pill {state}")
                text(spell(entry.get("do") or []), "strong")
                where = f"tick {entry['tick']} · " if "tick" in entry else ""
                text(f"{where}{entry.get('by')} ({entry.get('actor', 'person')})", "soft small")
            if entry.get("why"):
                text(entry["why"], "small")
            if entry.get("error"):
                text(str(entry["error"]), "bad small" if state == "refused" else "warn small")
            if state == "applied":
                show_effects(entry, said="what changed")
                with box("line wrap"):
                    if entry.get("undo"):
                        button("Undo from now on", lambda: self.viewer.tabs.undo(entry["id"], weights=False), "tiny")
                    if back_to_before(entry):
                        back = lambda: self.viewer.tabs.undo(entry["id"], weights=True)  # noqa: E731
                        button("Back to the weights before it …", back, "tiny plain risk")
