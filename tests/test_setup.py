"""requirements/setup.sh: which build of torch it takes for a GPU and its driver. pip is played by a script."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INDEX = "https://download.pytorch.org/whl"
# A Python that makes an environment of itself, and notes what pip is asked for.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo "command = python -m venv $3" >"$3/pyvenv.cfg" ;;
"-m pip") echo "$@" >>"$PIP_LOG" ;;
*_base_executable*) echo "$0" ;;
*) exec {real} "$@" ;;
esac
"""


class Setup:
    """A copy of what the set-up reads, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pip_log, self.driver = folder, folder / "pip.log", folder / "nvidia_version"
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        shutil.copy(ROOT / "pyproject.toml", folder)
        self.python = folder / "python3"
        self.python.write_text(PYTHON.format(real=sys.executable))
        self.python.chmod(0o755)

    def run(self, driver: str | None, gpu: str = "1", **variables: str) -> subprocess.CompletedProcess[str]:
        self.pip_log.write_text("")
        self.driver.unlink(missing_ok=True)
        if driver is not None:
            self.driver.write_text(driver + "\n")
        environment = dict(os.environ) | {"PYTHON": str(self.python), "PIP_LOG": str(self.pip_log), "GPU": gpu}
        environment |= {"NVIDIA_VERSION": str(self.driver), "TORCH_INDEX_URL": ""} | variables
        script = self.folder / "requirements/setup.sh"
        return subprocess.run(["sh", script], env=environment, capture_output=True, text=True, timeout=60)

    @property
    def torch_line(self) -> str:
        """What pip was asked for torch; "" if it was not asked."""
        return next((line for line in self.pip_log.read_text().splitlines() if " torch==" in line), "")


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.parametrize(
    ("driver", "index"),
    [
        ("580.65.06", None),
        ("570.124.06", "cu128"),
        ("535.183.01", "cu126"),
        ("525.60.13", "cu126"),
        (None, None),  # an image that is built for GPUs on a machine without one
    ],
)
def test_torch_is_built_for_the_driver(setup: Setup, driver: str | None, index: str | None) -> None:
    done = setup.run(driver)
    assert done.returncode == 0, done.stderr
    if index is None:
        assert "--index-url" not in setup.torch_line
    else:
        assert f"--index-url {INDEX}/{index} " in setup.torch_line
    assert "+cpu" not in setup.torch_line


def test_a_driver_that_no_build_knows_is_refused(setup: Setup) -> None:
    done = setup.run("470.82.01")
    assert done.returncode != 0
    assert "470.82.01" in done.stderr and "R525 or newer" in done.stderr
    assert setup.torch_line == ""


def test_without_a_gpu_the_build_is_small(setup: Setup) -> None:
    assert setup.run("535.183.01", gpu="").returncode == 0
    assert "+cpu" in setup.torch_line


def test_what_was_chosen_stays_until_a_driver_needs_another(setup: Setup) -> None:
    assert setup.run(None, gpu="").returncode == 0
    assert setup.run("580.65.06").returncode == 0
    assert "--force-reinstall" in setup.torch_line, "a CPU build gives way to a GPU"
    assert setup.run("580.65.06").returncode == 0
    assert setup.torch_line == ""
    assert setup.run("535.183.01").returncode == 0  # the environment on a host with an older driver
    assert f"{INDEX}/cu126" in setup.torch_line
    assert setup.run("535.183.01").returncode == 0
    assert setup.torch_line == ""


def test_the_users_index_has_the_last_word(setup: Setup) -> None:
    assert setup.run("535.183.01", TORCH_INDEX_URL="https://mirror.example/simple").returncode == 0
    assert "--index-url https://mirror.example/simple " in setup.torch_line
    assert setup.run("535.183.01").returncode == 0
    assert setup.torch_line == ""


def test_a_missing_compiler_is_said(setup: Setup) -> None:
    programs = setup.folder / "programs"
    programs.mkdir()
    for name in (
        "sh",
        "cat",
        "cksum",
        "cp",
        "date",
        "dirname",
        "find",
        "flock",
        "grep",
        "mkdir",
        "rm",
        "sed",
        "tail",
        "uname",
    ):
        found = shutil.which(name)
        if found:
            (programs / name).symlink_to(found)
    done = setup.run("580.65.06", PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert "a C compiler (apt install gcc)" in done.stderr
    assert "compiler" not in Setup.run(setup, None, gpu="", PATH=str(programs)).stderr
