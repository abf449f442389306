"""What is said of data that changed since a checkpoint."""

import json
import os
import re
from pathlib import Path

import pytest

from moe_train.data import prepare_data
from moe_train.data.identity import SourceIdentity, data_changes

ROWS = [f"a row of text, number {i}" for i in range(60)]


@pytest.fixture
def identify(tmp_path, make_config):
    """Identity of the sources of a folder of JSON lines, as a checkpoint keeps it."""

    def run(**fields: object) -> list[SourceIdentity]:
        config = make_config(source="jsonl", paths=[str(tmp_path / "data")], validation_fraction=0.2, **fields)
        sources = prepare_data(config, sequence_length=8, seed=0, min_sequences=4).sources
        return [SourceIdentity.from_json(json.loads(json.dumps(source.to_json()))) for source in sources]

    return run


def write(tmp_path: Path, name: str, rows: list[str]) -> None:
    (tmp_path / "data").mkdir(exist_ok=True)
    (tmp_path / "data" / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def remove_rows(tmp_path):
    write(tmp_path, "a.jsonl", ROWS[7:])
    return r"7 texts removed, 0 added; documents 60 -> 53; .*files changed: a\.jsonl"


def add_a_file(tmp_path):
    write(tmp_path, "b.jsonl", ["new", "newer"])
    return r"0 texts removed, 2 added; documents 60 -> 62; .*files added: b\.jsonl"


def change_a_word_in_place(tmp_path):
    path = tmp_path / "data" / "a.jsonl"
    status = path.stat()
    path.write_text(path.read_text().replace("number 30", "number XX"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    return r"1 texts removed, 1 added; files changed: a\.jsonl"


def reverse(tmp_path):
    write(tmp_path, "a.jsonl", ROWS[::-1])
    return r"the same texts in another order, .*files changed: a\.jsonl"


def rename(tmp_path):
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "data" / "c.jsonl")
    return r"the same texts .* with others of them held out; .*files removed: a\.jsonl; files added: c\.jsonl"


def change_white_space(tmp_path):
    write(tmp_path, "a.jsonl", [*ROWS[:-1], f"{ROWS[-1]}  "])
    return r"the same texts .* with other white space .*files changed"


@pytest.mark.parametrize(
    "change", [remove_rows, add_a_file, change_a_word_in_place, reverse, rename, change_white_space]
)
def test_every_change_is_said(identify, tmp_path, change):
    write(tmp_path, "a.jsonl", ROWS)
    before = identify()
    assert data_changes(before, identify()) == []
    expected = change(tmp_path)
    (line,) = data_changes(before, identify())
    assert line.startswith(f"data.paths ({tmp_path}/data): ")
    assert re.search(expected, line), line


def test_a_moved_or_touched_corpus_is_the_same_data(identify, tmp_path, make_config):
    write(tmp_path, "a.jsonl", ROWS)
    before = identify()
    os.utime(tmp_path / "data" / "a.jsonl", (1e9, 1e9))
    assert data_changes(before, identify()) == []
    (tmp_path / "data").rename(tmp_path / "moved")
    config = make_config(source="jsonl", paths=[str(tmp_path / "moved")], validation_fraction=0.2)
    moved = prepare_data(config, sequence_length=8, seed=0, min_sequences=4).sources
    assert data_changes(before, moved) == []


def test_another_number_of_sources_is_said_and_an_old_checkpoint_says_nothing(identify, tmp_path):
    write(tmp_path, "a.jsonl", ROWS)
    (one,) = identify()
    assert "a further source of 60 documents" in data_changes([one], [one, one])[0]
    assert "no source any more; it had 60 documents" in data_changes([one, one], [one])[0]
    assert data_changes([], [one]) == []


def source(place: int, path: str, rows: int) -> SourceIdentity:
    return SourceIdentity(f"data.mixture[{place}].paths ({path})", f"{path}{rows}", rows, 0, 0, {}, tuple(range(rows)))


def test_a_mixture_in_another_order_is_compared_source_by_source():
    before = [source(0, "a", 5), source(1, "b", 9), source(2, "c", 3)]
    order = (
        "the sources are in another order: data.mixture[0].paths (b), data.mixture[1].paths (c), "
        "data.mixture[2].paths (a)"
    )
    assert data_changes(before, [source(0, "b", 9), source(1, "c", 3), source(2, "a", 5)]) == [order]
    changed = data_changes(before, [source(0, "b", 7), source(1, "c", 3), source(2, "a", 5)])
    assert changed == [order, "data.mixture[0].paths (b): 2 texts removed, 0 added; documents 9 -> 7"]
    assert data_changes(before, before[1:]) == ["data.mixture[0].paths (a): no source any more; it had 5 documents"]
    further = [source(0, "new", 4), source(1, "a", 5), source(2, "b", 9), source(3, "c", 3)]
    assert data_changes(before, further) == ["data.mixture[0].paths (new): a further source of 4 documents"]


def test_a_source_that_moved_on_disk_and_in_the_mixture_is_the_same():
    before, moved = [source(0, "a", 5), source(1, "b", 9)], source(0, "a", 5)
    moved = SourceIdentity(**{**vars(moved), "name": "data.mixture[1].paths (elsewhere/a)"})
    (line,) = data_changes(before, [source(0, "b", 9), moved])
    assert line.startswith("the sources are in another order: ")


def test_counts_of_many_texts_are_near(identify, tmp_path):
    write(tmp_path, "a.jsonl", [f"text {i}" for i in range(8000)])
    before = identify()
    write(tmp_path, "a.jsonl", [f"text {i}" for i in range(2000, 9000)])
    (line,) = data_changes(before, identify())
    words = line.replace(",", "").split()
    removed, added = (int(words[i + 1]) for i, word in enumerate(words) if word == "about")
    # 2000 and 1000 of 8000; a sketch of 1024 holds 256 and 128 of them: 3 standard deviations are below 25%
    assert abs(removed - 2000) < 500
    assert abs(added - 1000) < 250


def test_an_identity_stays_small(identify, tmp_path):
    write(tmp_path, "a.jsonl", [f"text {i}" for i in range(8000)])
    for i in range(300):
        write(tmp_path, f"{i}.jsonl", [f"more {i}"])
    (source,) = identify()
    assert source.files == {}  # too many to name
    assert len(json.dumps(source.to_json())) < 30_000
