"""Options that benchmarks have in common, and how a benchmark ends as a program."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.runner.command_line import ROOT, BenchmarkParser, exit_with
from benchmarks.runner.slow_link import SlowLinkUnavailable
from moe_train.config.errors import UsageError


def parser(takes_fields: bool = False) -> BenchmarkParser:
    made = BenchmarkParser("some", "What it measures.\n\nHow.", takes_fields=takes_fields)
    made.add_number("--rounds", 5, "timings")
    made.add_number("--threads", None, "threads (default: the cores)")
    made.add_numbers("--micro-batches", (2, 8), "tokens", least=2, metavar="T")
    return made


def refusal(made: BenchmarkParser, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        made.read(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].removeprefix("python -m benchmarks.some: error: ")


def test_defaults_and_values() -> None:
    options = parser().read([])
    assert vars(options) == {"json": False, "rounds": 5, "threads": None, "micro_batches": [2, 8], "fields": []}
    options = parser(takes_fields=True).read(["--json", "--micro-batches", "4", "--train.steps=3"])
    assert options.json and options.micro_batches == [4] and options.fields == ["--train.steps=3"]


def test_what_is_wrong_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(parser(), ["--rounds", "0"], capsys) == "--rounds (0) must be 1 or more"
    assert refusal(parser(), ["--threads", "-1"], capsys) == "--threads (-1) must be 1 or more"
    assert refusal(parser(), ["--micro-batches", "4", "1"], capsys) == "--micro-batches (1) must be 2 or more"
    assert refusal(parser(), ["--train.steps=3"], capsys) == "unrecognized arguments: --train.steps=3"


def test_output_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = parser()
    made.add_output("some.md", ROOT / "benchmarks" / "results")
    for option in ("--output", "--out"):
        assert made.read([option, str(tmp_path / option / "deep")]).output.is_dir()
    (tmp_path / "file").write_text("")
    assert refusal(made, ["--output", str(tmp_path / "file")], capsys).startswith(f"--output ({tmp_path}/file) cannot ")


@pytest.fixture
def kept_handler() -> Iterator[None]:
    """SIGTERM is handled as before after the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("kept_handler")
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("a field"), 2),
        (SlowLinkUnavailable("no command ip"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
    ],
)
def test_errors_become_exit_codes(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    main.__module__ = "benchmarks.some.run"
    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == (
        f"benchmarks.some: {error}\n" if isinstance(error, ValueError | RuntimeError) else ""
    )


@pytest.mark.usefixtures("kept_handler")
def test_sigterm_ends_it_like_an_exception() -> None:
    cleaned_up = []

    def main() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned_up.append(True)
        return 0

    with pytest.raises(SystemExit) as ended:
        exit_with(main)
    assert ended.value.code == 128 + signal.SIGTERM and cleaned_up == [True]
