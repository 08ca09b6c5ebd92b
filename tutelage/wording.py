"""Actions as people type them: `set optim.lr 3e-4`, `mix prose=1 code=3`, several with a `+` between them. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tutelage.base.action import parse
from tutelage.base.errors import UserError, did_you_mean

VERBS = {
    "set": "PATH VALUE",
    "scale": "PATH FACTOR",
    "mix": "[SOURCE=SHARE …]; none: the mix method's again",
    "pause": "",
    "resume": "",
    "step": "[N]",
    "save": "",
    "eval": "",
    "sample": "[PROMPT] [--tokens N] [--temperature T]",
    "freeze": "PATTERN …",
    "unfreeze": "PATTERN …",
    "reset": "PATTERN …",
    "add-source": "NAME [PATH] [--weight SHARE]",
    "drop-source": "NAME",
    "skip-data": "SOURCE ROWS",
    "extend": "UNTIL",
    "end-stage": "[--after SPAN] [--decay]",
    "rollback": "[TICK|last] [--skip]",
    "branch": "NAME [KEY=VALUE …] [--to TICK] [--start beside|after|no]",
    "undo": "ID [--weights]",
    "approve": "ID",
    "refuse": "ID",
    "lock": "[agent] [policy]",
    "unlock": "[agent] [policy]",
    "note": "TEXT",
}
LOOKS = ("status", "log")  # what stands alone and asks for nothing


def actions(words: list[str]) -> list[dict[str, Any]]:
    """The actions that words on a command line say; UserError with the verb's usage where they say none."""
    found, rest = [], list(words)
    while rest:
        end = rest.index("+") if "+" in rest else len(rest)
        found.append(action(rest[:end]))
        rest = rest[end + 1 :]
    if not found:
        raise UserError(f"what is to be done? one of: {', '.join(VERBS)}")
    return found


def action(words: list[str]) -> dict[str, Any]:
    """One action."""
    verb = (words or [""])[0]
    if verb not in VERBS:
        known = [*VERBS, *LOOKS]
        if verb in LOOKS:
            raise UserError(f"'{verb}' stands alone: it only looks")
        raise UserError(
            f"'{verb}' is nothing that can be done{did_you_mean(verb, known)} (there are: {', '.join(known)})"
        )
    given = {k: v for k, v in vars(_PARSERS[verb].parse_args(words[1:])).items() if v is not None}
    made = {"do": verb.replace("-", "_"), **given}
    if verb == "mix":
        made["weights"] = dict(_pair(text, verb) for text in given["weights"])
    elif verb == "branch":
        made["sets"] = dict(_pair(text, verb) for text in given["sets"])
    elif verb == "add-source":
        made |= _source(made.pop("path", None))
    elif verb == "note":
        made["text"] = " ".join(given["text"])
    elif verb in ("set", "scale"):
        made |= {key: _number(made[key]) for key in ("to", "by") if key in made}
    elif verb == "rollback" and made.get("to", "last") != "last":
        made["to"] = _whole(str(made["to"]), verb)
    elif verb in ("lock", "unlock") and not given["actors"]:
        del made["actors"]
    parse(made, place=verb)
    return made


def _source(path: str | None) -> dict[str, Any]:
    """A source's path as the trainer, in whatever folder it was started, finds it too."""
    if path is None:
        return {}
    return {"source": {"path": path if path.startswith("stdlib:") else str(Path(path).absolute())}}


def _pair(text: str, verb: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"{verb}: '{text}' is not NAME=VALUE")
    number = _number(value)
    return key, yaml.safe_load(value) if isinstance(number, str) else number


def _number(text: str) -> float | str:
    """A number where it is one (`3e-4` is text in YAML 1.1), else the text: a span, say."""
    try:
        return float(text)
    except ValueError:
        return text


def _whole(text: str, verb: str) -> int:
    try:
        return int(text.replace(",", ""))
    except ValueError as error:
        raise UserError(f"{verb}: '{text}' is not a whole number") from error


class _Words(argparse.ArgumentParser):
    """One verb's words. What is wrong is a UserError, as everywhere."""

    def __init__(self, verb: str) -> None:
        super().__init__(prog=verb, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; write: {self.prog} {VERBS[self.prog]}")


def _parsers() -> dict[str, _Words]:
    made = {verb: _Words(verb) for verb in VERBS}
    for verb, value in (("set", "to"), ("scale", "by")):
        made[verb].add_argument("path")
        made[verb].add_argument(value)
    made["mix"].add_argument("weights", nargs="*")
    made["step"].add_argument("n", nargs="?", type=int)
    made["sample"].add_argument("prompt", nargs="?")
    made["sample"].add_argument("--tokens", type=int)
    made["sample"].add_argument("--temperature", type=float)
    for verb in ("freeze", "unfreeze", "reset"):
        made[verb].add_argument("modules", nargs="+")
    for verb in ("add-source", "drop-source", "branch"):
        made[verb].add_argument("name")
    made["add-source"].add_argument("path", nargs="?")
    made["add-source"].add_argument("--weight", type=float)
    made["skip-data"].add_argument("source")
    made["skip-data"].add_argument("rows", type=int)
    made["extend"].add_argument("until")
    made["end-stage"].add_argument("--after")
    made["end-stage"].add_argument("--decay", action="store_true", default=None)
    made["rollback"].add_argument("to", nargs="?")
    made["rollback"].add_argument("--skip", action="store_true", default=None)
    made["branch"].add_argument("sets", nargs="*")
    made["branch"].add_argument("--to", type=int)
    made["branch"].add_argument("--start", dest="run", choices=("beside", "after", "no"))
    for verb in ("undo", "approve", "refuse"):
        made[verb].add_argument("id")
    made["undo"].add_argument("--weights", action="store_true", default=None)
    for verb in ("lock", "unlock"):
        made[verb].add_argument("actors", nargs="*")
    made["note"].add_argument("text", nargs="+")
    return made


_PARSERS = _parsers()
