"""What is read off a tree's source: sizes, circles, docstrings that do not stand alone, and where parts are named."""

import ast
from pathlib import Path

import pytest

from benchmarks.house.source import (
    PARTS,
    SourceFile,
    circles,
    docstring_lines,
    imported_modules,
    is_stub,
    long_functions,
    names_part,
    read_source,
    touched_files,
)
from moe_train.config.registry import REGISTRY


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """A tree whose package has these files."""
    for path, text in files.items():
        (root / "moe_train" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "moe_train" / path).write_text(text)
    return root


def test_a_small_tree(tmp_path: Path) -> None:
    body = "".join(f"    x = {n}\n" for n in range(60))
    root = write_tree(
        tmp_path,
        {
            "__init__.py": '"""A package."""\n',
            "one.py": '"""Of one."""\n\n\n\ndef f():\n    """Likewise.\n\n    rank: Of it.\n    fine: Rank."""\n',
            "deep/two.py": f"def long():\n{body}\n\ndef short():\n    x = 1\n",
        },
    )
    found = read_source(root)
    assert (found.num_files, found.median_lines, found.biggest_lines) == (3, 9, 65)
    assert found.biggest_file == "moe_train/deep/two.py"
    assert found.long_functions == ("moe_train/deep/two.py:long",)
    assert (found.docstring_lines, found.stub_lines) == (5, 3)
    assert found.circles == ()


@pytest.mark.parametrize("number", [60, 61])
def test_a_function_is_long_from_61_lines_on(number: int) -> None:
    text = "@decorated\ndef f():\n" + "    x = 1\n" * (number - 1)
    assert list(long_functions(ast.parse(text))) == (["f"] if number == 61 else [])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Of one rank.", True),
        ("rank: Of this process.", True),
        ("Likewise.", True),
        ("Sum of one rank.", False),
        ("Offset of a row.", False),
        ("name: Official name.", False),
    ],
)
def test_a_stub(line: str, expected: bool) -> None:
    assert is_stub(line) is expected


def test_docstrings_of_fields_and_texts_are_no_docstrings() -> None:
    text = 'class A:\n    """One.\n\n    Two.\n    """\n\n    x: int = 1\n    """Field."""\n\ny = """Text."""\n'
    assert [line.strip() for line in docstring_lines(ast.parse(text))] == ["One.", "Two."]


def test_circles_go_over_deferred_imports() -> None:
    texts = {
        "moe_train/__init__.py": "import importlib\nimportlib.import_module('moe_train.a')\n",
        "moe_train/a.py": "from moe_train import b\n",
        "moe_train/b.py": "def f():\n    from moe_train.c import thing\n",
        "moe_train/c.py": "import os\nLINE = 'moe_train.a:THING'\n",
        "moe_train/d.py": "from moe_train.a import x\nfrom moe_train import VERSION\n",
    }
    files = [SourceFile.parse(path, text) for path, text in texts.items()]
    arrows = {file.module: imported_modules(file, files) for file in files}
    assert arrows == {
        "moe_train": {"moe_train.a"},
        "moe_train.a": {"moe_train.b"},
        "moe_train.b": {"moe_train.c"},
        "moe_train.c": set(),
        "moe_train.d": {"moe_train.a", "moe_train"},
    }
    assert circles(arrows) == []
    assert circles(arrows | {"moe_train.c": {"moe_train.a"}}) == [("moe_train.a", "moe_train.b", "moe_train.c")]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("KINDS = {'attention': 1}", True),
        ("x: Literal['attention']", True),
        ("LINE = 'package.mixers.attention:KIND'", True),
        ("from package.mixers.attention import Kind", True),
        ("from package.mixers import attention", True),
        ("from package.ops.attention import attend", False),
        ("raise ValueError('attention is all you need')", False),
        ("'attention'", False),  # a docstring
        ("attention = cost.attention", False),
        ("LINE = 'package.mixers.attention_free:KIND'", False),
    ],
)
def test_where_a_part_is_named(code: str, expected: bool) -> None:
    assert names_part(ast.parse(code), "mixers", "attention") is expected


def test_files_to_touch_are_those_that_name_all_parts() -> None:
    texts = {"a": f"KNOWN = {PARTS['routers']}", "b": f"SOME = {PARTS['routers'][1:]}", "c": "X = 'switch'"}
    files = [SourceFile.parse(f"moe_train/{name}.py", text) for name, text in texts.items()]
    assert touched_files(files, "routers") == ("new", "moe_train/a.py")


def test_the_names_are_those_of_the_registry() -> None:
    assert {folder: set(names) for folder, names in PARTS.items()} == {
        "routers": set(REGISTRY["routers"]),
        "mixers": set(REGISTRY["mixers"]),
    }
