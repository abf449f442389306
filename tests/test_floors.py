"""Holds the floors of the package: who may import whom, which file opens which big dependency, how large files grow.

Everything is read off the source with ast, nothing is imported; imports inside functions count as well. `violations` is
a pure function of a path and a source text; the tests run it over the tree and over small sources that break each rule.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room imports itself and the rooms before it. Rooms in one line do not import each other.
HOUSE = (
    ("config",),
    ("ops",),
    ("host",),
    ("distributed",),
    ("data",),
    ("model",),
    ("launch",),
    ("doctor",),
    ("liveness",),
    ("checkpoint",),
    ("train",),
    ("infer", "interop", "plan"),
    ("api",),
    ("cli",),
)
LAZY = ("moe_train.api", "moe_train.config.version")  # what moe_train/__init__.py loads when a name is first used
FLOORS = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}

# Big dependencies and the doors of each: files, or folders ending in "/".
DOORS = {
    "deepspeed": ("moe_train/train/engine/",),
    "mpi4py": ("moe_train/distributed/bootstrap.py",),
    "tensorboard": ("moe_train/train/telemetry/",),
    "torch.utils.tensorboard": ("moe_train/train/telemetry/",),
    "torch.distributed": ("moe_train/distributed/", "moe_train/doctor/", "moe_train/launch/torchrun_agent.py"),
    "transformers": ("moe_train/interop/",),
    "lm_eval": ("moe_train/interop/",),
    "datasets": ("moe_train/data/",),
    "tokenizers": ("moe_train/data/",),
    "triton": ("moe_train/ops/triton_kernels.py", "moe_train/ops/triton_tokens.py", "moe_train/ops/triton_ttt.py"),
}
ENVIRONMENT_READERS = ("moe_train/distributed/bootstrap.py", "moe_train/host/", "moe_train/launch/", "launch/")
ENVIRONMENT_NAMES = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70
EMPTY_NAMES = ("utils", "helpers", "common", "manager")


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_behind(path: str, door: str) -> bool:
    return path.startswith(door) if door.endswith("/") else path == door


def called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of what is imported, `from a import b` as "a.b", or used as `torch.distributed`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in DOORS:
            yield node.lineno, ast.unparse(node)


def floor_violations(package: str, name: str) -> Iterator[str]:
    """`package` is the folder below moe_train of the importing file, "" for moe_train/__init__.py itself."""
    _, _, rest = name.partition(".")
    target = rest.split(".")[0]
    if target not in FLOORS:
        yield f"imports {name}, which is on no floor"
    elif not package and name in LAZY:
        return
    elif not package:
        yield f"moe_train/__init__.py imports {name}: it must import nothing of the package"
    elif target != package and FLOORS[target] >= FLOORS[package]:
        yield f"{package} imports {name}, which is not on a floor before its own"


def import_violations(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    parts = path.split("/")
    package = parts[1] if parts[0] == "moe_train" and len(parts) > 2 else ""
    if path == "moe_train/__main__.py":
        package = "cli"  # `python -m moe_train` is the command line
    if path == "moe_train/api.py":
        package = "api"
    if parts[0] == "moe_train" and package not in FLOORS and path not in ("moe_train/__init__.py",):
        yield 1, "is on no floor of the package"
        return
    for line, name in imported_names(tree):
        if parts[0] == "moe_train" and is_inside(name, "moe_train"):
            yield from ((line, message) for message in floor_violations(package, name))
        if package == "config" and is_inside(name, "torch"):
            yield line, f"config uses {name}: configuration must not need torch"
        for dependency, doors in DOORS.items():
            if is_inside(name, dependency) and not any(is_behind(path, door) for door in doors):
                yield line, f"uses {name}, whose door is {' or '.join(doors)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            yield node.lineno, "relative import"


def environment_violations(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if path.startswith(ENVIRONMENT_READERS):
        return
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "os"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            found = ENVIRONMENT_NAMES.intersection(alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            found = ENVIRONMENT_NAMES.intersection([node.attr])
        else:
            continue
        for name in sorted(found):
            yield node.lineno, f"os.{name}: the environment is read in {' and '.join(ENVIRONMENT_READERS)} only"


def size_violations(source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"has {lines} lines, more than {MAX_FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"function {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}"


def name_violations(path: str) -> Iterator[tuple[int, str]]:
    for part in path.removesuffix(".py").split("/"):
        if part in EMPTY_NAMES or part.endswith(tuple("_" + name for name in EMPTY_NAMES)):
            yield 1, f"the name {part} does not say what the module is"


def docstring_violations(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that mean nothing without the line before them: "Of one rank.", "rank: Of this process.", "Likewise."."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for line in (ast.get_docstring(node) or "").splitlines():
            if re.search(r"(^|: )(Of|Likewise)\b", line):
                yield getattr(node, "lineno", 1), f"docstring line {line.strip()!r} does not stand alone"


def violations(path: str, source: str) -> list[str]:
    """What the file `path` (relative to the repository, with "/") breaks, as "path:line: message"."""
    tree = ast.parse(source, path)
    found = [
        *name_violations(path),
        *import_violations(path, tree),
        *environment_violations(path, tree),
        *size_violations(source, tree),
        *docstring_violations(tree),
    ]
    return list(dict.fromkeys(f"{path}:{line}: {message}" for line, message in found))


def source_files() -> list[Path]:
    return sorted(path for folder in ("moe_train", "launch") for path in (ROOT / folder).rglob("*.py"))


def test_tree_holds_the_floors():
    found = [
        message
        for path in source_files()
        for message in violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


def imports_by_file() -> dict[str, set[str]]:
    """The files that each file of the package imports, imports inside functions and for type checkers included."""
    names = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in source_files()}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    found: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        for _, imported in imported_names(ast.parse(path.read_text(encoding="utf-8"))):
            target = imported if imported in names else imported.rpartition(".")[0]
            if target in names and target != name:
                found[name].add(target)
    return found


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, however many steps it takes."""
    reached: dict[str, set[str]] = {}
    for start in arrows:
        seen, waiting = set[str](), [start]
        while waiting:
            new = arrows[waiting.pop()] - seen
            seen |= new
            waiting += new
        reached[start] = seen
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in arrows if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_no_files_import_each_other():
    assert circles(imports_by_file()) == []


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(arrows) == [["a", "b", "c"]]


