"""docs/long_context.md: its commands run, in order, on a small model and few steps, and do what the page says."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_train.cli.main import main
from moe_train.config.load import read_yaml
from tests.docs.pages import ROOT, commands, read_page
from tests.processes import ProcessResult
from tests.train.runs import records, run_forked

PAGE = "long_context.md"
STEPS = {"700": "4", "800": "6", "900": "7"}  # of the page, and of this test
SMALL = (
    "--train.steps=4",
    "--model.hidden_size=32",
    "--model.num_layers=2",
    "--model.intermediate_size=32",
    "--model.moe.num_experts=4",
    "--data.tokenizer=bytes",
    "--data.bpe_vocab_size=4096",
    "--data.validation_max_bytes=5000",
    "--train.precision=fp32",
    "--train.sample_tokens=0",
    "--telemetry.every=1",
    "--telemetry.tensorboard=false",
)


@dataclass(frozen=True)
class Recipe:
    """What the commands of the page did.

    Attributes:
        folder: Folder of the runs.
        results: Result of each command that runs a model, by the command.
    """

    folder: Path
    results: dict[str, ProcessResult]

    def result_of(self, *words: str) -> ProcessResult:
        (found,) = [result for text, result in self.results.items() if all(word in text for word in words)]
        return found


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The page's commands but those of the planner, one after the other."""
    folder, results = tmp_path_factory.mktemp("recipe"), {}
    for command in commands(read_page(PAGE)):
        words, ranks = shlex.split(command.text), 1
        if words[:2] == ["moe-train", "plan"]:
            continue
        if words[0] == "torchrun":
            ranks, words = int(words[1].removeprefix("--nproc-per-node=")), ["moe-train", "train", *words[3:]]
        arguments = [_in_small(word, folder) for word in words[1:]]
        if "configs/quickstart.yaml" in command.text:
            arguments += [*SMALL, f"--train.run_dir={folder}/quickstart"]
        results[command.text] = result = run_forked(ranks, *arguments)
        assert result.returncode == 0, result
    return Recipe(folder, results)


def _in_small(word: str, folder: Path) -> str:
    """A word of a command with paths of this machine and few steps."""
    name, equals, value = word.rpartition("=")
    if name == "--train.steps":
        return f"{name}={STEPS[value]}"
    for prefix, place in (("runs/", folder), ("configs/", ROOT / "configs")):
        if value.startswith(prefix):
            return f"{name}{equals}{place / value.removeprefix(prefix)}"
    return word


def test_the_place_in_the_data_is_kept_in_tokens(recipe: Recipe) -> None:
    text = recipe.result_of("--train.run_dir=runs/long").stdout
    assert "model.rope_theta: 10000.0 -> 160000.0" in text and "train.sequence_length: 128 -> 512" in text
    assert "place in the data: 64 sequences of 128 tokens are 16 of 512" in text and "tokens of a step" not in text
    short, long = records(recipe.folder / "quickstart"), records(recipe.folder / "long")
    step = 16 * 128
    assert [line["train/tokens"] for line in short] == [step, 2 * step, 3 * step, 4 * step]
    assert [line["train/tokens"] for line in long[:2]] == [5 * step, 6 * step]
    last = json.loads((recipe.folder / "long/checkpoints/step_00000006/manifest.json").read_text())
    assert last["consumed_sequences"] == 6 * 4


def test_the_long_run_has_the_new_fields(recipe: Recipe) -> None:
    values = read_yaml(recipe.folder / "long" / "config.yaml")
    assert values["model"]["rope_theta"] == 160000 and values["train"]["sequence_length"] == 512
    assert values["train"]["global_batch_size"] == 4 and values["train"]["micro_batch_size"] == 4


def test_ranks_that_share_sequences_go_on(recipe: Recipe) -> None:
    text = recipe.result_of("--parallel.context_parallel_size=2").stdout
    assert "parallel.context_parallel_size: 1 -> 2" in text and "6 steps done, 1 to do" in text
    assert [line["step"] for line in records(recipe.folder / "long")] == [5, 6, 7]


def test_evaluation_beyond_the_length_is_said(recipe: Recipe) -> None:
    assert (
        "--sequence-length (512) is beyond train.sequence_length (128)"
        in recipe.result_of("evaluate --run runs/quickstart").stderr
    )
    assert "warning" not in recipe.result_of("evaluate", "runs/long").stderr


def test_another_batch_is_said(recipe: Recipe, tmp_path: Path) -> None:
    given = [f"--config={recipe.folder}/quickstart/config.yaml", f"--checkpoint.resume={recipe.folder}/quickstart"]
    changes = ["--train.sequence_length=300", "--train.steps=5", f"--train.run_dir={tmp_path}"]
    result = run_forked(1, "train", *given, *changes)
    assert result.returncode == 0, result
    assert "64 sequences of 128 tokens are 28 of 300" in result.stdout  # 8,192 tokens are 27.3
    assert "tokens of a step: 2,048 -> 4,800 (train.global_batch_size x train.sequence_length)" in result.stdout


def test_a_checkpoint_has_the_planned_size(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    run = recipe.folder / "quickstart"
    given = ["--config", str(run / "config.yaml"), f"--train.run_dir={run}", "--device=h100", "--tokens=1", "--json"]
    assert main(["plan", *given]) == 0
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])["run"]["checkpoint_bytes"]
    (written,) = (run / "checkpoints" / "step_00000004").glob("*.safetensors")
    assert 1 <= written.stat().st_size / planned < 1.05  # beside the numbers there are names and ranges


def test_the_comparison_of_the_page_is_why_to_share_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [each.text for each in commands(read_page(PAGE)) if "--compare" in each.text]
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in shlex.split(command)[1:]]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["first"]["fits"] and found["second"]["fits"]
