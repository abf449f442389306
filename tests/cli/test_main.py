"""Subcommands, help and parameter counts."""

import json
import subprocess
import sys

import pytest

from moe_train.cli.main import SUBCOMMANDS, main


def test_no_subcommand_and_an_unknown_one_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["tain"]) == 2
    assert "'tain'" in capsys.readouterr().err


def test_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert name in text


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_mixtral_has_its_published_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["params", "--config", "configs/mixtral_8x7b.yaml", "--json"]) == 0
    count = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert count["total"] == 46_702_792_704
    assert count["active"] == 12_879_925_248


def test_params_needs_a_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["params", "--train.run_dir=x", "--data.tokenizer=my_tokenizer.json"]
    assert main(arguments) == 2
    assert "model.vocab_size" in capsys.readouterr().err


def test_a_failed_run_keeps_its_exit_code_where_nobody_reads(tmp_path) -> None:
    program = (
        "import sys\n"
        "from moe_train.cli.main import run_command\n"
        "from moe_train.config.errors import RunFailed\n"
        "def run(arguments): raise RunFailed('rank 0: lost', 70)\n"
        "sys.exit(run_command(run, [], 'x'))"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", program], stderr=full, timeout=60)
    assert result.returncode == 70
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (70, "rank 0: lost\n")
