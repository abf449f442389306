"""Compares this project's layers with files of reference vectors.

Exit codes: 0 all agree; 1 some quantity differs; 2 a file is damaged, or there is no vector.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.vectors import infini, phd, ring, rwkv4, rwkv7, speculative, ttt
from tests.vectors.layers import Check

BOUND = 1e-10
CHECKS: dict[str, Check] = {
    "infini": infini.check,
    "phd": phd.check,
    "ring": ring.check,
    "rwkv4": rwkv4.check,
    "rwkv7": rwkv7.check,
    "speculative": speculative.check,
    "ttt": ttt.check,
}
OF_THE_FILE = ("speculative",)  # kinds whose file says something beside its vectors: one vector more


class DamagedError(Exception):
    """A file that cannot be read, or does not hold what its kind has."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.vectors", description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="file of vectors, or folder of such files")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    results, skipped = [], []
    try:
        for file in find_files(options.paths):
            kind, vectors = read_file(file)
            if kind not in CHECKS:
                skipped.append(file.name)
                print(f"{file.name} skipped: no check of {kind!r}")
                continue
            for result in compare(file.name, CHECKS[kind], vectors):
                results.append(result)
                word = "ok" if result["passed"] else "FAIL"
                shown = "not finite" if result["difference"] is None else f"{result['difference']:.1e}"
                print(f"{file.name} {result['index']} {result['quantity']} {shown} {word}")
        if not results:
            raise DamagedError(f"{', '.join(map(str, options.paths))}: no vector of a kind that can be checked")
    except DamagedError as error:
        print(error, file=sys.stderr)
        return 2
    passed = all(result["passed"] for result in results)
    if options.json:
        print(json.dumps({"passed": passed, "bound": BOUND, "results": results, "skipped": skipped}))
    return 0 if passed else 1


def find_files(paths: Sequence[Path]) -> list[Path]:
    """List the files named, and the .json files of the folders named."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DamagedError(f"{path}: no such file or folder")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return files


def read_file(file: Path) -> tuple[str, list[Any]]:
    """Read a file's kind, and its vectors; other kinds may keep theirs under other names."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{file}: cannot be read: {error}") from error
    kind = found.get("layer", found.get("method", file.stem)) if isinstance(found, dict) else None
    if not isinstance(kind, str):
        raise DamagedError(f"{file}: is not a mapping with the name of a layer")
    lists = [found[name] for name in ("vectors", "attention", "models") if name in found]
    vectors = [vector for each in lists if isinstance(each, list) for vector in each]
    if kind in CHECKS and not (vectors and all(isinstance(each, list) and each for each in lists)):
        raise DamagedError(f"{file}: has no vectors")
    if kind in OF_THE_FILE:
        vectors = [*vectors, {name: value for name, value in found.items() if name != "vectors"}]
    return kind, vectors


def compare(name: str, check: Check, vectors: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield the result of every quantity of every vector; the worst one where a quantity is found in several ways."""
    for index, vector in enumerate(vectors):
        worst: dict[str, float] = {}
        try:
            for quantity, ours, theirs in check(vector):
                if ours.shape != theirs.shape:
                    raise ValueError(f"{quantity} has shape {list(theirs.shape)}, not {list(ours.shape)}")
                found = float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))
                # A difference that is no number must not lose against one that is.
                known = worst.get(quantity, 0.0)
                worst[quantity] = found if math.isnan(found) or found > known else known
        except (LookupError, TypeError, ValueError, RuntimeError) as error:  # whatever wrong shapes and types raise
            raise DamagedError(f"{name}, vector {index}: {type(error).__name__}: {error}") from error
        for quantity, difference in worst.items():
            passed = difference <= BOUND
            shown = difference if math.isfinite(difference) else None  # JSON has no word for it
            yield {"file": name, "index": index, "quantity": quantity, "difference": shown, "passed": passed}


if __name__ == "__main__":
    sys.exit(main())