def test_tree_is_read():
    folders = {path.relative_to(ROOT / "moe_train").parts[0] for path in (ROOT / "moe_train").rglob("*.py")}
    assert set(FLOORS) <= {folder.removesuffix(".py") for folder in folders}


BROKEN = [
    ("moe_train/config/model.py", "import torch", "config uses torch"),
    ("moe_train/config/model.py", "def f():\n    from torch.nn import Linear", "config uses torch.nn.Linear"),
    ("moe_train/config/model.py", "import moe_train.ops.permute", "config imports moe_train.ops.permute"),
    (
        "moe_train/ops/permute.py",
        "from moe_train.distributed import mesh",
        "ops imports moe_train.distributed.mesh",
    ),
    ("moe_train/ops/permute.py", "from moe_train import model", "ops imports moe_train.model"),
    ("moe_train/ops/permute.py", "import torch.distributed as dist", "uses torch.distributed, whose door"),
    ("moe_train/ops/permute.py", "import torch\ntorch.distributed.get_rank()", "uses torch.distributed, whose door"),
    ("moe_train/model/block.py", "from torch import distributed", "uses torch.distributed, whose door"),
    ("moe_train/train/loop.py", "from torch.distributed import barrier", "uses torch.distributed.barrier"),
    ("moe_train/distributed/mesh.py", "import moe_train.model.block", "distributed imports moe_train.model.block"),
    ("moe_train/data/packing.py", "def f():\n    import moe_train.model.moe.layer", "data imports moe_train.model"),
    ("moe_train/checkpoint/writer.py", "import moe_train.train.engine.engine", "checkpoint imports moe_train.train"),
    ("moe_train/data/packing.py", "from moe_train.train.loop import run", "data imports moe_train.train.loop.run"),
    ("moe_train/train/loop.py", "from moe_train.infer import generate", "train imports moe_train.infer"),
    ("moe_train/infer/generate.py", "from moe_train.interop import export", "infer imports moe_train.interop"),
    ("moe_train/plan/memory.py", "from moe_train.cli import main", "plan imports moe_train.cli"),
    ("moe_train/cli/main.py", "import moe_train.nowhere", "on no floor"),
    ("moe_train/cli/main.py", "from moe_train import *", "on no floor"),
    ("moe_train/__init__.py", "from moe_train.config import root", "must import nothing"),
    ("moe_train/extra/thing.py", "", "on no floor"),
    ("moe_train/loose.py", "", "on no floor"),
    ("moe_train/train/loop.py", "import deepspeed", "whose door is moe_train/train/engine/"),
    ("launch/train.py", "from deepspeed.comm import comm", "whose door is moe_train/train/engine/"),
    (
        "moe_train/cli/main.py",
        "import importlib\nimportlib.import_module('deepspeed')",
        "moe_train/train/engine/",
    ),
    ("moe_train/distributed/mesh.py", "from mpi4py import MPI", "whose door is moe_train/distributed/bootstrap.py"),
    ("moe_train/train/loop.py", "import tensorboard.summary", "whose door is moe_train/train/telemetry/"),
    (
        "moe_train/train/loop.py",
        "from torch.utils.tensorboard import SummaryWriter",
        "moe_train/train/telemetry/",
    ),
    ("moe_train/infer/generate.py", "import transformers", "whose door is moe_train/interop/"),
    ("moe_train/train/loop.py", "from datasets import load_dataset", "whose door is moe_train/data/"),
    ("moe_train/infer/generate.py", "import tokenizers", "whose door is moe_train/data/"),
    ("moe_train/train/loop.py", "import os\nos.environ['A'] = '1'", "os.environ"),
    ("moe_train/train/loop.py", "import os as system\nsystem.getenv('A')", "os.getenv"),
    ("moe_train/cli/main.py", "from os import environ", "os.environ"),
    ("moe_train/model/block.py", "from . import cache", "relative import"),
    ("moe_train/model/block.py", "from ..ops.norms import rms_norm", "relative import"),
    ("moe_train/model/block.py", "x = 1\n" * 351, "has 351 lines"),
    ("launch/train.py", "def f():\n" + "    x = 1\n" * 70, "function f has 71 lines"),
    ("moe_train/cli/main.py", "class A:\n  async def f(self):\n" + "    x = 1\n" * 70, "function f has 71 lines"),
    ("moe_train/interop/convert.py", "from moe_train import __version__", "which is on no floor"),
    ("moe_train/train/loop.py", "from moe_train.api import load_run", "not on a floor before its own"),
    ("moe_train/model/block.py", '"""Of one rank."""', "docstring line 'Of one rank.' does not stand alone"),
    ("launch/train.py", 'def f(rank):\n    """Go.\n\n    rank: Of this process.\n    """', "'rank: Of this process.'"),
    ("moe_train/model/block.py", 'class A:\n    """Likewise in evaluation."""', "'Likewise in evaluation.'"),
    ("moe_train/model/utils.py", "", "the name utils"),
    ("moe_train/data/helpers/read.py", "", "the name helpers"),
    ("moe_train/train/checkpoint_manager.py", "", "the name checkpoint_manager"),
]


