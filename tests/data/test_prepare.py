"""From settings to sequences, in one process and in several at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moe_train.config.data import MixtureEntry
from moe_train.config.errors import UsageError
from moe_train.data import cache, check_data, prepare, prepare_data
from moe_train.data.sources import open_corpus
from tests.data.conftest import make_documents
from tests.data.test_tokenizers import write_word_tokenizer
from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 60
# A process that prepares data; its arguments: settings as JSON, local rank, seconds to sleep before each encoding.
SCRIPT = """
import json, sys, time
from moe_train.config.data import DataConfig
from moe_train.config.errors import UsageError
from moe_train.data import ByteTokenizer, prepare_data
encode = ByteTokenizer.encode_batch
def slow(self, texts):
    time.sleep(float(sys.argv[3]))
    return encode(self, texts)
ByteTokenizer.encode_batch = slow
try:
    data = prepare_data(DataConfig(**json.loads(sys.argv[1])), sequence_length=16, seed=1, min_sequences=4,
                        local_rank=int(sys.argv[2]))
except UsageError as error:
    print("UsageError:", error)
else:
    print(int(data.train.batch(range(64)).sum()), len(data.cache_dirs))
"""


def start(fields: dict, local_rank: int = 0, sleep: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, json.dumps(fields), str(local_rank), str(sleep)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def prepared(config, **options):
    return prepare_data(config, **{"sequence_length": 16, "seed": 1, "min_sequences": 4, **options})


@pytest.fixture
def fields(write_files, tmp_path):
    folder = write_files(make_documents(30))
    return {
        "source": "text",
        "paths": [str(folder)],
        "cache_dir": str(tmp_path / "cache"),
        "validation_fraction": 0.2,
    }


def test_the_whole_corpus_comes_back_from_train_and_held_out(fields, make_config):
    data = prepared(make_config(**fields))
    tokens = np.concatenate([data.train.entries[0].tokens, data.held_out.tokens])
    texts = sorted(
        data.tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == 256)) if len(part) > 1
    )
    assert texts == sorted(make_documents(30).values())
    assert data.held_out.num_bytes == sum(tokens[len(data.train.entries[0].tokens) :] != 256)
    assert data.train.batch(np.arange(4)).shape == (4, 17)
    assert set(data.held_out.reference_bits_per_byte) == {"gzip -9", "xz -9"}
    assert [path.parent for path in data.cache_dirs] == [Path(fields["cache_dir"]) / "tokens"]


def test_nothing_held_out_is_none(fields, make_config):
    assert prepared(make_config(**{**fields, "validation_fraction": 0.0})).held_out is None


def test_a_second_start_reads_nothing_but_the_cache(fields, make_config, monkeypatch):
    monkeypatch.setattr("moe_train.data.digests.SETTLED_SECONDS", 0.0)
    config = make_config(**fields, tokenizer="bpe", bpe_vocab_size=300)
    first = prepared(config)

    def fail(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(cache, "tokenize_corpus", fail)
    monkeypatch.setattr(prepare, "train_bpe", fail)
    monkeypatch.setattr(cache, "write_index", fail)
    monkeypatch.setattr("moe_train.data.digests._digest_file", fail)
    second = prepared(config)
    assert second.cache_dirs == first.cache_dirs
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert np.array_equal(second.train.batch(np.arange(50)), first.train.batch(np.arange(50)))


@pytest.mark.parametrize(("local_rank", "waits"), [(0, {0.0}), (3, {1.0})])
def test_the_first_process_of_a_machine_has_a_head_start(fields, make_config, monkeypatch, local_rank, waits):
    seen: set[float] = set()
    monkeypatch.setattr("moe_train.data.folders.time.sleep", seen.add)
    prepared(make_config(**fields), local_rank=local_rank)
    assert seen == waits


def test_a_damaged_tokenizer_is_trained_again(fields, make_config):
    config = make_config(**fields, tokenizer="bpe", bpe_vocab_size=300)
    first = prepared(config)
    (file,) = (Path(fields["cache_dir"]) / "tokenizers").glob("*/tokenizer.json")
    file.write_text(file.read_text()[:1000])
    assert prepared(config).tokenizer.fingerprint == first.tokenizer.fingerprint


def test_settings_that_matter_have_a_cache_of_their_own(fields, make_config, tmp_path):
    variants = [
        {},
        {"tokenizer": "bpe", "bpe_vocab_size": 300},
        {"tokenizer": "bpe", "bpe_vocab_size": 310},
        {"tokenizer": str(write_word_tokenizer(tmp_path / "t.json", ["</s>", "<stop>"])), "end_of_document": "<stop>"},
        {"tokenizer": str(tmp_path / "t.json"), "end_of_document": "</s>"},
        {"validation_fraction": 0.3},
    ]
    folders = [prepared(make_config(**{**fields, **variant})).cache_dirs[0] for variant in variants]
    assert len(set(folders)) == len(variants)
    # Sequence length and seed do not change tokens.
    assert prepared(make_config(**fields), sequence_length=8, seed=9).cache_dirs[0] == folders[0]


def test_a_mixture_has_one_tokenizer_and_every_share(write_files, make_config):
    folder = write_files({f"a/{name}": text for name, text in make_documents(30).items()})
    lines = "".join(json.dumps({"body": f"row {i} " * 20}) + "\n" for i in range(50))
    write_files({"b.jsonl": lines})
    mixture = [
        {"source": "text", "paths": [f"{folder}/a"], "weight": 3},
        {"source": "jsonl", "paths": [f"{folder}/b.jsonl"], "text_column": "body"},
    ]
    config = make_config(mixture=mixture, tokenizer="bpe", bpe_vocab_size=320, validation_fraction=0.2)
    data = prepared(config)
    assert [entry.weight for entry in data.train.entries] == [3.0, 1.0]
    assert len(set(data.cache_dirs)) == 2
    rows = [data.tokenizer.decode(row) for row in data.train.batch(np.arange(1024))]
    assert 240 < sum("row" in row for row in rows) < 270  # a quarter, but for sequences that hold no whole "row"
    both = data.tokenizer.decode(data.held_out.tokens)
    assert "row" in both
    assert "Größe" in both
    assert sum(data.train.entry_sequences) == data.train.num_sequences


def test_held_out_text_trains_no_tokenizer(write_files, make_config, monkeypatch):
    folder = write_files({"a.txt": "train " * 80, "v.txt": "secret " * 50})
    seen: list[str] = []
    train_bpe = prepare.train_bpe
    monkeypatch.setattr(prepare, "train_bpe", lambda texts, *rest: train_bpe(seen_in(texts, seen), *rest))
    config = make_config(
        source="text", paths=[str(folder)], validation_paths=[f"{folder}/v.txt"], tokenizer="bpe", bpe_vocab_size=280
    )
    prepared(config)
    assert seen == ["train " * 80]


def seen_in(texts, seen):
    for text in texts:
        seen.append(text)
        yield text


def test_the_tokenizer_is_trained_on_a_bounded_sample_from_everywhere(write_files, make_config):
    config = make_config(source="text", paths=[str(write_files(make_documents(300)))], validation_fraction=0.1)
    corpus = open_corpus(config.sources[0], config, "data")
    training = [d.text for d in corpus.documents() if not d.held_out]
    assert list(prepare.training_sample(corpus, corpus.size_bytes)) == training
    sample = list(prepare.training_sample(corpus, corpus.size_bytes // 4))
    assert sum(len(text.encode()) for text in sample) <= corpus.size_bytes // 4
    places = [training.index(text) for text in sample[:-1]]
    assert 30 < len(places) < 100
    assert max(places) > 200


def test_one_huge_document_is_sampled_in_pieces(write_files, make_config, monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_CHARACTERS", 100)
    text = "".join(f"line {i}\n" for i in range(3000))
    config = make_config(source="text", paths=[str(write_files({"a.txt": text}))], validation_fraction=0.0)
    corpus = open_corpus(config.sources[0], config, "data")
    assert "".join(prepare.training_sample(corpus, len(text))) == text
    sample = list(prepare.training_sample(corpus, 5000))
    assert 2500 < sum(map(len, sample)) <= 5000
    assert text.index(sample[-1]) > len(text) / 2
    assert "".join(prepare.training_sample(corpus, 5000)) == "".join(sample)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {},
            {"min_sequences": 10_000},
            r"paths \(.*\) has \d+ sequences of 16 tokens, fewer than one batch \(train\.global_batch_size 10000\)",
        ),
        (
            {},
            {"sequence_length": 10**6},
            r"data\.paths \(.*\) has 0 sequences of 1000000 tokens \(train\.sequence_length\)",
        ),
        ({"paths": ("/not/there",)}, {}, r"data\.paths \('/not/there'\): no such file or folder"),
        ({"tokenizer": "a" * 300}, {}, r"data\.tokenizer \('a+'\): neither bytes nor bpe nor"),
        ({"tokenizer": "/not/there.json"}, {}, r"data\.tokenizer \('/not/there\.json'\): neither bytes nor bpe nor"),
    ],
)
def test_what_cannot_work_is_named(fields, make_config, changes, options, message):
    with pytest.raises(UsageError, match=message):
        prepared(make_config(**{**fields, **changes}), **options)


def test_the_quick_check_names_the_entry_of_a_mixture(fields, make_config):
    good = MixtureEntry(source="text", paths=tuple(fields["paths"]))
    bad = MixtureEntry(source="jsonl", paths=("/not/*.jsonl",))
    check_data(make_config(**fields))
    with pytest.raises(
        UsageError, match=r"data\.mixture\[1\]\.paths \('/not/\*\.jsonl'\): the pattern matches no file"
    ):
        check_data(make_config(mixture=(good, bad)))


def test_importing_is_light():
    code = (
        "import sys, moe_train.data; from moe_train.config.data import DataConfig;"
        "moe_train.data.check_data(DataConfig());"
        "print([m for m in ('torch', 'datasets', 'tokenizers', 'pyarrow', 'rich') if m in sys.modules])"
    )
    done = run_process([sys.executable, "-c", code], timeout=DEADLINE_SECONDS, cwd=ROOT)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), str(done)


def test_of_several_processes_one_builds(fields):
    processes = [start(fields, local_rank, sleep=0.5) for local_rank in (0, 1, 2, 0)]
    results = [process.communicate(timeout=DEADLINE_SECONDS) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum(err.count("tokenizing ") for _, err in results) == 1


def test_every_process_finds_the_same_error(fields, write_files):
    write_files({"doc029.txt": b"\xff"})
    processes = [start(fields, local_rank) for local_rank in (0, 1)]
    results = [process.communicate(timeout=DEADLINE_SECONDS)[0] for process in processes]
    assert results[0] == results[1]
    assert results[0].startswith("UsageError: ")
    assert "doc029.txt: not UTF-8 at byte 0" in results[0]


def test_a_killed_build_is_no_cache_and_blocks_nobody(fields):
    tokens = Path(fields["cache_dir"]) / "tokens"
    process = start(fields, sleep=DEADLINE_SECONDS)
    try:
        assert "30 files taken, 0 left out" in process.stderr.readline()
        assert process.stderr.readline().startswith("tokenizing")  # inside the build, under the lock
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate(timeout=DEADLINE_SECONDS)
    (left,) = (path for path in tokens.iterdir() if path.is_dir())
    assert left.name.startswith(".")

    began = time.monotonic()
    again = start(fields)
    out, err = again.communicate(timeout=DEADLINE_SECONDS)
    assert (again.returncode, err.count("tokenizing ")) == (0, 1), err
    assert time.monotonic() - began < DEADLINE_SECONDS / 2
    (built,) = (path for path in tokens.iterdir() if path.is_dir())
    assert cache.open_token_cache(built) is not None
    assert not left.exists()
    assert out.split()[1] == "1"
