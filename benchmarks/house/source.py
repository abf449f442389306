"""What a tree's source says: sizes, functions, docstrings, imports, and where parts are named. Nothing is imported."""

import ast
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "moe_train"
MOST_FUNCTION_LINES = 60
# Names that a configuration can give, by the folder of the parts.
PARTS = {
    "routers": ("noisy_topk", "softmax_topk", "sigmoid_topk", "switch"),
    "mixers": ("attention", "infini", "rwkv4", "rwkv7", "ttt_linear", "ttt_mlp"),
}

# Lines that mean nothing without the line before them, such as "rank: Of this process." or "Likewise."
_STUB = re.compile(r"(^|: )(Of|Likewise)\b")

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class SourceFile:
    """A file of the package.

    Attributes:
        path: Path in the tree, with "/".
        module: Dotted name of the module.
        num_lines: Number of lines.
        tree: Syntax tree.
    """

    path: str
    module: str
    num_lines: int
    tree: ast.Module

    @classmethod
    def parse(cls, path: str, text: str) -> "SourceFile":
        """Parse a file.

        Args:
            path: Path in the tree, with "/".
            text: Content of the file.
        """
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        return cls(path, module, len(text.splitlines()), ast.parse(text, path))


@dataclass(frozen=True)
class SourceFigures:
    """Figures of a tree's source.

    Attributes:
        num_files: Number of files of the package.
        median_lines: Median of their lines.
        biggest_lines: Lines of the longest file.
        biggest_file: Path of that file.
        long_functions: Functions of more than MOST_FUNCTION_LINES lines, as "path:name".
        circles: Groups of modules that import each other, by whatever steps; imports inside functions count.
        docstring_lines: Lines of docstrings that are not blank.
        stub_lines: Docstring lines that do not stand alone.
        router_files: Files that a new router touches: its own ("new") and those that name every router.
        mixer_files: Files that a new mixer touches, counted in the same way.
    """

    num_files: int
    median_lines: float
    biggest_lines: int
    biggest_file: str
    long_functions: tuple[str, ...]
    circles: tuple[tuple[str, ...], ...]
    docstring_lines: int
    stub_lines: int
    router_files: tuple[str, ...]
    mixer_files: tuple[str, ...]


def read_source(root: Path) -> SourceFigures:
    """Measure the source of a tree.

    Args:
        root: Folder that holds the package.
    """
    files = [
        SourceFile.parse(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted((root / PACKAGE).rglob("*.py"))
    ]
    biggest = max(files, key=lambda file: file.num_lines)
    lines = [line for file in files for line in docstring_lines(file.tree)]
    return SourceFigures(
        num_files=len(files),
        median_lines=statistics.median(file.num_lines for file in files),
        biggest_lines=biggest.num_lines,
        biggest_file=biggest.path,
        long_functions=tuple(f"{file.path}:{name}" for file in files for name in long_functions(file.tree)),
        circles=tuple(circles({file.module: imported_modules(file, files) for file in files})),
        docstring_lines=len(lines),
        stub_lines=sum(is_stub(line) for line in lines),
        router_files=touched_files(files, "routers"),
        mixer_files=touched_files(files, "mixers"),
    )


def long_functions(tree: ast.AST) -> Iterator[str]:
    """Yield the names of functions with more than MOST_FUNCTION_LINES lines, decorators left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if (node.end_lineno or node.lineno) - node.lineno + 1 > MOST_FUNCTION_LINES:
                yield node.name


def docstring_lines(tree: ast.AST) -> Iterator[str]:
    """Yield the lines of all docstrings of modules, classes and functions that are not blank."""
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            yield from (line for line in (ast.get_docstring(node) or "").splitlines() if line.strip())


def is_stub(line: str) -> bool:
    """Return whether a docstring line does not stand alone."""
    return _STUB.search(line) is not None


def imported_modules(file: SourceFile, files: Sequence[SourceFile]) -> set[str]:
    """Find the package's modules that a file imports, also inside functions and for type checkers.

    A module that `importlib.import_module` gets by a constant name counts as well. A line of the registry does not: the
    object is imported only if a configuration names it.
    """
    known = {other.module for other in files}
    found = set()
    for name in _imported_names(file.tree):
        target = name if name in known else name.rpartition(".")[0]
        if target in known and target != file.module:
            found.add(target)
    return found


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield dotted names; `from a import b` gives "a.b"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def circles(arrows: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Find the groups of modules that reach each other.

    Args:
        arrows: Modules that each module imports.
    """
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, waiting = set[str](), [start]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    return sorted({tuple(sorted(b for b in reached[a] if a in reached[b])) for a in arrows if a in reached[a]})


def touched_files(files: Sequence[SourceFile], folder: str) -> tuple[str, ...]:
    """Find the files that one touches for a new part: its own, and those that name all parts of its kind.

    A file names a part where a text in its code is the part's name, or leads to the part's module, or where it imports
    that module; docstrings and messages do not count. A file that names some parts and not others treats them in a way
    of their own, which a new part does not need. Where there is only one part, as with mixers, every file that names it
    counts, whatever the reason.

    Args:
        files: Files of the package.
        folder: Folder of the parts, a key of PARTS.
    """
    naming = [file.path for file in files if all(names_part(file.tree, folder, name) for name in PARTS[folder])]
    return ("new", *naming)


def names_part(tree: ast.AST, folder: str, name: str) -> bool:
    """Return whether code names a part, as `touched_files` says."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    module = re.compile(rf"\.{folder}\.{name}\b")
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose
    )
    return any(text == name or module.search(text) for text in (*texts, *_imported_names(tree)))
