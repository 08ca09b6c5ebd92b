"""A storm of random requests at a live stage: what comes of each, checked in the optimizer, the sampler and the model."""
# ruff: noqa: E731, E501  a table of actions, one a line, each with how it is seen

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.steering.live import answer, put
from tests.toy import graph
from tutelage.core import acts, artifact, steer
from tutelage.core.parts import mix_weights
from tutelage.core.run import run_graph

Do = dict[str, Any]


@dataclass
class Storm:
    """Sends one request a look, the stage paused between them, and checks what the one before came to."""

    home: Path
    count: int
    rng: random.Random
    spare: dict[str, Any]  # a source that may be added
    sent: int = 0
    made: int = 0  # sources that were added so far
    several: bool = False  # each request has a few actions, valid by themselves, and is asked dry first
    last: tuple[str, bool, Do, Callable[[Any], bool]] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def look(self, stage: Any) -> None:
        """Called between steps, before requests are read."""
        if self.last:
            (self.compared if self.several else self.checked)(stage)
        if self.sent == self.count:
            put(self.home, "end", {"by": "ada", "do": [{"do": "end_stage"}, {"do": "resume"}]})
            self.last, self.sent = None, self.sent + 1
        elif self.sent < self.count and self.several:
            name = f"r{self.sent:06d}"
            acts = [self.valid(stage)[0] for _ in range(self.rng.randint(2, 4))]
            do = [*acts, {"do": "pause"}]  # so that it is looked at right after
            for id, dry in ((f"{name}-dry", True), (f"{name}-now", False)):
                put(self.home, id, {"by": "ada", "actor": "person", "do": do, "dry": dry})
            self.last = (name, True, {"do": do}, lambda stage: True)
            self.sent += 1
        elif self.sent < self.count:
            name, valid = f"r{self.sent:06d}", self.rng.random() < 0.5
            do, seen = self.valid(stage) if valid else (self.invalid(stage), lambda stage: True)
            torn = not valid and self.rng.random() < 0.1
            put(self.home, name, {"by": "ada", "actor": "person", "do": [do]})
            if torn:
                (self.home / f"requests/{name}.json").write_text('{"by": "ada", "do": [{"do"')
            self.last = (name, valid, do, seen)
            self.sent += 1

    def checked(self, stage: Any) -> None:
        assert self.last
        name, valid, do, seen = self.last
        try:
            state = answer(self.home, name)["state"]
        except FileNotFoundError:
            state = "lost"
        self.counts[f"{'valid' if valid else 'invalid'} {state}"] += 1
        self.counts[f"do {do.get('do')}" if valid else "do wrong"] += 1
        if state != ("applied" if valid else "refused"):
            self.wrong.append(
                f"{name}: {do} was {state}: {answer(self.home, name).get('error') if state != 'lost' else ''}"
            )
        elif valid and not seen(stage):
            self.wrong.append(f"{name}: {do} was applied and is not seen")

    def compared(self, stage: Any) -> None:
        """Asked dry, a request is refused as it is in earnest, or shows what it then does."""
        assert self.last
        name, _, do, _ = self.last
        dry, now = (answer(self.home, f"{name}-{which}") for which in ("dry", "now"))
        self.counts[now["state"]] += 1
        if (dry["state"], dry.get("error")) != ({"applied": "dry"}.get(now["state"], now["state"]), now.get("error")):
            self.wrong.append(
                f"{name}: {do} was {dry['state']} ({dry.get('error')}), then {now['state']} ({now.get('error')})"
            )
        elif now["state"] == "applied" and changes(dry) != changes(now):
            self.wrong.append(f"{name}: {do} showed {changes(dry)} and did {changes(now)}")

    # -- requests -----------------------------------------------------------------------------------------------------

    def valid(self, stage: Any) -> tuple[Do, Callable[[Any], bool]]:
        """An action that can be done now, and how to see that it was."""
        rng, own, groups = self.rng, stage.own(), stage.engine.optimizer.param_groups
        tick, step, mlp = stage.clock.tick, stage.clock.step, "*layers.0.mlp*"
        frozen = not any("layers.0.mlp" in name for name in stage.engine.params)
        kind = rng.choice(
            [
                "lr",
                "base",
                "clip",
                "decay",
                "scale",
                "mix",
                "unmix",
                "add",
                "drop",
                "skip",
                "freeze",
                "unfreeze",
                "reset",
                "save",
                "eval",
                "sample",
                "step",
                "step",
                "step",
                "extend",
                "rollback",
                "branch",
                "note",
                "undo",
                "pause",
            ]
        )
        rate = 10 ** rng.uniform(-4, -2)
        if kind in ("lr", "base"):
            share = acts.factor(stage) if kind == "lr" else 1.0
            used = lambda s: abs(acts.base_rate(s.engine.optimizer) * share - rate) < 1e-12
            return {"do": "set", "path": f"optim.{kind}", "to": rate}, used
        if kind == "clip":
            return {"do": "set", "path": "engine.clip", "to": rate * 100}, lambda s: s.engine.clip == rate * 100
        if kind == "decay":
            decays = lambda s: {g["weight_decay"] for g in s.engine.optimizer.param_groups} <= {0.0, rate}
            return {"do": "set", "path": "optim/adamw.decay", "to": rate}, decays
        if kind == "scale":
            now, by = [g["base_lr"] for g in groups], rng.choice([0.5, 0.9, 1.1])
            return {"do": "scale", "path": "optim.lr", "by": by}, lambda s: [
                g["base_lr"] for g in s.engine.optimizer.param_groups] == [n * by for n in now]  # fmt: skip
        if kind == "mix":
            weights = {name: rng.uniform(0.1, 1) for name in own}
            whole = sum(weights.values())
            mixed = lambda s: all(abs(w - weights[n] / whole) < 1e-9 for n, w in mix_weights(s).items())
            return {"do": "mix", "weights": weights}, mixed
        if kind == "unmix":
            return {"do": "mix", "weights": {}}, lambda s: s.steered.mix is None
        if kind == "add" and len(stage.sources) < 6:
            self.made += 1
            name = f"new{self.made}"
            there = lambda s: name in s.own() and name in s.sources and name in s.view.heldout and (
                abs(mix_weights(s)[name] - 0.05) < 1e-9 or (not s.steered.mix and {*s.own()} <= {*s.steered.added}))  # fmt: skip
            return {"do": "add_source", "name": name, "source": self.spare, "weight": 0.05}, there
        if kind == "add" and stage.steered.dropped:
            back = stage.steered.dropped[0]
            return {"do": "add_source", "name": back}, lambda s: back in s.own()
        if kind == "drop" and len(own) > 1:
            gone = rng.choice(own)
            if stage.steered.mix is None or any(w for n, w in stage.steered.mix.items() if n != gone and n in own):
                return {"do": "drop_source", "name": gone}, lambda s: gone not in mix_weights(s)
        if kind == "skip":
            source, rows = rng.choice(own), rng.randint(1, 3)
            before = stage.stream.cursors()[source]
            return {"do": "skip_data", "source": source, "rows": rows}, lambda s: s.stream.cursors()[source] != before
        if kind == "freeze" and not frozen:
            gone = lambda s: not any("layers.0.mlp" in name for name in s.engine.params)
            return {"do": "freeze", "modules": [mlp]}, gone
        if kind == "unfreeze":
            back = lambda s: sum("layers.0.mlp" in n for n in s.engine.params) == 3
            return {"do": "unfreeze", "modules": [mlp]}, back
        if kind == "reset":
            old = stage.engine.model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().clone()
            new = lambda s: not s.engine.model.get_parameter("model.layers.0.self_attn.q_proj.weight").equal(old)
            return {"do": "reset", "modules": ["*layers.0.self_attn*"]}, new
        if kind == "save":
            return {"do": "save"}, lambda s: (self.home / f"state/{tick:09d}/kept").exists()
        if kind == "eval":
            return {"do": "eval"}, lambda s: s.view.signals["eval/tick"] == tick
        if kind == "sample":
            said = lambda s: "text" in answer(self.home, f"r{self.sent - 1:06d}")["effects"][0]
            return {"do": "sample", "prompt": "a", "tokens": 2}, said
        if kind == "extend":
            until = step + rng.randint(200, 400)
            return {"do": "extend", "until": f"{until}step"}, lambda s: s.clock.total["step"] == until
        if kind == "rollback" and any(int(p.name) for p in artifact.states(self.home / "state")):
            ticks = [int(path.name) for path in artifact.states(self.home / "state")]
            to = rng.choice(ticks)
            then = json.loads((self.home / f"state/{to:09d}/state.json").read_text())["clock"]["step"]
            return {"do": "rollback", "to": to}, lambda s: s.clock.step == then and s.clock.tick == tick + 1
        if kind == "branch":
            return {"do": "branch", "name": "twig"}, lambda s: (self.home / f"state/{tick:09d}/kept").exists()
        if kind == "undo":
            able = [
                n
                for n, e in stage.standing.done.items()
                if e["do"] == "applied" and e["effects"][0].get("path") == "optim.lr"
            ]
            if able:
                which = rng.choice(able)
                base = stage.standing.done[which]["undo"][0]["to"]
                return {"do": "undo", "id": which}, lambda s: abs(acts.base_rate(s.engine.optimizer) - base) < 1e-12
        if kind == "pause":
            return {"do": "pause"}, lambda s: s.standing.paused
        if kind == "note":
            return {"do": "note", "text": "\u2603 " * rng.randint(0, 50)}, lambda s: True
        taken = rng.randint(1, 2)
        return {"do": "step", "n": taken}, lambda s: s.clock.tick == tick + taken

    def invalid(self, stage: Any) -> Any:
        """Something that cannot be done, from a wrong word to a wrong world."""
        rng = self.rng
        path = rng.choice(["optim.beta", "model.__class__", "../lr", "", "engine.optimizer.step", "optim.lr.lr"])
        return rng.choice([
            {"do": "explode"}, {"do": None}, {}, [], "reset", 7, None,
            {"do": "set", "path": path, "to": 1}, {"do": "set", "path": "optim.lr", "to": rng.choice(["x", -1, 1e300, [], True])},
            {"do": "set", "path": "optim.lr", "to": 1e-3, "extra": 1}, {"do": "scale", "path": "optim.lr", "by": rng.choice([0, -1, 1e9])},
            {"do": "scale", "path": "optim.lr"}, {"do": "mix", "weights": {"nobody": 1}}, {"do": "mix", "weights": {stage.own()[0]: 0}},
            {"do": "mix", "weights": [1, 2]}, {"do": "add_source", "name": "../x", "source": self.spare},
            {"do": "add_source", "name": "y", "source": {"path": "/nowhere/at/all.jsonl"}}, {"do": "add_source", "name": "z"},
            {"do": "add_source", "name": "w", "source": {"use": "subprocess:Popen", "args": {"args": ["false"]}}},
            {"do": "drop_source", "name": "nobody"}, {"do": "skip_data", "source": "nobody", "rows": 1},
            {"do": "skip_data", "source": stage.own()[0], "rows": -5}, {"do": "freeze", "modules": ["*"]},
            {"do": "freeze", "modules": ["no_such_part"]}, {"do": "reset", "modules": []}, {"do": "reset", "modules": "["},
            {"do": "sample", "prompt": "a", "tokens": 10**9}, {"do": "step", "n": 0}, {"do": "extend", "until": "5min"},
            {"do": "extend", "until": "soon"}, {"do": "end_stage", "after": "1min"}, {"do": "end_stage", "decay": True},
            {"do": "rollback", "to": -1}, {"do": "rollback", "to": "first"}, {"do": "branch", "name": "../../etc"},
            {"do": "undo", "id": "nobody"}, {"do": "approve", "id": "nobody"}, {"do": "lock", "actors": ["person"]},
            {"do": "set", "path": "optim/adamw.decay", "to": -1}, {"do": "set", "path": "optim/adamw.lr", "to": 1},
        ])  # fmt: skip


