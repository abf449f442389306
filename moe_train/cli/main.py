"""Entry point of the command `moe-train`; each subcommand has its own file in this folder."""

import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable, Sequence

from moe_train.config.errors import EXIT_USAGE, RunFailed, UsageError
from moe_train.config.version import VERSION
from moe_train.distributed.bootstrap import environment, is_first_rank, leave_process_group, rank_number
from moe_train.host.descriptors import has_descriptors
from moe_train.host.processes import descendants, end_processes
from moe_train.liveness.sentinel import RankSentinel, start_sentinel
from moe_train.liveness.signals import EarlyStop

SUBCOMMANDS = {
    "train": "train a model (start it with deepspeed, torchrun, mpirun or srun for more than one process)",
    "launch": "look at the hosts of a hostfile, and start deepspeed, mpirun or torchrun on them",
    "evaluate": "measure a trained model on text: loss, bits per byte, expert load",
    "generate": "continue a text with a trained model",
    "load": "show how the experts of a run share the tokens, the worst layers first",
    "experts": "show what every expert of a trained model works on: its share, and the tokens that are typical of it",
    "checkpoint": "list, verify, inspect, compare, remove and export the checkpoints of a run",
    "convert-attention": "reduce a trained model's keys and values to fewer heads and layers, averaging them",
    "params": "count a configuration's parameters without allocating them",
    "doctor": "examine the ranks, hosts and links of a launcher before a run, and name what is wrong or slow",
    "plan": "say what memory, traffic and time a configuration takes on a cluster, and search for the best layout",
    "parity": "check that every layout of ranks gives the same losses and gradient norms, here or on a cluster",
}
_FIRST_RANK_SPEAKS_SECONDS = 5.0  # the first rank may wait 2.5 beats, until the others know why it ends
EXIT_CLOSED_PIPE, EXIT_INTERRUPTED = 128 + 13, 128 + 2  # as a shell reports SIGPIPE and SIGINT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: Command line without the name of the program; None takes sys.argv.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # DeepSpeed's launcher puts this option before the arguments of the program that it starts.
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank=")]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(f"moe-train {VERSION}")
        return 0
    name = arguments[0]
    if name not in SUBCOMMANDS:
        print(f"moe-train: unknown subcommand {name!r}; known: {', '.join(SUBCOMMANDS)}", file=sys.stderr)
        return EXIT_USAGE
    if name == "train":
        return train(arguments[1:])
    sentinel = start_sentinel(environment()) if name != "launch" else RankSentinel(None)
    command = importlib.import_module(f"moe_train.cli.{name.replace('-', '_')}")
    return run_command(command.run, arguments[1:], f"moe-train {name}", sentinel)


def train(arguments: Sequence[str], program: str = "moe-train train") -> int:
    """Train on this rank. From its first lines on, signals are taken in order and the launcher is watched.

    Args:
        arguments: Command line of the command.
        program: Name of the command in messages.

    Returns:
        The exit code.
    """
    sentinel = start_sentinel(environment())
    # A notebook's process goes on after the command: there, signals stay as they are.
    early = early_stop(sentinel) if has_descriptors() else contextlib.nullcontext()

    def run(words: Sequence[str]) -> int:
        with early:
            return int(importlib.import_module("moe_train.cli.train").run(words, program, sentinel))

    return run_command(run, arguments, program, sentinel)


def early_stop(sentinel: RankSentinel) -> EarlyStop:
    """Make what takes signals before this rank's training begins, and after it."""
    rank, errors = rank_number(), os.dup(2)  # later, the error stream goes to the log

    def say(text: str) -> None:
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(errors, f"rank {rank}: {text}\n".encode())

    def end(code: int) -> None:
        sentinel.leave()
        end_processes(set(descendants(os.getpid())) - {sentinel.pid})
        os._exit(code)

    return EarlyStop(say, end)


def run_command(
    run: Callable[[Sequence[str]], int],
    arguments: Sequence[str],
    program: str,
    sentinel: RankSentinel | None = None,
) -> int:
    """Run a command, and turn an error that carries an exit code into one message and that code.

    If several ranks raise the same error, only the first rank prints it. The other ranks wait a little, because
    launchers end every rank as soon as one has ended.

    Args:
        run: Called with the arguments; returns an exit code.
        arguments: Command line of the command.
        program: Name of the command in messages.
        sentinel: Sentinel of this rank, which is told that the rank leaves.

    Returns:
        The exit code.
    """
    try:
        code = run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a closed output is handled, and not at the end of the interpreter
    except BrokenPipeError:  # the reader has closed the output, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        code = EXIT_CLOSED_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)
        code = EXIT_INTERRUPTED
    except UsageError as error:
        if is_first_rank():
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(_FIRST_RANK_SPEAKS_SECONDS)
        code = EXIT_USAGE
    except RunFailed as error:
        with contextlib.suppress(OSError):  # a closed output changes no exit code
            print(error, file=sys.stderr, flush=True)
        code = error.exit_code  # and out, without waiting for ranks that wait for this one
    if sentinel is not None:
        sentinel.leave()
    leave_process_group(code)
    return code


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items()]
    return "\n".join(
        ["usage: moe-train SUBCOMMAND ...", "", *lines, "", "moe-train SUBCOMMAND --help tells the options."]
    )
