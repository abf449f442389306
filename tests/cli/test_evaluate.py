"""`moe-train evaluate`: its numbers, by source, in every layout, with and without capacity; what is refused."""

import math

import pytest

from tests.cli.conftest import NUMBERS, PROSE, check_refused, last_object
from tests.train.runs import records


def test_json_agrees_with_the_last_validation(evaluate, trained_run):
    found = last_object(evaluate("--json"))
    validated = [record for record in records(trained_run) if "val/cross_entropy" in record][-1]
    # There the sources are one text, so that the sequences of the second begin elsewhere.
    assert found["loss"] == pytest.approx(validated["val/cross_entropy"], rel=1e-3)
    assert found["bits_per_byte"] == pytest.approx(validated["val/bits_per_byte"], rel=1e-3)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bytes"] == 9 * (len(PROSE) + len(NUMBERS))
    assert found["dropped_fraction"] == 0 and found["capacity_factor"] is None
    prose, numbers = found["domains"]
    assert "prose" in prose["name"] and "numbers" in numbers["name"]
    for name in ("tokens", "bytes", "sequences"):
        assert found[name] == prose[name] + numbers[name]
    loss = (prose["loss"] * prose["tokens"] + numbers["loss"] * numbers["tokens"]) / found["tokens"]
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    for domain in (prose, numbers):
        (layer,) = domain["experts"]
        assert layer["layer"] == 1
        assert sum(layer["counts"]) == 2 * domain["tokens"]  # top 2; padding is not routed
        assert sum(layer["shares"]) == pytest.approx(4)
        assert domain["max_violation"] == pytest.approx(max(layer["shares"]) - 1)
    assert prose["experts"][0]["shares"] != numbers["experts"][0]["shares"]


def test_same_numbers_on_any_ranks_and_twice(evaluate):
    numbers = ("loss", "bits_per_byte", "tokens", "bytes", "experts", "domains")

    def measured(*arguments, ranks=1):
        found = last_object(evaluate("--json", "--batch-size=2", *arguments, ranks=ranks))
        return {name: found[name] for name in numbers}

    alone = measured()
    assert measured() == alone
    assert measured("--expert-parallel-size=1", ranks=2) == alone  # to the last bit: whole batches are shared out
    shared = measured(ranks=2)
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert shared["experts"] == alone["experts"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_can_share_sequences(evaluate, ranks):
    alone = last_object(evaluate("--json", "--batch-size=2"))
    shared = last_object(evaluate("--json", "--batch-size=2", "--context-parallel-size=2", ranks=ranks))
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert shared["tokens"] == alone["tokens"] and shared["experts"] == alone["experts"]


def test_sequences_that_cannot_be_shared(evaluate):
    check_refused(evaluate("--context-parallel-size=2"), "world size (1)", "parallel.context_parallel_size (2)")
    words = ("--sequence-length (30)", "2 x --context-parallel-size (2 x 2 = 4)")
    check_refused(evaluate("--context-parallel-size=2", "--sequence-length=30"), *words)


def test_capacity(evaluate):
    bounded = last_object(evaluate("--json", "--capacity-factor=0.5"))
    assert bounded["capacity_factor"] == 0.5
    # Every expert takes at most half its mean share, in every sequence.
    assert 0.45 < bounded["dropped_fraction"] < 0.8
    free = last_object(evaluate("--json", "--capacity-factor=none"))
    assert free["dropped_fraction"] == 0 and free["loss"] != bounded["loss"]


def test_other_text_and_splits(evaluate, trained_run):
    path = trained_run.parent / "prose_train.txt"
    options = ("--data.source=text", f"--data.paths={path}", "--json")
    found = last_object(evaluate(*options))
    assert found["bytes"] == 40 * len(PROSE)  # all of it
    assert [domain["name"] for domain in found["domains"]] == [str(path)]
    train = last_object(evaluate("--split=train", "--json"))
    assert train["domains"][0]["loss"] == pytest.approx(found["loss"], rel=1e-6)
    some = last_object(evaluate("--split=train", "--max-sequences=3", "--json"))
    assert [domain["sequences"] for domain in some["domains"]] == [3, 3]
    assert some["domains"][0]["bytes"] < found["bytes"]
    longer = last_object(evaluate("--sequence-length=64", "--json"))
    assert longer["tokens"] == last_object(evaluate("--json"))["tokens"]
    check_refused(evaluate(*options, "--split=held_out", "--data.validation_fraction=0"), "--split (held_out)")


def test_fields_of_data_that_name_no_other_text_leave_the_split(evaluate, tmp_path):
    own = last_object(evaluate("--json"))
    assert last_object(evaluate("--json", f"--data.cache_dir={tmp_path}"))["loss"] == own["loss"]


def test_values_may_stand_apart_and_look_like_fields(evaluate, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"tokenizer": "The quick brown fox"}\n')
    options = ("--data.source", "jsonl", "--data.paths", str(tmp_path / "x.jsonl"), "--data.text_column", "tokenizer")
    assert last_object(evaluate("--json", *options))["bytes"] == 19


def test_table(evaluate):
    result = evaluate()
    assert result.returncode == 0, result
    for word in ("loss", "perplexity", "bits/byte", "MaxVio", "all", "step_00000004", "tokens/s"):
        assert word in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-sequences=0"], ["--max-sequences (0)"]),
        (["--capacity-factor=x"], ["--capacity-factor ('x')"]),
        (["--capacity-factor=-1"], ["--capacity-factor (-1)"]),
        (["--capacity-factor=inf"], ["--capacity-factor (inf)", "finite"]),
        (["--data.source=text", "--data.paths=/nowhere.txt"], ["/nowhere.txt"]),
        (["--data.sourc=text"], ["--data.sourc"]),
        (["--data.tokenizer=bytes"], ["--data.tokenizer", "trained with"]),
        (["--data.end_of_document", "</s>"], ["--data.end_of_document", "trained with"]),
        (["--model.hidden_size=8"], ["unknown option --model.hidden_size"]),
        (["--expert-parallel-size=3"], ["expert_parallel_size (3)"]),
        (["--data.source=synthetic"], ["source 'synthetic'", "must be bytes"]),
    ],
    ids=lambda value: "_".join(value)[:40] if value and isinstance(value, list) else "",
)
def test_bad_input(evaluate, arguments, words):
    check_refused(evaluate(*arguments), *words)


@pytest.mark.slow
def test_two_ranks_say_it_once_and_leave(evaluate):
    check_refused(evaluate("--data.source=text", "--data.paths=/nowhere.txt", ranks=2), "/nowhere.txt")
