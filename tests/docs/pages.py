"""The pages as tests read them: texts, fenced blocks, commands, and the scripts of docs/ that write some of them."""

import importlib.util
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A command of a shell block.

    Attributes:
        page: Name of the page.
        text: On one line, without a comment.
    """

    page: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def page_names() -> list[str]:
    """Every page of the site, as a path below docs/, sorted."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def all_page_names() -> list[str]:
    """Every page of the site, and those that stand at the top of the repository, as paths from docs/."""
    return [*page_names(), "../README.md", "../CONTRIBUTING.md"]


def read_page(name: str) -> str:
    """The text of a page."""
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [body for _, found, body in _FENCED.findall(text) if found == language]


def commands(text: str, page: str = "") -> list[Command]:
    """The commands of the shell blocks, continued lines put together."""
    found = []
    for block in blocks(text, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            bare = re.sub(r"(^|\s)#.*$", "", line).strip()
            if bare:
                found.append(Command(page, bare))
    return found


@cache
def load_script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    if str(DOCS) not in sys.path:
        sys.path.append(str(DOCS))  # as where a script is run from its folder: they import each other
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
