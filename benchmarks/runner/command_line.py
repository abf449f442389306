"""The options that benchmarks have in common, and how a benchmark runs as a program."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.runner.processes import ROOT, RunFailed
from benchmarks.runner.results import say
from benchmarks.runner.slow_link import SlowLinkUnavailable
from moe_train.config.errors import UsageError, exit_code_of

RESULTS = ROOT / "benchmarks" / "results"
EXIT_INTERRUPTED = 130  # what a shell gives for SIGINT


class BenchmarkParser(argparse.ArgumentParser):
    """Command line of a benchmark: `--json`, its own options, and least values of numbers."""

    def __init__(self, name: str, document: str, *, epilog: str | None = None, takes_fields: bool = False) -> None:
        """Begin with the options that every benchmark has.

        Args:
            name: Folder of the benchmark.
            document: Docstring of its run.py; its first paragraph describes the benchmark.
            epilog: Time and memory that it takes.
            takes_fields: Whether options of `moe-train train` are accepted too; they become `fields`.
        """
        program = f"python -m benchmarks.{name}"
        super().__init__(prog=program, description=document.split("\n\n")[0], epilog=epilog, allow_abbrev=False)
        self._takes_fields = takes_fields
        self._least: dict[str, int] = {}
        self._output: Path | None = None
        self.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")

    def add_number(self, option: str, default: int | None, what: str, *, least: int = 1, metavar: str = "N") -> None:
        """Add an option with a whole number.

        Args:
            option: Name with its dashes.
            default: Value where the option is absent; None: `what` says it.
            what: Help text, without the default.
            least: Smallest value that is accepted.
            metavar: Name of the value in the help.
        """
        self._least[option] = least
        shown = what if default is None else f"{what} (default: {default})"
        self.add_argument(option, type=int, default=default, metavar=metavar, help=shown)

    def add_numbers(
        self, option: str, default: Sequence[int], what: str, *, least: int = 1, metavar: str = "N"
    ) -> None:
        """Add an option with one or more whole numbers; arguments as of `add_number`."""
        self._least[option] = least
        shown = f"{what} (default: {' '.join(map(str, default))})"
        self.add_argument(option, type=int, nargs="+", default=list(default), metavar=metavar, help=shown)

    def add_output(self, what: str, default: Path = RESULTS) -> None:
        """Add `--output`, a folder that is made before anything is measured.

        Args:
            what: Files that are written there.
            default: Folder where the option is absent.
        """
        shown = f"folder of {what} (default: {default.relative_to(ROOT)})"
        self.add_argument("--output", "--out", type=Path, default=default, metavar="FOLDER", help=shown)
        self._output = default

    def read(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Parse and check; bad options end the program with exit code 2.

        Args:
            arguments: Words of the command line; None: those of this process.
        """
        options, fields = self.parse_known_args(arguments)
        if fields and not self._takes_fields:
            self.error(f"unrecognized arguments: {' '.join(fields)}")
        options.fields = fields
        for option, least in self._least.items():
            given = getattr(options, option.removeprefix("--").replace("-", "_"))
            for value in given if isinstance(given, list) else [given]:
                if value is not None and value < least:
                    self.error(f"{option} ({value}) must be {least} or more")
        if self._output is not None:
            try:
                options.output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                self.error(f"--output ({options.output}) cannot be a folder: {error.strerror}")
        return options


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run a benchmark as a program, and exit.

    SIGTERM ends it as an exception does, so that the processes and networks that it made end too. Exit codes beside
    those of `main`: 1 where a process failed or a slow link cannot be made, 2 for bad options, 130 after Ctrl-C.

    Args:
        main: Function of the benchmark's run.py.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (RunFailed, SlowLinkUnavailable, UsageError) as error:
        say(f"{main.__module__.removesuffix('.run')}: {error}")
        sys.exit(exit_code_of(error))
