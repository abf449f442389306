"""Packaging: what pyproject.toml promises, the pinned constraints, the installed command, the Makefile's targets."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TARGETS = ("setup", "train", "test", "test-gpu", "lint", "docs", "help")


def constraints() -> dict[str, Requirement]:
    lines = (line.strip() for line in (ROOT / "requirements/constraints.txt").read_text().splitlines())
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Without the variables by which an outer make (`make test`) would speak to this one.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "PYTHON", "LAUNCH_ARGS", "CONFIG")
    }
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_project_names_its_command_extras_and_version():
    assert PROJECT["scripts"] == {"moe-train": "moe_train.cli.main:main"}
    assert {"test", "bench", "hf", "mpi"} <= set(EXTRAS)
    assert PROJECT["license"] == "Apache-2.0"
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)])
def test_every_dependency_is_pinned_within_its_range(text):
    requirement = Requirement(text)
    pin = constraints()[canonicalize_name(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "==" and "+" not in specifier.version
    assert specifier.version in requirement.specifier


def test_every_constraint_is_one_exact_version():
    pins = constraints()
    assert [name for name, pin in pins.items() if not re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier))] == []


def test_installed_command_runs():
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name="moe-train")
    assert entry_point.value == PROJECT["scripts"]["moe-train"]
    assert callable(entry_point.load())
    command = Path(sys.executable).with_name("moe-train")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_installed_version_is_the_package_version():
    from moe_train import __version__

    assert importlib.metadata.version("moe-train") == __version__


def test_make_help_lists_every_target_and_is_the_default():
    listed = make("help")
    assert listed.returncode == 0, listed.stderr
    for target in TARGETS:
        assert re.search(rf"^make {target}\b", listed.stdout, re.MULTILINE), target
        assert make("-n", target).returncode == 0, target
    assert make().stdout == listed.stdout


def test_make_train_passes_its_arguments():
    done = make("-n", "train", "ARGS=--train.run_dir=runs/a --train.steps=3", "LAUNCH_ARGS=--num_gpus 4")
    assert done.returncode == 0, done.stderr
    command = done.stdout[done.stdout.index("-m moe_train.launch.local ") :]
    script = "launch/train.py --config configs/quickstart.yaml --train.run_dir=runs/a --train.steps=3"
    assert command.index("--num_gpus 4") < command.index(script)


def test_make_test_passes_its_arguments():
    assert "pytest -n 2 --dist loadfile -k router -x" in make("-n", "test", "ARGS=-k router -x").stdout
    assert "pytest -n 0 --dist loadfile -m slow" in make("-n", "test", "ARGS=-m slow").stdout


def test_make_test_leaves_gpus_alone_and_test_gpu_takes_them():
    """The tests fork processes, which CUDA does not survive."""
    assert "DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=;" in make("-n", "test").stdout
    on_gpu = make("-n", "test-gpu", "ARGS=-x").stdout
    assert "DS_ACCELERATOR=cuda .venv/bin/python -m pytest -n 0 -m gpu -x" in on_gpu


def old_python(folder: Path) -> Path:
    """An executable that claims to be Python 3.9."""
    path = folder / "python3.9"
    older = "s/^import sys/import sys; sys.version_info = (3, 9)/"
    path.write_text(f"#!/bin/sh\nshift\nsed '{older}' | {sys.executable} - $@\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", ["missing", "old", "broken"])
def test_setup_refuses_an_unfit_interpreter_in_one_sentence(tmp_path, kind):
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python, reason = {
        "missing": (tmp_path / "nowhere", "was not found"),
        "old": (old_python(tmp_path), "is Python 3.9"),
        "broken": (Path(shutil.which("false") or "/bin/false"), "does not run"),
    }[kind]
    done = make("setup", f"PYTHON={python}", folder=tmp_path)
    assert done.returncode != 0
    said, made = done.stderr.splitlines()
    assert said.startswith("setup: Python 3.11 or newer is needed") and f"{python} {reason}" in said
    assert made.startswith("make: ***")
    assert not (tmp_path / ".venv").exists()