def changes(told: dict[str, Any]) -> list[Any]:
    return [effect.get("changes") for effect in told["effects"]]


def storm(folder: Path, *, count: int, seed: int, several: bool = False) -> Storm:
    """Send `count` requests to the toy's first stage; what became of them."""
    home = folder / "runs/toy/one/1"
    sources: dict[str, Any] = {}

    def change(recipe: dict[str, Any]) -> None:
        stages = recipe["stages"]
        sources["b"] = stages["two"]["data"]["b"]
        stages["one"]["data"]["b"] = sources["b"]
        stages["one"] |= {"save": {"every": "1000step", "keep": 2}, "evals": {"every": "none", "passages": 1, "final": 1},
                          "schedule": {"use": "schedule/constant"}}  # fmt: skip

    made = graph(folder, steps=400, change=change)
    source = sources["b"] if isinstance(sources["b"], dict) else {"path": sources["b"]}
    found = Storm(home, count, random.Random(seed), source, several=several)
    put(home, "halt", {"by": "ada", "do": [{"do": "pause"}]})
    collect = steer.collect

    def collected(stage: Any) -> Any:
        if stage.standing.paused or stage.standing.stopped_at(stage.clock.tick):
            found.look(stage)
        return collect(stage)

    steer.collect, poll, steer.POLL = collected, steer.POLL, 0.0
    try:
        result = run_graph(made, only="one", jobs=0, drift="refuse", tell=lambda stage, said: None)
    finally:
        steer.collect, steer.POLL = collect, poll
    assert not result.failed and not result.stopped, result
    assert not list((home / "requests").iterdir())
    return found
