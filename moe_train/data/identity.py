"""Identity of the data that a run trains on: a checkpoint keeps it, so that a resumed run can say what has changed."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_train.data.corpus import DigestFiles
from moe_train.data.digests import digest_of
from moe_train.data.index import SKETCH_HASHES
from moe_train.data.selection import SelectedCorpus

MOST_FILES = 256  # files that are named in a checkpoint; of more, only the texts are compared
SHOWN_FILES = 4
HASH_VALUES = 2**64


@dataclass(frozen=True)
class SourceIdentity:
    """Identity of one source.

    Attributes:
        name: Name of the source in messages.
        digest: Digest of all texts, their order, what is held out and what is left out.
        documents: Number of documents, the held-out ones included.
        held_out: Number of held-out documents.
        left_out: Number of documents left out of training because their text is held out.
        files: Digest of each file by its name; empty where there are none or too many.
        sketch: Smallest distinct hashes of the texts, in order.
    """

    name: str
    digest: str
    documents: int
    held_out: int
    left_out: int
    files: Mapping[str, str]
    sketch: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON value for a checkpoint's manifest."""
        return {**asdict(self), "sketch": [f"{value:x}" for value in self.sketch]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "SourceIdentity":
        """Read it from a manifest.

        Raises:
            ValueError, LookupError, TypeError, AttributeError: If it is not such a value.
        """
        return cls(
            name=str(value["name"]),
            digest=str(value["digest"]),
            documents=int(value["documents"]),
            held_out=int(value["held_out"]),
            left_out=int(value["left_out"]),
            files={str(name): str(digest) for name, digest in value["files"].items()},
            sketch=tuple(int(text, 16) for text in value["sketch"]),
        )


def identify(corpus: SelectedCorpus, digest_files: DigestFiles) -> SourceIdentity:
    """Identify a source by its contents."""
    files, index = corpus.files(digest_files), corpus.index
    return SourceIdentity(
        name=corpus.description,
        digest=digest_of([index.digest, corpus.left_out_digest]),
        documents=len(index.hashes),
        held_out=int(index.is_held_out.sum()),
        left_out=corpus.num_left_out,
        files=files if len(files) <= MOST_FILES else {},
        sketch=index.sketch,
    )


def data_changes(before: Sequence[SourceIdentity], now: Sequence[SourceIdentity]) -> list[str]:
    """Say how the data of a run differs from that of its checkpoint.

    Args:
        before: Sources of the checkpoint; empty where an earlier version wrote it, which kept none.
        now: Sources of this run.

    Returns:
        A line per source that changed; empty if the data is the same, or nothing is known.
    """
    if not before or [source.digest for source in before] == [source.digest for source in now]:
        return []
    lines = []
    pairs = _pairs(before, now)
    order = {id(source): place for place, source in enumerate(before)}
    places = [order[id(was)] for was, this in pairs if was is not None and this is not None]
    if places != sorted(places):
        lines.append(f"the sources are in another order: {', '.join(source.name for source in now)}")
    for was, this in pairs:
        if was is None and this is not None:
            lines.append(f"{this.name}: a further source of {this.documents:,} documents")
        elif was is not None and this is None:
            lines.append(f"{was.name}: no source any more; it had {was.documents:,} documents")
        elif was is not None and this is not None and was.digest != this.digest:
            lines.append(f"{this.name}: {_difference(was, this)}")
    return lines


def _pairs(
    before: Sequence[SourceIdentity], now: Sequence[SourceIdentity]
) -> list[tuple[SourceIdentity | None, SourceIdentity | None]]:
    """Pair the sources of two runs: by what they name and their digest, by one of both, and the others by place."""
    left = dict(enumerate(before))
    found: dict[int, SourceIdentity] = {}
    rules: tuple[Callable[[SourceIdentity], object], ...] = (
        lambda source: (_what_is_named(source), source.digest),
        _what_is_named,
        lambda source: source.digest,
        lambda source: True,
    )
    for rule in rules:
        for place, this in enumerate(now):
            match = next((each for each, was in left.items() if place not in found and rule(was) == rule(this)), None)
            if match is not None:
                found[place] = left.pop(match)
    return [*((found.get(place), this) for place, this in enumerate(now)), *((was, None) for was in left.values())]


def _what_is_named(source: SourceIdentity) -> str:
    """Name of a source without its place in the mixture, so that one that is moved in it keeps its name."""
    return re.sub(r"^data(\.mixture\[\d+\])?\.", "", source.name)


def _difference(was: SourceIdentity, now: SourceIdentity) -> str:
    removed, added, is_exact = _count_changes(was.sketch, now.sketch)
    about = "" if is_exact else "about "
    parts = []
    if removed or added:
        parts.append(f"{about}{removed:,} texts removed, {about}{added:,} added")
    else:
        parts.append("the same texts in another order, with other white space or with others of them held out")
    for name in ("documents", "held_out", "left_out"):
        if getattr(was, name) != getattr(now, name):
            parts.append(f"{name.replace('_', ' ')} {getattr(was, name):,} -> {getattr(now, name):,}")
    parts += _file_changes(was.files, now.files)
    return "; ".join(parts)


def _count_changes(was: Sequence[int], now: Sequence[int]) -> tuple[int, int, bool]:
    """Count the texts that only one of two sketches has, scaled to the whole where a sketch is a part of it."""
    bounds = [sketch[-1] + 1 for sketch in (was, now) if len(sketch) >= SKETCH_HASHES]
    bound = min(bounds, default=HASH_VALUES)
    before, after = ({value for value in sketch if value < bound} for sketch in (was, now))
    scale = HASH_VALUES / bound
    return round(len(before - after) * scale), round(len(after - before) * scale), not bounds


def _file_changes(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    if not was or not now:
        return []
    kinds = {
        "removed": sorted(was.keys() - now.keys()),
        "added": sorted(now.keys() - was.keys()),
        "changed": sorted(name for name in was.keys() & now.keys() if was[name] != now[name]),
    }
    lines = []
    for kind, names in kinds.items():
        more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
        if names:
            lines.append(f"files {kind}: {', '.join(names[:SHOWN_FILES])}{more}")
    return lines
