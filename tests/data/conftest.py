"""Small corpora on disk, and the settings that read them."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_train.config.data import DataConfig

WriteFiles = Callable[[dict[str, str | bytes]], Path]
MakeConfig = Callable[..., DataConfig]

SENTENCE = "the of a to in mixture expert router token gate load balance Größe 日本語 🎈 def"
WORDS = [*SENTENCE.split(), "return\n    indent"]


def make_documents(count: int, seed: int = 0, words: int = 60) -> dict[str, str | bytes]:
    """Different documents by file name, of a few hundred bytes each, with letters of one to four bytes."""
    chooser = random.Random(seed)
    return {f"doc{i:03}.txt": " ".join(chooser.choices(WORDS, k=words)) + f" {i}\n" for i in range(count)}


def age(path: Path, seconds: float = 100.0) -> None:
    """Make a file look as if it had been written some time ago, so that its time stamp is trusted."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.fixture
def write_files(tmp_path: Path) -> WriteFiles:
    """Writes files into the folder "corpus", which it returns."""

    def write(files: dict[str, str | bytes]) -> Path:
        folder = tmp_path / "corpus"
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
            age(path)
        return folder

    return write


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """Settings with a cache of the test's own."""

    def make(**fields: object) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), **fields})

    return make
