"""The actions panel, made from what the trainer says can be steered now."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from tutelage.core.words import number, percent
from tutelage.server.page_act import BACK, SKIP, Ask, act, back_to_before
from tutelage.server.page_bits import box, button, field, text
from tutelage.server.page_panel import Panel
from tutelage.server.page_words import MANY, bounds, plain, rate, rules_said, spell

RATES = ("optim.lr", "optim.base")


class Steer(Panel):
    title = "Steer"

    def build(self) -> None:
        self.over = text("", "soft").style("margin-bottom: .8rem")
        with box("grid2"):
            with box("pile wide"):
                self.waiting = box("", "section", label="waiting for a person")
                with box("card", "section", label="values"):
                    text("Values", tag="h3")
                    text("Each change shows what it would do before it is sent.", "soft small")
                    self.values = box()
                with box("card pile", "section", label="mixture"):
                    text("Mixture", tag="h3")
                    self.mixture = box("pile")
                with box("card pile", "section", label="parts of the model"):
                    text("Parts of the model", tag="h3")
                    self.parts = box("pile")
            with box("pile wide"):
                with box("card pile", "section", label="going back"):
                    text("Going back", tag="h3")
                    self.back = box("pile")
                with box("card pile", "section", label="the stage"):
                    text("The stage", tag="h3")
                    self._stage()
                with box("card pile", "section", label="data"):
                    text("Data", tag="h3")
                    self.data = box("pile")
                with box("card pile", "section", label="who may steer"):
                    text("Who may steer", tag="h3")
                    self.rules = box("pile")

    def ask(
        self, do: list[dict[str, Any]], *, title: str, says: str = "", options: dict[str, str] | None = None
    ) -> Any:
        return Ask(self.viewer, do, title=title, says=says, options=options).open()

    def update(self) -> None:
        """Build anew only what changed, so that what somebody is typing stays."""
        live = self.viewer.live
        now = live.controls
        self.over.set_text(
            ""
            if live.live
            else f"This stage is {live.state}: nothing here is changed. A branch (Try) goes on from a save."
        )
        self.over.set_visibility(not live.live)
        self._once(
            "values",
            [live.live, *({k: v for k, v in t.items() if k not in ("now", "groups")} for t in now["targets"])],
            self.values,
            self._values,
        )
        self._once("mix", [now["sources"], sorted(live.shares()), live.live], self.mixture, self._mixture)
        self._once("data", [now[key] for key in ("sources", "drawn", "dropped")], self.data, self._data)
        self._once("parts", now["modules"], self.parts, self._parts)
        self._once("waiting", now["waiting"], self.waiting, self._waiting)
        undoable = [e["id"] for e in live.entries if e.get("state") == "applied"][-4:]
        self._once("back", [now["saves"], undoable], self.back, self._back)
        self._once("rules", [now["locked"], now["rules"]], self.rules, self._rules)
        _, done = live.progress()
        self.end.set_text(f"Done: {done}." if now["total"] else "")
        for path, label in self.used.items():
            value = live.target(path).get("now")
            label.set_text(rate(value) if path in RATES else plain(value))
        mix, _ = self._mix()
        for name, label in self.shares.items():
            label.set_text(f"now {percent(mix.get(name))}")

    used: dict[str, Any]
    shares: dict[str, Any]

    def _once(self, key: str, what: Any, place: Any, make: Any) -> None:
        if not hasattr(self, "made"):
            self.made: dict[str, Any] = {}
            self.used, self.shares = {}, {}
        if key in self.made and self.made[key] == what:
            return
        self.made[key] = what
        place.clear()
        with place:
            make()

    # -- what is steered --------------------------------------------------------------------------------------------

    def _values(self) -> None:
        self.used = {}
        targets = self.viewer.live.controls["targets"]
        if not targets:
            text(
                "Nothing can be set: the stage is not running." if not self.viewer.live.live else "Nothing to set.",
                "soft",
            )
        for target in targets:
            with box("control"):
                with box("says"):
                    text(target["path"], "strong")
                    text(str(target.get("says") or ""), "soft small")
                with box():
                    self.used[target["path"]] = text(plain(target["now"]), "strong num")
                    text(bounds(target), "soft small")
                button(
                    "Change …",
                    lambda t=target: self._change(self.viewer.live.target(t["path"]) or t),
                    "tiny",
                    label=f"change {target['path']}",
                )

    async def _change(self, target: dict[str, Any]) -> None:
        """Type a value, then see what it does."""
        path = target["path"]
        with self.viewer.root, ui.dialog() as dialog, box("t-dialog pile wide"):
            dialog.on("hide", dialog.delete)
            text(f"Change {path}", tag="h2")
            write = rate if path in RATES else plain
            said = [str(target.get("says") or ""), f"now {write(target['now'])}", bounds(target)]
            text("; ".join(part for part in said if part), "soft", "p")
            value = field("New value", plain(target["now"])).props("autofocus inputmode=decimal")
            wrong = text("", "bad small")

            async def further() -> None:
                span = target.get("kind") == "span"  # the trainer reads it, and says what is wrong with it
                to = str(value.value).strip() if span else number(value.value)
                low, high = number(target.get("low")), number(target.get("high"))
                if isinstance(to, float) and (to != to or to < low or to > high):
                    wrong.set_text(f"A number is needed, {bounds(target) or 'any'}.")
                    return
                dialog.close()
                await self.ask(
                    [{"do": "set", "path": path, "to": to}], title=f"{path}: {plain(target['now'])} → {plain(to)}"
                )

            value.on("keydown.enter", further)
            with box("line wrap"):
                for by in (0.5, 0.8, 1.25, 2.0) if number(target["now"]) else ():
                    button(f"× {by:g}", lambda by=by: value.set_value(f"{number(target['now']) * by:.6g}"), "tiny")
            with box("line").style("justify-content: flex-end"):
                button("Cancel", dialog.close, "plain")
                button("See what it does", further, "main")
        dialog.open()

    def _mix(self) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of the sources that can be mixed, together one; and what of a batch methods take before for their own."""
        live = self.viewer.live
        shares, own = live.shares(), live.controls["sources"]
        mixed = {name: shares.get(name, 0.0) for name in own}
        whole = sum(mixed.values()) or 1.0
        taken = {name: share for name, share in shares.items() if name not in own} if own else {}
        return {name: share / whole for name, share in mixed.items()}, taken

    def _mixture(self) -> None:
        self.shares = {}
        mix, taken = self._mix()
        if not mix:
            text("Not known before the stage runs.", "soft")
            return
        fields = {}
        for name, share in mix.items():
            with box("line"):
                text(name, "grow cut").tooltip(name)
                self.shares[name] = text("", "soft small")
                fields[name] = field("share", f"{100 * number(share):.4g}").props('suffix="%"').style("width: 7rem")
                fields[name].props["aria-label"] = f"share of {name}, percent"
        for name, share in taken.items():
            text(f"{name}: a method takes {percent(share)} of every batch before these", "soft small")

        async def send() -> None:
            shares = {name: number(one.value) / 100 for name, one in fields.items()}
            if any(not share >= 0 for share in shares.values()) or not sum(shares.values()) > 0:
                self.viewer.say("Shares are numbers, 0 or more, not all zero", "bad")
                return
            await self.ask(
                [{"do": "mix", "weights": shares}],
                title="A new mixture",
                says="Shares are scaled so that they sum to one.",
            )

        with box("line wrap"):
            button("See what it does", send, "tiny")
            button(
                "Give back to the method",
                lambda: self.ask([{"do": "mix", "weights": {}}], title="The method's own mixture"),
                "tiny plain",
            )

    def _parts(self) -> None:
        modules = self.viewer.live.controls["modules"]
        if not modules:
            text("Not known before the stage runs.", "soft")
            return
        names = {m["name"]: f"{m['name']}{' · frozen' if m.get('frozen') else ''}" for m in modules}
        chosen = (
            ui.select(names, multiple=True, label="Blocks")
            .props("outlined dense use-chips")
            .classes("w-full")
            .style("width: 100%")
        )

        async def do(what: str, title: str, says: str) -> None:
            if not chosen.value:
                self.viewer.say("Choose blocks first", "warn")
                return
            await self.ask([{"do": what, "modules": list(chosen.value)}], title=title, says=says)

        frozen = "They keep their optimizer state and are not trained until they are unfrozen."
        with box("line wrap"):
            button("Freeze", lambda: do("freeze", "Freeze blocks", frozen), "tiny")
            button("Unfreeze", lambda: do("unfreeze", "Unfreeze blocks", "They train on from here."), "tiny")
            fresh = "Weights as a fresh model has them; what these blocks learned is gone."
            button("Reset …", lambda: do("reset", "Reset blocks", fresh), "tiny risk")

    # -- going back and what waits ----------------------------------------------------------------------------------

    def _back(self) -> None:
        live = self.viewer.live
        done = [e for e in live.entries if e.get("state") == "applied" and (e.get("undo") or back_to_before(e))][-4:]
        undo = self.viewer.tabs.undo
        for entry in reversed(done):
            with box("entry pile tight"):
                text(f"tick {entry['tick']}: {entry['by']}, {spell(entry['do'])}", "small")
                with box("line wrap"):
                    if entry.get("undo"):
                        button("Undo from now on", lambda e=entry: undo(e["id"], weights=False), "tiny")
                    if back_to_before(entry):
                        back = lambda e=entry: undo(e["id"], weights=True)  # noqa: E731
                        button("Back to the weights before it …", back, "tiny risk")
        for save in reversed(live.controls["saves"][-4:]):
            title = f"Back to the weights of tick {save['tick']:,}"
            with box("line ends"):
                text(f"save of tick {save['tick']:,}{' · kept' if save.get('kept') else ''}", "small")
                do = [{"do": "rollback", "to": save["tick"]}]
                button(
                    "Go back …",
                    lambda d=do, t=title: self.ask(d, title=t, says=BACK["rollback"], options=SKIP),
                    "tiny risk",
                    label=title,
                )
        if not done and not live.controls["saves"]:
            text("No save and no action yet.", "soft")

    def _waiting(self) -> None:
        for request in self.viewer.live.controls["waiting"]:
            id = str(request.get("id"))
            with box("card pile").style("margin-bottom: .2rem; border-color: var(--warn)"):
                text("Waits for a person", "warn strong", "h3")
                text(f"{request.get('by')} asks: {spell(request.get('do') or [])}")
                text(str(request.get("why") or "no reason given"), "soft small")
                with box("line wrap"):
                    button(
                        "Approve",
                        lambda i=id: act(self.viewer, [{"do": "approve", "id": i}], title="Approve"),
                        "tiny main",
                    )
                    button("Refuse", lambda i=id: act(self.viewer, [{"do": "refuse", "id": i}], title="Refuse"), "tiny")

    def _rules(self) -> None:
        now = self.viewer.live.controls
        locked = [many for actor, many in MANY.items() if actor in now["locked"]]
        text(
            f"{' and '.join(locked).capitalize()} are refused now."
            if locked
            else "Persons, then agents, then policies.",
            "warn" if locked else "soft small",
        )
        for said in rules_said(now["rules"]):
            text(said, "small")
        do = {"do": "unlock" if locked else "lock", "actors": ["agent", "policy"]}
        says = (
            "They may ask again." if locked else "Everything that agents and policies ask for is refused from now on."
        )
        title = "Let agents and policies steer" if locked else "Stop agents and policies"
        with box("line"):
            button(title, lambda: self.ask([do], title=title, says=says), "tiny" if locked else "tiny risk")

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _stage(self) -> None:
        with box("line wrap"):
            button("Save now", lambda: act(self.viewer, [{"do": "save"}], title="Save"), "tiny")
            button("Measure now", lambda: act(self.viewer, [{"do": "eval"}], title="Measure"), "tiny")
            button("One step, then pause", lambda: act(self.viewer, [{"do": "step", "n": 1}], title="One step"), "tiny")
        self.end = text("", "soft small")
        with box("line"):
            until = field("New end, such as 2Mtok or 500step", classes="grow")
            button(
                "Extend",
                lambda: self.ask([{"do": "extend", "until": until.value}], title=f"A new end: {until.value}"),
                "tiny",
            )
        with box("line"):
            after = field("End after (empty: now)", classes="grow")
            decay = ui.checkbox("with a last decay").props("dense")

            async def end() -> None:
                do = {"do": "end_stage", "decay": bool(decay.value)} | ({"after": after.value} if after.value else {})
                await self.ask([do], title="End the stage", says="It is published and the next one begins.")

            button("End …", end, "tiny risk")
        with box("line"):
            remark = field("A remark for the journal", classes="grow")
            button("Note", lambda: act(self.viewer, [{"do": "note", "text": remark.value}], title="Note"), "tiny")

    def _data(self) -> None:
        now = self.viewer.live.controls
        drawn, sources = now["drawn"], now["sources"]
        if not sources:
            text("Not known before the stage runs.", "soft")
            return
        with box("line"):
            rows_of = _choice("Rows of", sorted(drawn, key=lambda name: name.partition(":")[0] not in sources))
            rows = field("Rows").props("inputmode=numeric").style("width: 6rem")

            async def skip() -> None:
                if not number(rows.value) >= 1:
                    return self.viewer.say("How many rows? A number from 1", "bad")
                do = {"do": "skip_data", "source": rows_of.value, "rows": int(number(rows.value))}
                return await self.ask([do], title=f"Go past {do['rows']:,} rows of {do['source']}")

            button("Skip …", skip, "tiny risk")
        with box("line"):
            source = _choice("Source", sources)
            drop = "Its share goes to the others."

            async def leave() -> None:
                do = {"do": "drop_source", "name": source.value}
                await self.ask([do], title=f"Drop the source {source.value}", says=drop)

            button("Drop …", leave, "tiny risk").set_enabled(len(sources) > 1)
        for gone in now["dropped"]:
            with box("line ends"):
                text(f"{gone} was dropped", "small cut")
                back = [{"do": "add_source", "name": gone}]
                button(
                    "Take back …",
                    lambda d=back, n=gone: self.ask(d, title=f"Take {n} back"),
                    "tiny",
                    label=f"take {gone} back",
                )
        with box("line wrap"):
            name = field("New source").style("flex: 1 1 8rem")
            path = field("Path, as under data:").style("flex: 2 1 10rem")
            share = field("Share, %").style("width: 6rem")

            async def add() -> None:
                do = {
                    "do": "add_source",
                    "name": name.value,
                    "source": {"path": path.value},
                    "weight": number(share.value) / 100,
                }
                await self.ask(
                    [do],
                    title=f"Add the source {name.value}",
                    says="It is tokenized between two steps; that may take a while.",
                )

            button("Add …", add, "tiny")


def _choice(label: str, names: list[str]) -> ui.select:
    """One of the names that the trainer takes here."""
    found = ui.select(names, value=names[0] if names else None, label=label)
    return found.props("outlined dense options-dense").classes("grow")
