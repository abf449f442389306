"""Every benchmark's folder: it answers --help, and its files keep to what all files do."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/run.py"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in FOLDER.rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 350, 60


def test_benchmarks_are_found_and_listed() -> None:
    assert len(NAMES) >= 12
    assert re.findall(r"^(\w+)  +\S", benchmarks.__doc__ or "", re.MULTILINE) == NAMES
    assert {path.parent.name for path in FOLDER.glob("*/__main__.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_answers_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "pictures":
        pytest.importorskip("playwright", reason="of the extra `test`")
    main = importlib.import_module(f"benchmarks.{name}.run").main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: python -m benchmarks.{name} ") and "--json" in printed


@pytest.mark.parametrize("name", ["kills", "scaling"])
def test_answers_help_as_a_program(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m benchmarks.{name} ")


def test_bad_options_end_a_program_with_code_2() -> None:
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--model.hidden_sise=3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("benchmarks.checkpoint: ") and "hidden_sise" in done.stderr


@pytest.mark.parametrize("file", FILES)
def test_a_file_keeps_to_the_rules(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    assert "sys.path.insert" not in text
    assert len(text.splitlines()) <= MOST_LINES
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with a docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MOST_FUNCTION_LINES, f"{node.name} has {length} lines"
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            for line in (ast.get_docstring(node) or "").splitlines():
                assert not re.search(r"(^|: )(Of|Likewise)\b", line), f"{line.strip()!r} does not stand alone"


@pytest.mark.parametrize("file", FILES)
def test_public_functions_and_classes_have_docstrings(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    public = (node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_")
    assert [node.name for node in public if not ast.get_docstring(node)] == []
