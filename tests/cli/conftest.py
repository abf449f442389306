"""A small trained run that the commands which use one are tried on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ProcessResult
from tests.train.runs import SMALL, run_forked, train_forked

Command = Callable[..., ProcessResult]

PROSE = "The quick brown fox jumps over the lazy dog. "
NUMBERS = "0123456789 "


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a model that shares one head's keys and values, on two sources, with a BPE and experts on two
    ranks."""
    folder = tmp_path_factory.mktemp("trained")
    for name, text in (("prose", PROSE), ("numbers", NUMBERS)):
        for part in ("train", "held_out"):
            (folder / f"{name}_{part}.txt").write_text(text * (40 if part == "train" else 9))
    mixture = [
        {
            "source": "text",
            "paths": [str(folder / f"{name}_train.txt")],
            "validation_paths": [str(folder / f"{name}_held_out.txt")],
        }
        for name in ("prose", "numbers")
    ]
    result = train_forked(
        2,
        *(option for option in SMALL if "validation_max_bytes" not in option),  # the sources name what is held out
        "--model.num_kv_heads=1",
        "--model.kv_layers=1",
        "--data.tokenizer=bpe",
        "--data.bpe_vocab_size=300",
        f"--data.mixture={json.dumps(mixture)}",
        f"--data.cache_dir={folder / 'cache'}",
        "--parallel.expert_parallel_size=2",
        "--train.steps=4",
        "--checkpoint.every=2",
        f"--train.run_dir={folder / 'run'}",
    )
    assert result.returncode == 0, result
    return folder / "run"


def last_object(result: ProcessResult) -> dict[str, Any]:
    """What a command with --json printed on its last line, and that nothing failed."""
    assert result.returncode == 0, result
    return json.loads(result.stdout.splitlines()[-1])


def check_refused(result: ProcessResult, *words: str) -> None:
    """Exit code 2 and one message that has all the words."""
    assert result.returncode == 2, result
    # Text may have been tokenized on the way, which is said.
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("tokeniz")]
    assert len(lines) == 1, result
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.stdout + result.stderr


@pytest.fixture
def refused() -> Callable[..., None]:
    """`check_refused`."""
    return check_refused


@pytest.fixture
def generate(trained_run: Path) -> Command:
    """`moe-train generate` of the trained run."""
    return lambda *arguments, ranks=1: run_forked(ranks, "generate", f"--run={trained_run}", *arguments)


@pytest.fixture
def evaluate(trained_run: Path) -> Command:
    """`moe-train evaluate` of the trained run."""
    return lambda *arguments, ranks=1: run_forked(ranks, "evaluate", f"--run={trained_run}", *arguments)
