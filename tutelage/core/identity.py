"""What a method's code, a folder of weights and a file are, as hashes: the parts of a stage's fingerprint, and how two differ."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from tutelage.base import registry
from tutelage.core import hashes

HOUSE = "tutelage.methods."


@cache
def weights_id(folder: Path) -> str:
    """Hash of the weights and config in a folder."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
    return hashlib.sha256("".join(path.name + file_id(path) for path in files).encode()).hexdigest()[:16]


@cache
def file_id(path: Path) -> str:
    """Hash of a file's content; of a folder's files, if it is one."""
    if path.is_dir():
        return hashlib.sha256("".join(p.name + file_id(p) for p in sorted(path.iterdir())).encode()).hexdigest()[:16]
    return hashes.digest(path, "sha256")[:16]


@cache
def code_id(name: str) -> str:
    """Hash of a method's syntax tree and of what it imports from `_kit`, without docstrings, comments and claims."""
    if ":" in name:
        path = Path(str(registry.module_of(name).__file__))
    else:
        path = registry.path_of(name)
    return hashlib.sha256("\n".join(_code(path)).encode()).hexdigest()[:16]


def _code(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = []
    for node in ast.walk(tree):
        for name in _imported(node):
            file = registry.ROOT.joinpath(*name.removeprefix(HOUSE).split(".")).with_suffix(".py")
            texts += _code(file) if name.startswith(f"{HOUSE}_kit.") and file.exists() else []
    whole = ast.Module([n for n in tree.body if not _claim(n)], [])
    owners: Iterable[Any] = ast.walk(whole)
    for owner in owners:
        body = getattr(owner, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            owner.body = body[1:]
    return [*texts, ast.dump(whole)]


def _imported(node: ast.AST) -> list[str]:
    """Modules, and names within them that may be modules, that a statement imports."""
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def _claim(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in ("effect", "holds")
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(t, ast.Name) and t.id == "BENCH" for t in targets)
    return False


def difference(old: Any, new: Any, *, limit: int = 4) -> str:
    """What changed between two fingerprints' parts, in a line."""
    sides = _leaves(old), _leaves(new)
    before, after = (_named(one, other) for one, other in (sides, sides[::-1]))
    keys = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    shown = [f"{key}: {before.get(key, 'absent')} → {after.get(key, 'absent')}" for key in keys[:limit]]
    return ", ".join(shown) + (f" and {len(keys) - limit} more" if len(keys) > limit else "")


def _named(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """`optim: name` as `optim: {use: name}` where the other side has settings beside the name."""
    return {f"{key}.use" if f"{key}.use" in other else key: value for key, value in one.items()}


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None or not tree:
        return {prefix.rstrip("."): tree}
    return {k: v for key, value in items for k, v in _leaves(value, f"{prefix}{key}.").items()}
