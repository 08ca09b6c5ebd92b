"""Hands a stage's metrics on to W&B, TensorBoard or Trackio, as a reader of its file: training never depends on it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from tutelage.base.errors import UserError
from tutelage.core.record import dumps, write_whole
from tutelage.core.words import finite, number

EVERY = 5.0  # seconds between looks at the file
_MODULES = {"wandb": "wandb", "tensorboard": "tensorboard", "trackio": "trackio"}  # also what pip calls them
_NUMBERS = (
    "loss",
    "grad_norm",
    "lr",
    "tokens",
    "samples",
    "epochs",
    "flops",
    "padding",
    "tokens_per_second",
    "length",
    "memory",
)


class Tracker(Protocol):
    """One run in an experiment tracker. The same `run` opened again goes on where it was.

    `order` rises from row to row, over restarts too; two rows of one tick (a step, a measurement) differ in it.
    """

    def log(self, values: dict[str, float], texts: dict[str, str], tick: int, order: int) -> None: ...

    def close(self) -> None: ...


class Wandb:
    """Rows are drawn over `tick`. What was handed on in the last second before a kill may be lost, never more."""

    def __init__(self, folder: Path, *, project: str, name: str, run: str, config: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        settings: dict[str, Any] = {"console": "off", "quiet": True}  # the terminal is the display's
        if "x_transaction_log_flush_interval" in wandb.Settings.model_fields:
            settings["x_transaction_log_flush_interval"] = 1.0  # seconds; 15 by itself, and its process dies with ours
        # `resume` by id: a second process writes into the same run
        self.run = wandb.init(
            project=project,
            name=name,
            id=run,
            resume="allow",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(**settings),
        )
        self.run.define_metric("*", step_metric="tick")

    def log(self, values: dict[str, float], texts: dict[str, str], tick: int, order: int) -> None:
        # Its own step only ever rises, and a row stays open for more until the next one begins, or is committed: a tick's
        # measurement would be refused after a restart, and a killed process would take the open row along.
        self.run.log({"tick": tick, **values, **texts}, step=order, commit=True)

    def close(self) -> None:
        self.run.finish()


class Tensorboard:
    def __init__(self, folder: Path, *, project: str, name: str, run: str, config: dict[str, Any]) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        self.writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))  # one folder is one run

    def log(self, values: dict[str, float], texts: dict[str, str], tick: int, order: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, tick)
        for key, text in texts.items():
            self.writer.add_text(key, text, tick)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio:
    def __init__(self, folder: Path, *, project: str, name: str, run: str, config: dict[str, Any]) -> None:
        self.trackio = importlib.import_module("trackio")
        # runs are known by name there, so the name carries the id
        self.trackio.init(project=project, name=f"{name}-{run}", resume="allow", config=config)

    def log(self, values: dict[str, float], texts: dict[str, str], tick: int, order: int) -> None:
        self.trackio.log({**values, **texts}, step=tick)

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {"wandb": Wandb, "tensorboard": Tensorboard, "trackio": Trackio}


def check(names: Sequence[str]) -> None:
    """UserError before anything is trained when a tracker's library is not installed."""
    for name in names:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise UserError(f"report_to: {name} is not installed; `pip install {_MODULES[name]}`, or take it out")


class Follower:
    """Reads new rows of a stage's metrics and hands them to one tracker.

    How far it got stands in `forward-<tracker>.json` in the stage's folder. A stage that resumes cuts the rows after its
    checkpoint and writes them again; rows up to the newest tick that was handed on are then the same and left out.
    """

    def __init__(self, folder: Path, *, tracker: str, project: str, name: str, config: dict[str, Any]) -> None:
        self.path, self.place = folder / "metrics.jsonl", folder / f"forward-{tracker}.json"
        saved = json.loads(self.place.read_text(encoding="utf-8")) if self.place.exists() else {}
        self.run = str(saved.get("run") or uuid.uuid4().hex[:8])
        self.bytes, self.last = int(saved.get("bytes", 0)), str(saved.get("last", ""))
        self.sent = tuple(saved.get("sent", (-1, 0)))  # tick, and 1 when its measurement went too
        self._remember()
        self.tracker = TRACKERS[tracker](folder, project=project, name=name, run=self.run, config=config)

    def pump(self) -> int:
        """Hand on what is new; returns how many rows that was."""
        if not self.path.exists():
            return 0
        count = 0
        with open(self.path, "rb") as handle:
            handle.seek(max(0, self.bytes - len(self.last.encode())))
            if handle.read(len(self.last.encode())).decode(errors="replace") != self.last:
                self.bytes, self.last = 0, ""  # the file was cut and grew again: look through it from the start
            handle.seek(self.bytes)
            for line in handle:
                if not line.endswith(b"\n"):
                    break  # still being written
                count += self._hand_on(json.loads(line))
                self.bytes, self.last = self.bytes + len(line), line.decode()
        if count:
            self._remember()
        return count

    def _hand_on(self, row: dict[str, Any]) -> int:
        key = (int(row["tick"]), int(row["kind"] == "eval"))
        if key <= self.sent:
            return 0
        if row["kind"] == "eval":
            values, texts = dict(row["values"]), dict(row.get("texts", {}))
        else:
            named = [k for k in row if k.startswith(("aux/", "penalty/"))]
            values, texts = {f"train/{k}": row[k] for k in (*_NUMBERS, *named) if k in row}, {}
            values |= {f"share/{name}": share for name, share in row.get("weights", {}).items()}
        self.tracker.log({k: number(v) for k, v in values.items() if finite(v)}, texts, key[0], 2 * key[0] + key[1])
        self.sent = key
        return 1

    def _remember(self) -> None:
        state = {"run": self.run, "bytes": self.bytes, "last": self.last, "sent": list(self.sent)}
        write_whole(self.place, dumps(state) + "\n")

    def close(self) -> None:
        self.pump()
        self.tracker.close()


@contextlib.contextmanager
def forwarding(
    folder: Path,
    trackers: Sequence[str],
    *,
    project: str,
    name: str,
    config: dict[str, Any] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """While the block runs, a thread hands on what a stage writes. Whatever goes wrong there is a warning, once."""
    threads, stop = [], threading.Event()
    for tracker in trackers:
        work = (folder, tracker, project, name, config or {}, warn, stop)
        threads.append(threading.Thread(target=_follow, args=work, name=f"forward-{tracker}", daemon=True))
        threads[-1].start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)  # a tracker that does not answer must not hold a finished stage


def _follow(
    folder: Path,
    tracker: str,
    project: str,
    name: str,
    config: dict[str, Any],
    warn: Callable[[str], None],
    stop: threading.Event,
) -> None:
    try:
        follower = Follower(folder, tracker=tracker, project=project, name=name, config=config)
        while not stop.wait(EVERY):
            follower.pump()
        follower.close()
    except Exception as error:  # a tracker fails in ways of its own, and none may reach training
        warn(f"metrics no longer go to {tracker}: {type(error).__name__}: {error}; training goes on")
