"""What a user gets wrong: exit code 2, one message naming both values, quickly, and no rank left behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ProcessResult, run_process
from tests.train.runs import CPU, ROOT, SMALL, train_alone, train_under_deepspeed

SECONDS = 60  # a bound on hanging; on a quiet machine the slowest, under `deepspeed`, takes under 10


def check(result: ProcessResult, *words: str) -> None:
    assert result.returncode == 2, result
    assert result.seconds < SECONDS, result.seconds
    # The token cache may have been built on the way, and says so.
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("tokeniz")]
    assert len(lines) == 1, result
    for word in words:
        assert word in lines[0], lines[0]
    assert "Traceback" not in result.stdout + result.stderr


CASES = [
    (["--model.mo.num_experts=3"], ["--model.mo.num_experts"]),
    (
        ["--model.moe.num_experts=6", "--parallel.expert_parallel_size=4"],
        ["num_experts (6)", "expert_parallel_size (4)"],
    ),
    (["--model.moe.num_experts=4", "--model.moe.top_k=5"], ["top_k (5)", "num_experts (4)"]),
    (["--data.source=text", "--data.paths=/nowhere/at/all.txt"], ["/nowhere/at/all.txt"]),
    (["--config=/nowhere.yaml"], ["/nowhere.yaml"]),
    (["--train.micro_batch_size=3", "--train.global_batch_size=8"], ["(8)", "3 x "]),
    (["--model.vocab_size=100"], ["vocab_size (100)", "257"]),
    (["--train.precision=fp16"], ["fp16", "cuda"]),
    (["--deepspeed", '{"zero_optimization": {"stage": 2}}'], ["zero_optimization.stage (2)", "parallel.zero_stage"]),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[case[0][0] for case in CASES])
def test_one_process(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    check(train_alone(f"--train.run_dir={tmp_path / 'run'}", *arguments), *words)


def test_yaml_with_an_unknown_key(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model:\n  moe:\n    num_expert: 8\ntrain:\n  run_dir: x\n")
    check(train_alone(f"--config={tmp_path / 'bad.yaml'}"), "model.moe.num_expert", "num_experts", "bad.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.moe.num_expert=3"], ["--model.moe.num_expert", "did you mean"]),
        pytest.param(
            ["--model.moe.num_experts=4", "--model.moe.top_k=5"],
            ["top_k (5)", "num_experts (4)"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--model.moe.num_experts=6", "--parallel.expert_parallel_size=4"], ["(6)", "(4)"], marks=pytest.mark.slow
        ),
        pytest.param(
            ["--model.moe.num_experts=6", "--parallel.expert_parallel_size=3"],
            ["world size (2)", "(3)"],
            marks=pytest.mark.slow,
        ),
        (["--data.source=jsonl", "--data.paths=/nowhere/x.jsonl"], ["/nowhere/x.jsonl"]),
    ],
)
def test_two_ranks_under_deepspeed_say_it_once(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    check(train_under_deepspeed(2, *SMALL, f"--train.run_dir={tmp_path / 'run'}", *arguments, timeout=60), *words)


@pytest.mark.slow
def test_an_error_that_is_found_after_the_ranks_have_met_is_said_too(tmp_path: Path) -> None:
    """The first rank then waits until the others have heard of its end: the launcher must not end it meanwhile."""
    (tmp_path / "metrics.jsonl").write_text('garbage\n{"step": 2}\n')
    result = train_under_deepspeed(2, *SMALL, f"--train.run_dir={tmp_path}", timeout=60)
    assert result.returncode == 2, result
    assert result.stderr.count("metrics.jsonl: line 1 is not a record") == 1, result
    assert "Traceback" not in result.stdout + result.stderr


def test_fewer_sequences_than_a_batch(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("a few words, enough for one sequence\n")
    result = train_alone(
        *SMALL,
        "--data.source=text",
        f"--data.paths={tmp_path / 'tiny.txt'}",
        f"--data.cache_dir={tmp_path / 'cache'}",
        f"--train.run_dir={tmp_path / 'run'}",
    )
    assert result.returncode == 2, result
    message = result.stderr.splitlines()[-1]
    assert "train.global_batch_size" in message and "tiny.txt" in message and "1 sequences" in message, message


def test_without_a_home_folder_a_run_needs_no_setting(tmp_path: Path) -> None:
    """As a container's user without an entry: neither HOME nor a list of users names a home folder."""
    unshare = ["unshare", "--user", "--map-user=54321"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    (tmp_path / "t.txt").write_text("a text to be read, and some more of it\n" * 200)
    options = [*SMALL, "--data.source=text", f"--data.paths={tmp_path}/t.txt", "--data.validation_fraction=0"]
    options += ["--train.steps=1", f"--train.run_dir={tmp_path}/run", "--train.sample_tokens=0"]
    environment = CPU | dict.fromkeys(("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME")) | {"TMPDIR": str(tmp_path)}
    command = [*unshare, sys.executable, "-m", "moe_train", "train", *options]
    result = run_process(command, 120, environment, cwd=ROOT)
    assert result.returncode == 0, result
    assert (tmp_path / "moe_train-54321").is_dir() and not (ROOT / "~").exists()
