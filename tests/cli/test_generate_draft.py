"""`moe-train generate --draft`: the same greedy text in every layout, what it tells, what is refused."""

import json

import pytest

from tests.cli.conftest import check_refused, last_object
from tests.train.runs import SMALL, run_forked, train_forked

FOX, DIGITS = "--prompt=The quick brown", "--prompt=01"
GREEDY = ("--max-new-tokens=12", "--greedy", "--ignore-end", "--json")


@pytest.fixture(scope="session")
def draft_run(trained_run, tmp_path_factory):
    """A smaller model of the same text and tokenizer, of another kind: fixed states, two experts, keys of its own."""
    folder = tmp_path_factory.mktemp("draft")
    result = train_forked(
        1,
        *(option for option in SMALL if "validation_max_bytes" not in option),
        f"--data={json.dumps(data_of(trained_run))}",
        "--model.hidden_size=16",
        "--model.mixers=rwkv7,attention",
        "--model.moe.num_experts=3",
        "--train.steps=2",
        f"--train.run_dir={folder / 'run'}",
    )
    assert result.returncode == 0, result
    return folder / "run"


def data_of(run):
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())["data"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_greedy_text_is_that_without_a_draft(generate, trained_run, draft_run, ranks):
    """On two ranks the target's experts are shared, and the draft's three experts are whole on both."""
    prompts = (FOX, DIGITS, "--prompt=a")
    plain = last_object(generate(*prompts, *GREEDY))
    for draft in (draft_run, trained_run):
        found = last_object(generate(*prompts, *GREEDY, f"--draft={draft}", "--draft-tokens=3", ranks=ranks))
        assert [each["text"] for each in found["completions"]] == [each["text"] for each in plain["completions"]]
        told = found["speculation"]
        assert told["draft"] == str(draft) and told["draft_tokens"] == 3
        assert told["draft_seconds"] > 0 and told["target_seconds"] > 0
        assert told["tokens_per_round"] == pytest.approx(1 + told["acceptance"] * 3) or draft == draft_run
        assert found["max_length"] == plain["max_length"] + 3
    assert told["acceptance"] == 1 and told["tokens_per_round"] == 4 and told["rounds"] == 3 * 3
    assert told["draft_kv_cache_bytes"] == found["kv_cache_bytes"]


def test_sampled_text_is_the_same_on_any_ranks(generate, draft_run):
    options = (FOX, DIGITS, "--prompt=a", "--max-new-tokens=10", "--ignore-end", "--json", f"--draft={draft_run}")
    alone, shared = (last_object(generate(*options, "--seed=4", "--temperature=0.1", ranks=ranks)) for ranks in (1, 2))
    for name in ("completions", "kv_cache_bytes", "max_length"):
        assert alone[name] == shared[name]
    for name in ("acceptance", "tokens_per_round", "rounds", "draft_kv_cache_bytes"):
        assert alone["speculation"][name] == shared["speculation"][name]
    assert 0 < alone["speculation"]["acceptance"] < 1


def test_text_streams_and_ends_within_a_round(generate, trained_run):
    plain = generate(FOX, "--greedy", "--max-new-tokens=12")
    found = generate(FOX, "--greedy", "--max-new-tokens=12", f"--draft={trained_run}")
    assert found.returncode == 0 and found.stdout == plain.stdout
    assert "tokens per round" in found.stderr and "tokens per round" not in plain.stderr
    whole = last_object(generate(FOX, *GREEDY))["text"]
    stop = (f"--stop={whole[4:6]}", f"--draft={trained_run}", "--draft-tokens=8")
    ended = last_object(generate(FOX, *GREEDY, *stop))
    assert ended["text"] == whole[: whole.index(whole[4:6])]
    assert ended["completions"][0]["finish_reason"] == "stop"


def test_its_own_first_layers(draft_run):
    options = ("generate", f"--run={draft_run}", FOX, *GREEDY)
    plain, found = (last_object(run_forked(1, *options, *more)) for more in ((), ("--draft=self:1",)))
    assert found["text"] == plain["text"]
    assert found["speculation"]["draft_kv_cache_bytes"] == 0
    bytes_per_token = plain["kv_cache_bytes"] / plain["max_length"]  # of RWKV-7 they do not grow
    assert plain["kv_cache_bytes"] < found["kv_cache_bytes"] < plain["kv_cache_bytes"] + 5 * bytes_per_token


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--draft-tokens=3"], ["--draft-tokens (3)", "without --draft"]),
        (["--draft=self:1", "--draft-tokens=0"], ["--draft-tokens (0)", "1 or more"]),
        (["--draft=self:2"], ["--draft (self:2)", "1 to 1 layers"]),
        (["--draft=self:0"], ["--draft (self:0)", "1 to 1 layers"]),
        (["--draft=self:x"], ["--draft (self:x)", "1 to 1 layers"]),
        (["--draft=self:1"], ["--draft (self:1)", "model.kv_layers", "[0]"]),
        (["--draft=/nowhere"], ["--draft", "/nowhere"]),
        (["--draft=self:1", "--max-new-tokens=1"], ["--draft (self:1)", "no effect"]),
    ],
    ids=lambda value: "_".join(value)[:40] if value and isinstance(value, list) and value[0][0] == "-" else "",
)
def test_what_is_refused(generate, arguments, words):
    check_refused(generate(FOX, *arguments), *words)


def test_a_draft_of_another_tokenizer(generate, draft_run, tmp_path):
    other = train_forked(1, *SMALL, "--train.steps=1", "--data.tokenizer=bytes", f"--train.run_dir={tmp_path / 'run'}")
    assert other.returncode == 0, other
    check_refused(generate(FOX, f"--draft={tmp_path / 'run'}"), "--draft", "another tokenizer", "257", "data.tokenizer")
