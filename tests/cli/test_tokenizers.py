"""Tokenizers through the commands: no bits per byte of lost text, marks that are text, damaged files refused."""

import json

import pytest

from tests.cli.conftest import check_refused, last_object
from tests.data.tokenizer_kinds import KINDS, MARK
from tests.train.runs import SMALL, records, run_forked, train_forked

TEXT = "a page about markup: the tag </s> closes and ends and The Tag cedar"


@pytest.fixture
def train(tmp_path):
    """Trains two steps on twenty documents with a kind of tokenizer."""

    def run(contents):
        (tmp_path / "t.json").write_text(contents)
        rows = [json.dumps({"text": f"{TEXT} {number}"}) for number in range(20)]
        (tmp_path / "d.jsonl").write_text("\n".join(rows) + "\n")
        return train_forked(
            1,
            *SMALL,
            "--train.sequence_length=8",
            "--train.steps=2",
            "--data.source=jsonl",
            f"--data.paths={tmp_path / 'd.jsonl'}",
            f"--data.cache_dir={tmp_path / 'cache'}",
            f"--data.tokenizer={tmp_path / 't.json'}",
            f"--data.end_of_document={MARK}",
            "--data.validation_fraction=0.3",
            f"--train.run_dir={tmp_path / 'run'}",
        )

    return run


@pytest.mark.parametrize("kind", ["words", pytest.param("bpe, lower case", marks=pytest.mark.slow), "bpe, added"])
def test_bits_per_byte_stand_beside_gzip_only_where_no_text_is_lost(train, tmp_path, kind):
    result = train(KINDS[kind]().to_str())
    assert result.returncode == 0, result
    keeps = kind == "bpe, added"
    for words in ("bits/byte", "bits per byte: this model", "gzip -9"):
        assert (words in result.stdout) == keeps, result
    assert ("no bits per byte: decoding the tokens gives another text for" in result.stdout) != keeps, result
    assert ("warning: the tokenizer does not keep all text" in result.stderr) != keeps, result
    folder = tmp_path / "run"
    assert any("val/bits_per_byte" in record for record in records(folder)) == keeps
    assert all("val/cross_entropy" in record for record in records(folder)[-1:])
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["val/bits_per_byte"] is not None) == keeps == bool(summary["reference_bits_per_byte"])
    assert (summary["val/lost_bytes_share"] == 0.0) == keeps

    measured = last_object(run_forked(1, "evaluate", f"--run={folder}", "--json"))
    assert (measured["bits_per_byte"] is not None) == keeps
    assert measured["lost_bytes_share"] == summary["val/lost_bytes_share"]
    shown = run_forked(1, "evaluate", f"--run={folder}").stdout
    assert ("gzip -9" in shown) == keeps != ("no bits per byte: decoding" in " ".join(shown.split()))


def test_the_name_of_the_mark_in_a_prompt_is_text(generate, evaluate, tmp_path):
    name = "<|endoftext|>"
    (found,) = last_object(generate(f"--prompt={name}", "--max-new-tokens=1", "--json"))["completions"]
    assert found["prompt_tokens"] > 2  # the mark before it, and parts of the name
    (tmp_path / "x.txt").write_text(name)
    measured = last_object(evaluate("--json", "--data.source=text", f"--data.paths={tmp_path / 'x.txt'}"))
    assert (measured["tokens"], measured["bytes"]) == (found["prompt_tokens"], len(name))  # with the mark after it


DAMAGED = {
    "cut": lambda contents: json.dumps(contents)[:-40],
    "no model": lambda contents: json.dumps({**contents, "model": {"type": "BPE"}}),
    "huge id": lambda contents: json.dumps(contents).replace('"closes": ', '"closes": 40000000'),
    "no end mark": lambda contents: json.dumps(contents).replace(MARK, "[END]"),
    "unknown words": lambda contents: json.dumps(contents).replace('"unk_token": "[UNK]"', '"unk_token": "none"'),
}


@pytest.mark.parametrize(
    "damage",
    [name if name in ("cut", "unknown words") else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGED],
)
def test_a_damaged_file_is_one_message_before_training(train, tmp_path, damage):
    contents = json.loads(KINDS["words"]().to_str())
    result = train(DAMAGED[damage](contents))
    check_refused(result, "d.jsonl" if damage == "unknown words" else "t.json")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
