"""Folder of a run: config.yaml, tokenizer.json, metrics.jsonl, tensorboard/, checkpoints/, logs/, summary.json."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml
from moe_train.config.paths import local_path
from moe_train.config.root import Config
from moe_train.data import SubwordTokenizer, Tokenizer


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, with the paths of its files."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    def profile(self, rank: int) -> Path:
        """Return the path of a rank's trace, of the profiled steps."""
        return self.root / "profile" / f"rank_{rank:05d}.json"

    def log(self, rank: int) -> Path:
        """Return the path of a rank's log, with what libraries print."""
        return self.root / "logs" / f"rank_{rank:05d}.log"

    def start_log(self, rank: int, pid: int | str) -> Path:
        """Return the path of the log of a start on this host, until the folder's lock is held."""
        return self.root / "logs" / f"start_{rank:05d}_{socket.gethostname()}_{pid}.log"


def open_run_folder(run_dir: str) -> RunFolder:
    """Create the folder of a run if it does not exist.

    Raises:
        UsageError: If the folder cannot be written.
    """
    folder = RunFolder(local_path(run_dir, "train.run_dir"))
    try:
        folder.log(0).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"train.run_dir ({run_dir!r}): cannot be created: {error}") from error
    if not os.access(folder.root, os.W_OK):
        raise UsageError(f"train.run_dir ({run_dir!r}): is not writable")
    return folder


def save_config(folder: RunFolder, config: Config) -> None:
    """Write the resolved configuration."""
    _replace(folder.config, dump_yaml(config))


def save_tokenizer(folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the tokenizer's file, so that the run can be used without its data; tokenizer bytes has no file."""
    if isinstance(tokenizer, SubwordTokenizer):
        _replace(folder.tokenizer, tokenizer.text)


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
