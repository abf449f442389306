"""The scripts of examples/, each run as its own process: what they print, and what they write.

The first one is started as a user starts it. The others are forked with their imports done.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

import pytest

from moe_train.distributed.bootstrap import local_rank_environments
from tests.processes import run_process
from tests.train.runs import CPU, ROOT, fork_server, losses, records

EXAMPLES = ROOT / "examples"
STEPS = 12
NAMES = ("train_and_generate", "own_training_loop", "own_router", "expert_load", "resume_on_more_ranks")


def run_example(name: str, *arguments: str | Path, timeout: float = 120) -> str:
    """What an example prints."""
    words = [str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    environment = local_rank_environments(1)[0] | {"COLUMNS": "120"}
    result = fork_server().start("tests.examples.run_script:main", words, environment, ROOT).wait(timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run of train_and_generate.py, started in a shell's way from another folder, and what the script printed."""
    folder = tmp_path_factory.mktemp("examples") / "run"
    command = [sys.executable, EXAMPLES / "train_and_generate.py", folder, str(STEPS)]
    result = run_process(command, timeout=120, env=CPU, cwd=folder.parent)
    assert result.returncode == 0, result
    return folder, result.stdout


def test_there_are_these_and_each_says_how_to_run_it() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(NAMES)
    for name in NAMES:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert f"    python examples/{name}.py [" in (ast.get_docstring(ast.parse(text), clean=False) or "")
        assert len(text.splitlines()) <= 80


def test_train_and_generate(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert list(losses(folder)) == list(range(1, STEPS + 1))
    assert (folder / "checkpoints" / f"step_{STEPS:08d}" / "manifest.json").is_file()
    told = re.search(r"held-out text: ([\d.]+) bits per byte", printed)
    assert told is not None
    assert float(told[1]) == pytest.approx(records(folder)[-1]["val/bits_per_byte"], abs=5e-4)
    assert printed.count(" goes on with ") == 2
    assert len(re.findall(r"with probability (0\.\d\d)$", printed, re.MULTILINE)) == 3


def test_train_and_generate_goes_on_when_it_is_run_again(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "run")
    printed = run_example("train_and_generate", folder, STEPS + 2)
    assert f"{STEPS} steps done, 2 to do" in printed and f"of step {STEPS + 2} from" in printed


def test_own_training_loop_learns() -> None:
    found = re.findall(
        r"^step +(\d+)  cross-entropy ([\d.]+)  busiest expert ([\d.]+) x mean$",
        run_example("own_training_loop", 40),
        re.MULTILINE,
    )
    assert [int(step) for step, _, _ in found] == [10, 20, 30, 40]
    entropies = [float(entropy) for _, entropy, _ in found]
    assert entropies[-1] < entropies[0] < 5.6  # log(257) = 5.5 is what an untrained model has
    assert all(1.0 <= float(busiest) <= 4.0 for _, _, busiest in found)  # 4: all tokens choose the same two of eight


def test_own_router_trains_and_is_compared(tmp_path: Path) -> None:
    printed = run_example("own_router", tmp_path, STEPS)
    figures = {name: float(value) for name, value in re.findall(r"│ (\w+) +│ ([\d.]+) +│", printed)}
    assert set(figures) == {"softmax_topk", "cosine"}
    for name, value in figures.items():
        assert value == pytest.approx(records(tmp_path / name)[-1]["val/bits_per_byte"], abs=5e-4)
    config = (tmp_path / "cosine" / "config.yaml").read_text(encoding="utf-8")
    assert "router: cosine" in config and "projection_size: 8" in config
    assert losses(tmp_path / "cosine")[1] == pytest.approx(5.5, abs=0.2)  # log(257): no choice matters yet
    assert losses(tmp_path / "cosine") != losses(tmp_path / "softmax_topk")


def test_expert_load_shows_experts_of_every_token(trained: tuple[Path, str]) -> None:
    printed = run_example("expert_load", trained[0], "for x")
    rows = re.findall(r"│ '(.)' +│ (\d) (\d) +│ (\d) (\d) +│", printed)
    assert [row[0] for row in rows] == list("for x")
    assert all(row[1] != row[2] and row[3] != row[4] and max(row[1:]) <= "7" for row in rows)
    bars = re.findall(r"│ +(\d+) +│ ([ ▁▂▃▄▅▆▇█]{8}) │ ([ ▁▂▃▄▅▆▇█]{8}) │", printed)
    assert [int(step) for step, _, _ in bars] == list(range(1, STEPS + 1))


def test_resume_on_more_ranks_gives_the_losses_of_one_rank(tmp_path: Path) -> None:
    printed = run_example("resume_on_more_ranks", tmp_path, STEPS, timeout=180)
    assert f"{STEPS // 2} steps done, {STEPS - STEPS // 2} to do" in printed
    assert "2 x cpu (torchrun), fp32, expert parallel 2" in printed
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "resumed")
    assert list(whole) == list(resumed) == list(range(1, STEPS + 1))
    half = STEPS // 2
    assert [whole[step] for step in range(1, half + 1)] == [resumed[step] for step in range(1, half + 1)]
    # Rounding of fp32 sums of 16 x 64 tokens, carried through six updates.
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert float(re.search(r"biggest difference in \d+ steps: (\S+),", printed)[1]) < 1e-5
