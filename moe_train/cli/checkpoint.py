"""Command `moe-train checkpoint`: list, verify, inspect, compare, remove and export the checkpoints of a run."""

import argparse
import contextlib
import io
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_train.cli.paths import path_argument, url_argument
from moe_train.config.command_line import Parser
from moe_train.config.errors import UsageError
from moe_train.config.yaml_text import write_yaml

if TYPE_CHECKING:
    from moe_train.checkpoint.manifest import Manifest
    from moe_train.checkpoint.verification import Verification

EXIT_DIFFERENT = 1  # damage was found, or two checkpoints differ
Show = Callable[[Any], None]


def run(arguments: Sequence[str]) -> int:
    """Run a subcommand of `moe-train checkpoint`.

    Args:
        arguments: Command line after the name of the command.

    Returns:
        Exit code: 0, or 1 if verify found damage or diff found a difference.

    Raises:
        UsageError: If an argument is wrong, or a file cannot be read or written.
    """
    options = _parser().parse_args(list(arguments))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an output encoding may lack box characters
    console = Console(highlight=False)
    show: Show = (lambda _: None) if options.json else (lambda shown: console.print(shown, markup=False))
    try:
        code: int = options.action(options, show)
    except OSError as error:  # for example, a run that saves has removed an old checkpoint, or a disk is full
        raise UsageError(f"{error}; a run that is saving may have removed it: try again") from error
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="moe-train checkpoint",
        description="Look after the checkpoints of a run; all but prune also while it runs. "
        "moe-train checkpoint SUBCOMMAND --help tells the options.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)

    def add(name: str, action: Callable[[argparse.Namespace, Show], int], text: str, more: str = "") -> Any:
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip())
        command.allow_abbrev = False
        command.set_defaults(action=action)
        command.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return command

    help_text = "the run's folder (train.run_dir), or its folder of checkpoints"
    run_dir: dict[str, Any] = {"type": path_argument, "metavar": "RUN_DIR", "help": help_text}
    one = "a checkpoint's folder (step_NNNNNNNN), or a run's folder, which means its newest"
    command = add(
        "list", _list, "list the checkpoints of a run", "Also those set aside as damaged, and unfinished ones."
    )
    command.add_argument("run_dir", **run_dir)
    command = add("verify", _verify, "read every byte of checkpoints and find damage", "Exit code 1 if there is any.")
    help_text = "a checkpoint's folder, or a run's for all it has"
    command.add_argument("paths", type=path_argument, metavar="PATH", nargs="+", help=help_text)
    command = add("inspect", _inspect, "show what a checkpoint holds")
    command.add_argument("checkpoint", type=path_argument, metavar="CHECKPOINT", help=one)
    which = command.add_mutually_exclusive_group()
    which.add_argument("--tensor", metavar="NAME", help="show statistics of a tensor's weight and moments")
    which.add_argument("--config", action="store_true", help="print the configuration that wrote it, as YAML")
    more = "Their layouts may differ. Exit code 1 if weights, moments or buffers do."
    command = add("diff", _diff, "compare two checkpoints", more)
    command.add_argument("a", type=path_argument, metavar="A", help=one)
    command.add_argument("b", type=path_argument, metavar="B", help="the other")
    help_text = "relative L2 of a tensor's difference that counts as equal (default: equal bit for bit)"
    command.add_argument("--tolerance", type=float, metavar="X", help=help_text)
    more = "The newest whole one always stays. What killed saves left is removed, unless it is younger than 10 minutes."
    command = add("prune", _prune, "remove old checkpoints", more)
    command.add_argument("run_dir", **run_dir)
    command.add_argument("--keep-last", type=int, required=True, metavar="N", help="keep the newest N")
    help_text = "and those of steps that are a multiple of K"
    command.add_argument("--keep-every", type=int, default=0, metavar="K", help=help_text)
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    more = (
        "The new run folder goes on at the newest one's step, with moments of zero; generate, evaluate and init_from "
    )
    more += "take it like any other. Everything is verified first."
    command = add("average", _average, "write the mean of the weights of several checkpoints", more)
    help_text = "checkpoints' folders; or one run's, for its newest ones (--last)"
    command.add_argument("paths", type=path_argument, metavar="CHECKPOINT", nargs="+", help=help_text)
    command.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of the run")
    help_text = "folder of the new run"
    command.add_argument("--output", type=path_argument, required=True, metavar="NEW_RUN_DIR", help=help_text)
    more = "As safetensors files of whole tensors, with an index and the model's configuration. It is verified first."
    command = add("export", _export, "write a checkpoint's weights alone", more)
    command.add_argument("checkpoint", type=path_argument, metavar="CHECKPOINT", help=one)
    command.add_argument(
        "folder", type=url_argument, metavar="FOLDER", help="the new folder, also a remote one (s3://...)"
    )
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of weights (default: fp32)")
    help_text = "most bytes of a file (default: 5000000000); a larger tensor has a file of its own"
    command.add_argument("--max-shard-bytes", type=int, metavar="N", help=help_text)
    return parser


def _list(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.inventory import checkpoints_folder, list_entries
    from moe_train.checkpoint.tools.tables import entries_table

    folder = checkpoints_folder(options.run_dir)
    entries = list_entries(folder)
    show(entries_table(str(folder), entries))
    _print_json(options, {"folder": str(folder), "checkpoints": [entry.as_dict() for entry in entries]})
    return 0


def _verify(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.folders import list_checkpoints
    from moe_train.checkpoint.inventory import checkpoints_folder, is_checkpoint
    from moe_train.checkpoint.tools.tables import verification_table
    from moe_train.checkpoint.verification import readable_bytes, verify_checkpoint, verify_surroundings

    given = [Path(path) for path in options.paths]
    for path in given:
        if path.name.endswith((".part", ".removed", ".old")):
            raise UsageError(
                f"PATH ({str(path)!r}) is of a save or removal that did not end: give a complete checkpoint"
            )
    runs = [checkpoints_folder(str(path), "PATH") for path in given if not is_checkpoint(path)]
    folders = [path for path in given if is_checkpoint(path)]
    folders += [folder for checkpoints in runs for folder in list_checkpoints(checkpoints)]
    if not folders:
        raise UsageError(
            f"PATH ({options.paths[0]!r}) has no checkpoint: give the train.run_dir of a run that has saved"
        )
    found: list[Verification] = []
    with _progress("verifying", lambda: readable_bytes(folders)) as advance:
        for folder in folders:
            one = verify_checkpoint(folder, advance)
            if one.has_vanished and folder in given:
                raise UsageError(f"PATH ({str(folder)!r}) was removed or replaced while it was read: try again")
            found.append(one)
    found += [verify_surroundings(checkpoints) for checkpoints in runs]
    for one in found:
        show(f"{one.folder} was removed meanwhile" if one.has_vanished else verification_table(one))
    is_whole = all(one.is_whole for one in found)
    show("all whole" if is_whole else "DAMAGE was found")
    _print_json(options, {"whole": is_whole, "folders": [one.as_dict() for one in found]})
    return 0 if is_whole else EXIT_DIFFERENT


def _inspect(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.tools.inspection import inspect_manifest, tensor_statistics
    from moe_train.checkpoint.tools.tables import inspection_tables, statistics_table

    manifest = _read(options.checkpoint, "CHECKPOINT")
    about: dict[str, Any] = {"folder": str(manifest.folder), "step": manifest.step}
    if options.config:
        if not options.json:
            print(write_yaml(manifest.config), end="")
        _print_json(options, about | {"config": manifest.config})
    elif options.tensor is not None:
        found = tensor_statistics(manifest, options.tensor)
        show(statistics_table(options.tensor, found))
        shape = list(manifest.shapes[options.tensor])
        statistics = [one.as_dict() for one in found]
        _print_json(options, about | {"tensor": options.tensor, "shape": shape, "statistics": statistics})
    else:
        inspection = inspect_manifest(manifest)
        for table in inspection_tables(inspection):
            show(table)
        _print_json(options, inspection.as_dict() | {"buffer_values": manifest.buffers})
    return 0


def _diff(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.tools.difference import compare_checkpoints
    from moe_train.checkpoint.tools.tables import difference_tables

    tolerance = options.tolerance
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UsageError(f"--tolerance ({tolerance}) must be a finite number of 0 or more")
    found = compare_checkpoints(_read(options.a, "A"), _read(options.b, "B"), tolerance)
    for table in difference_tables(found):
        show(table)
    within = "bit for bit" if tolerance is None else f"within a relative L2 of {tolerance:g}"
    show(f"weights, moments and buffers are {'equal' if found.is_equal else 'not equal'} {within}")
    _print_json(options, found.as_dict())
    return 0 if found.is_equal else EXIT_DIFFERENT


def _prune(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.folders import Retention
    from moe_train.checkpoint.inventory import checkpoints_folder
    from moe_train.checkpoint.tools.pruning import prune
    from moe_train.checkpoint.tools.tables import as_bytes, plain
    from moe_train.train.checkpoint_hold import hold_checkpoints

    for name, least in (("keep_last", 1), ("keep_every", 0)):
        if getattr(options, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be {least} or more")
    folder = checkpoints_folder(options.run_dir)
    retention = Retention(options.keep_last, options.keep_every)
    with contextlib.nullcontext() if options.dry_run else hold_checkpoints(folder):
        with _progress("verifying the newest", lambda: None) as advance:
            found = prune(folder, retention, options.dry_run, advance)
    for name, problem in found.damaged.items():
        show(plain(f"{name} is damaged: {problem}"))
    if found.damaged:
        whole = f"{found.latest_valid} is the newest whole one and stays" if found.latest_valid else "none is whole"
        show(f"{whole}{'' if found.latest_valid else ': none is removed'}")
    would = "would be removed" if options.dry_run else "removed"
    for name in (*found.removed, *found.leftovers):
        show(f"{would}: {name}")
    for name in found.restored:
        show(f"{'would get' if options.dry_run else 'got'} its name back: {name}")
    for name in found.spared:
        show(f"left, as it may be of a save under way: {name}")
    show(f"kept: {', '.join(found.kept) or 'none'}")
    show(f"{as_bytes(found.freed_bytes)} {'would be freed' if options.dry_run else 'freed'}")
    _print_json(options, found.as_dict() | {"dry_run": options.dry_run, "folder": str(folder)})
    return 0


def _average(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.folders import list_checkpoints
    from moe_train.checkpoint.inventory import checkpoints_folder, find_checkpoint_folder
    from moe_train.checkpoint.manifest import read_manifest
    from moe_train.checkpoint.tools.average import average_checkpoints

    if options.last is None:
        folders = [find_checkpoint_folder(path, "CHECKPOINT") for path in options.paths]
    elif len(options.paths) > 1:
        raise UsageError(f"--last ({options.last}) is for the checkpoints of one run: give one folder")
    else:
        folders = list_checkpoints(checkpoints_folder(options.paths[0], "CHECKPOINT"))
        if len(folders) < options.last:
            raise UsageError(f"--last ({options.last}): {options.paths[0]} has {len(folders)} checkpoints")
        folders = folders[-options.last :] if options.last > 0 else []
    if len({folder.resolve() for folder in folders}) != len(folders) or len(folders) < 2:
        raise UsageError(f"an average is of at least two different checkpoints, and these are {len(folders)}")
    manifests = [read_manifest(folder) for folder in folders]
    num_bytes = sum(entry.num_bytes or 0 for manifest in manifests for entry in manifest.files.values())
    with _progress("verifying", lambda: num_bytes) as advance:
        done = average_checkpoints(manifests, Path(options.output), advance)
    show(f"{done}: the mean of {len(folders)} checkpoints")
    _print_json(options, {"checkpoint": str(done), "averaged": [str(folder) for folder in folders]})
    return 0


def _export(options: argparse.Namespace, show: Show) -> int:
    from moe_train.checkpoint.tools.export import MAX_SHARD_BYTES, export_weights
    from moe_train.checkpoint.tools.tables import as_bytes, plain
    from moe_train.checkpoint.verification import readable_bytes

    limit = MAX_SHARD_BYTES if options.max_shard_bytes is None else options.max_shard_bytes
    if limit < 1:
        raise UsageError(f"--max-shard-bytes ({limit}) must be 1 or more")
    manifest = _read(options.checkpoint, "CHECKPOINT")
    with _progress("verifying", lambda: readable_bytes([manifest.folder])) as advance:
        done = export_weights(manifest, options.folder, options.dtype, limit, advance)
    show(plain(f"{done.folder}: {done.tensors} tensors, {as_bytes(done.bytes)}, {done.shards} files"))
    _print_json(options, done.as_dict() | {"checkpoint": str(manifest.folder), "dtype": options.dtype})
    return 0


def _read(path: str, name: str) -> "Manifest":
    from moe_train.checkpoint.inventory import find_checkpoint_folder
    from moe_train.checkpoint.manifest import read_manifest

    return read_manifest(find_checkpoint_folder(path, name))


def _print_json(options: argparse.Namespace, values: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(values))


@contextlib.contextmanager
def _progress(text: str, total: Callable[[], float | None]) -> Iterator[Callable[[int], object] | None]:
    """Show a progress bar over bytes on standard error, on a terminal only.

    Args:
        text: Description beside the bar.
        total: Called without arguments where the bar is shown; returns the total bytes, or None if unknown.

    Yields:
        A function to call with further bytes; None without a terminal.
    """
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(text, total=total())
        yield lambda read: progress.advance(task, read)