@pytest.mark.parametrize(("path", "source", "expected"), BROKEN)
def test_a_broken_rule_is_found(path, source, expected):
    found = violations(path, source)
    assert any(expected in message for message in found), found


SOUND = [
    ("moe_train/__init__.py", '__version__ = "0.1.0"'),
    ("moe_train/config/root.py", "import torchlike\nfrom moe_train.config.model import ModelConfig"),
    ("moe_train/ops/permute.py", "import os\nimport torch\nos.path.join('a')\ntorch.nn.functional.relu"),
    (
        "moe_train/distributed/bootstrap.py",
        "import os\nimport torch.distributed as dist\nfrom mpi4py import MPI\nos.environ",
    ),
    ("moe_train/model/block.py", "from moe_train.ops import norms\nfrom moe_train.distributed.mesh import Groups"),
    ("moe_train/train/engine/engine.py", "import deepspeed\nfrom moe_train.data.packing import pack"),
    ("moe_train/train/telemetry/writer.py", "from torch.utils.tensorboard import SummaryWriter\nimport tensorboard"),
    ("moe_train/data/text.py", "import datasets\nfrom tokenizers import Tokenizer"),
    ("moe_train/data/common_crawl.py", ""),
    ("moe_train/interop/convert.py", "import transformers\nfrom moe_train.config.version import VERSION"),
    ("moe_train/api.py", "from moe_train.infer.trained import load_model"),
    ("moe_train/cli/main.py", "from moe_train.infer import generate\nfrom moe_train.plan import memory"),
    ("launch/train.py", "import os\nfrom moe_train.cli.main import main\nos.environ.get('RANK')"),
    ("launch/train.py", "def f():\n" + "    x = 1\n" * 69),
    ("launch/train.py", 'def f(rank):\n    """Go. Of all ranks.\n\n    rank: Rank of this process.\n    """'),
]


@pytest.mark.parametrize(("path", "source"), SOUND)
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []
