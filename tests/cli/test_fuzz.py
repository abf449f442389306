"""No command line ends in a traceback: what is wrong with it is one message, and exit code 2."""

import contextlib
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_train.cli.main import SUBCOMMANDS, main

# Nothing here starts ranks or reads a hub.
COMMANDS = [name for name in SUBCOMMANDS if name not in ("train", "doctor", "parity")]
WORDS = st.sampled_from(
    [
        "list",
        "verify",
        "inspect",
        "diff",
        "prune",
        "export",
        "--run",
        "--json",
        "--step",
        "--steps",
        "--layer",
        "--keep",
    ]
    + ["--output", "--config", "--nodes", "--search", "--device", "--decode", "--hostfile", "--prompt", "--precision"]
    + ["--data.paths", "--model.moe.top_k", "--model.num_layers=3", "--train.steps", "--", "-", "-1", "0", "x", "none"]
    + ["/dev/null", "/", ".", "/nowhere", "None", "[", "1e3", "\udcff", "ä", "--run=/dev/null", "--config=/", "a=b"]
)


def outcome(arguments: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as ended:  # --help, and what argparse of a subcommand ends with
            code = int(ended.code or 0)
    return code, errors.getvalue()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("load", ["list", "\n"])
@given(st.sampled_from(COMMANDS), st.lists(WORDS | st.text(max_size=5), max_size=5))
def test_any_words_after_a_subcommand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, errors = outcome([command, *words])
    assert code in (0, 1, 2), errors
    if code == 2:
        assert errors.count("\n") == 1, errors
        assert errors.startswith("moe-train"), errors


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS | st.text(max_size=5), min_size=1, max_size=3))
def test_any_words(words: list[str]) -> None:
    if words[0] in SUBCOMMANDS:
        return
    code, errors = outcome(words)
    assert code in (0, 2), errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"null", b"train: {steps: x}", b"{: ", b"\xff\xfe"])
)
def test_any_file_in_a_run_folder(tmp_path: Path, name: str, data: bytes) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_00000001"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name if name == "manifest.json" else tmp_path / "run" / name
    path.write_bytes(data)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(data)
    for arguments in (
        ["params", f"--config={path}"],
        ["load", str(tmp_path / "run")],
        ["generate", f"--run={tmp_path / 'run'}", "--prompt=x"],
        ["checkpoint", "list", f"--run={tmp_path / 'run'}"],
        ["plan", f"--loads={tmp_path / 'run'}"],
    ):
        code, errors = outcome(arguments)
        assert code in (0, 1, 2), (arguments, errors)
        assert "Traceback" not in errors
        assert errors.count("\n") <= 1, (arguments, errors)
