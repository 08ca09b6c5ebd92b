"""YAML that remembers where every key was written, so that an error can say `recipe.yaml:4`; and its way back to text.

PyYAML reads YAML 1.1, where `2e-5` is text, `on` is a boolean and `1:30` is ninety. Recipes are read by the rules of
YAML 1.2 instead: numbers are numbers, `true` and `false` are the only booleans, keys are always text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tutelage.base.clock import Span
from tutelage.base.errors import UserError
from tutelage.base.method import Method

Key = str | int


class Map(dict[str, Any]):
    """A mapping that knows where it stands (`at`) and where each of its keys was written (`places`)."""

    def __init__(self, items: Mapping[str, Any] | None = None, *, at: str = "") -> None:
        super().__init__(items or {})
        self.at = at
        self.places: dict[Key, str] = {}

    def put(self, key: str, value: Any, place: str) -> None:
        self[key] = value
        self.places[key] = place


class Seq(list[Any]):
    """A list that knows where it stands and where each of its items was written."""

    def __init__(self, items: Iterable[Any] = (), *, at: str = "") -> None:
        super().__init__(items)
        self.at = at
        self.places: dict[Key, str] = {}

    def add(self, value: Any, place: str) -> None:
        self.places[len(self)] = place
        self.append(value)


def has(tree: Any, key: Key) -> bool:
    """Whether a mapping has the key, or a list the index."""
    if isinstance(tree, dict):
        return key in tree
    return isinstance(tree, list) and isinstance(key, int) and 0 <= key < len(tree)


def place_of(tree: Any, path: Iterable[Key]) -> str:
    """Where the deepest known part of `path` was written, as `file:line`; empty for what never stood in a file."""
    found = str(getattr(tree, "at", ""))
    for key in path:
        found = getattr(tree, "places", {}).get(key) or found
        if not has(tree, key):
            break
        tree = tree[key]
    return found


_RESOLVERS: tuple[tuple[str, str, list[str] | None], ...] = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", "<<", ["<"]),
)


class _Loader(yaml.SafeLoader):  # PyYAML keeps its rules on the class
    yaml_implicit_resolvers: dict[Any, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[Any, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.Node:
    """Text; PyYAML writes Unicode's line breaks bare, and reads them back as spaces, unless they are quoted."""
    style = '"' if any(mark in value for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
for _tag, _regex, _first in _RESOLVERS:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_regex})$"), _first)

_PLAIN = {f"tag:yaml.org,2002:{tag}" for tag in ("str", "null", "bool", "int", "float")}


class _Builder:
    """Turns PyYAML's nodes into marked mappings and lists."""

    def __init__(self, loader: _Loader, file: str) -> None:
        self.loader, self.file = loader, file
        self.open: set[int] = set()

    def line(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: tuple[Key, ...] = ()) -> Any:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if id(node) in self.open:
            raise UserError(f"{self.line(node)}: an alias contains itself")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                out = Seq(at=self.line(node))
                for i, item in enumerate(node.value):
                    out.add(self.build(item, (*path, i)), self.line(item))
                return out
            assert isinstance(node, yaml.MappingNode), node
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _PLAIN:
            raise UserError(f"{self.line(node)}: no values of kind {node.tag} in a recipe; write text or numbers")
        try:
            return self.loader.construct_object(node, deep=True)
        except ValueError as error:
            raise UserError(f"{self.line(node)}: '{node.value}' cannot be read: {error}") from error

    def mapping(self, node: yaml.MappingNode, path: tuple[Key, ...]) -> Map:
        out, merged = Map(at=self.line(node)), Map()
        for key, value in node.value:
            where = self.line(key)
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{where}: a key is a word, not a list or mapping")
            if key.tag == "tag:yaml.org,2002:merge":
                self.merge(merged, value, path)
            elif key.value in out:
                inside = f" in {dotted(path)}" if path else ""
                first = out.places[key.value].rsplit(":", 1)[-1]
                raise UserError(f"{where}: '{key.value}' is written twice{inside} (first on line {first})")
            else:
                out.put(key.value, self.build(value, (*path, key.value)), where)
        for name, value in merged.items():
            if name not in out:
                out.put(name, value, merged.places[name])
        return out

    def merge(self, into: Map, node: yaml.Node, path: tuple[Key, ...]) -> None:
        """`<<: *base`: keys that the mapping itself does not have."""
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(item, yaml.MappingNode):
                raise UserError(f"{self.line(item)}: `<<` takes a mapping")
            for name, value in (found := self.build(item, path)).items():
                if name not in into:
                    into.put(name, value, found.places[name])


def parse(text: str, *, file: str = "recipe") -> Any:
    """Read YAML into `Map`, `Seq` and plain values. UserError names file and line of what cannot be read."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _Builder(loader, file).build(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        problem = str(error.problem or error.context).replace("\n", " ")
        if "'\\t'" in problem:
            problem = "a tab where YAML wants spaces"
        elif "single document" in str(error.context):
            problem = "a second document begins here; a recipe is one"
        raise UserError(f"{file}{line}: {problem}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not YAML: {str(error).splitlines()[0]}") from error
    finally:
        if loader:
            loader.dispose()


def mark(value: Any, *, at: str = "") -> Any:
    """The same tree for a recipe given as Python objects: nothing has a line, all else is equal."""
    value = value if isinstance(value, (dict, list)) else plain(value)
    if isinstance(value, dict):
        return Map({str(key): mark(item) for key, item in value.items()}, at=at)
    return Seq((mark(item) for item in value), at=at) if isinstance(value, list) else value


def plain(value: Any, *, bare: bool = False) -> Any:
    """Dicts, lists and scalars, as YAML has them. A model's field is left out where it is None and may be; with `bare`
    wherever it has its default (pydantic's `exclude_defaults` leaves out nothing that a serializer of ours writes)."""
    if isinstance(value, Method):
        return {"use": value.name(), **{key: plain(item) for key, item in value.model_dump().items()}}
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        items = {key: getattr(value, key) for key in fields}
        left_out = {k for k, v in items.items() if (bare or v is None) and v == _default(fields[k])}
        left_out -= getattr(value, "inherits", set())
        return {k: plain(v, bare=bare) for k, v in items.items() if k not in left_out}
    if isinstance(value, Mapping):
        return {str(key): plain(item, bare=bare) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, bare=bare) for item in value]
    if isinstance(value, (set, frozenset)):
        return [plain(item, bare=bare) for item in sorted(value)]
    return str(value) if isinstance(value, (Span, Path)) else value


def _default(field: FieldInfo) -> Any:
    """As `FieldInfo.get_default`, which looks at a factory's signature each time: a third of reading a recipe."""
    make: Any = field.default_factory
    return field.default if make is None else make()


def to_yaml(value: Any) -> str:
    """YAML that `parse` reads back equal; innermost mappings and lists stand on one line."""
    text = yaml.dump(plain(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return str(text)


def dotted(path: Iterable[Key]) -> str:
    return ".".join(str(key) for key in path)
