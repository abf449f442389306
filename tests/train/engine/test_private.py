"""The list of DeepSpeed's private names: what the engine uses, no more and no less, and what DeepSpeed still has."""

import ast
import re
from pathlib import Path

import deepspeed

from moe_train.train.engine.private import PRIVATE

ENGINE = Path("moe_train/train/engine")


def used_names() -> set[str]:
    """Names of a leading underscore that the engine reads of, or defines for, objects that are not its own."""
    found, own = set(), set()
    for path in ENGINE.rglob("*.py"):
        if path.name == "private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                own.add(node.attr)
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"_\w+", node.value):
                found.add(node.value)
    overridden = set(PRIVATE) & own
    return {name for name in found if name.startswith("_") and not re.fullmatch(r"__\w+__", name)} - own | overridden


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_the_list_is_what_the_engine_uses() -> None:
    underscored = {name for name in PRIVATE if re.fullmatch(r"_[^_]\w*", name)}
    assert underscored == {name for name in used_names() if name.startswith("_")}
    source = "".join(path.read_text(encoding="utf-8") for path in ENGINE.rglob("*.py") if path.name != "private.py")
    assert [name for name in PRIVATE if not re.search(rf"\b{name}\b", source)] == []


def test_deepspeed_has_every_name() -> None:
    source = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in Path(deepspeed.__file__).parent.rglob("*.py")
        if {"runtime", "utils", "ops", "git_version_info.py"} & set(path.parts)
    )
    missing = [name for name in PRIVATE if not re.search(rf"\b{name}\b", source)]
    assert missing == []
