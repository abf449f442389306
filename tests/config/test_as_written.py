"""Files and command lines as they were written: words, keys, lists, empty sections, several files."""

from pathlib import Path

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.root import Config
from moe_train.config.yaml_text import parse_yaml

RUN = "train: {run_dir: r}\n"


@pytest.fixture
def load(tmp_path):
    def load(text: str, *options: str) -> Config:
        (tmp_path / "c.yaml").write_text(text)
        return load_config([f"--config={tmp_path / 'c.yaml'}", *options], program="t")

    return load


def value(config: object, name: str) -> object:
    for part in name.split("."):
        config = getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {run_dir: r}\noptim: {}\ntrain: {seed: 3}\n", "key train is there twice, in line 1 and in line 3"),
        ("train:\n  run_dir: r\n  steps: 1\n  steps: 1\n", "key train.steps is there twice, in line 3 and in line 4"),
        (RUN + "model: {moe: {top_k: 1,\n top_k: 2}}\n", "key model.moe.top_k is there twice, in line 2 and in line 3"),
        (RUN + 'optim: {beta1: 0.1, "beta1": 0.2}\n', "key optim.beta1 is there twice, in line 2 and in line 2"),
        (RUN + "data: {mixture: [{source: text,\nsource: jsonl}]}\n", "key data.mixture.0.source is there twice"),
        (RUN + "deepspeed: {a: {b: 1,\n\nb: 2}}\n", "key deepspeed.a.b is there twice, in line 2 and in line 4"),
        (RUN + "x-a: &a {top_k: 1}\nmodel:\n  moe:\n    <<: *a\n    <<: *a\n", "give one list of them: <<: [*a, *b]"),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_both_lines(load, text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(text)
    assert words in str(error.value)
    assert "c.yaml" in str(error.value)


def test_a_key_twice_in_json_of_the_command_line_is_refused(load) -> None:
    with pytest.raises(UsageError, match=r"deepspeed: key 'b' is there twice"):
        load(RUN, '--deepspeed={"a": {"b": 1, "b": 2}}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.run_dir: r\n", "unknown key train.run_dir (value 'r'); did you mean train: {run_dir: ...}?"),
        (
            RUN + "optim: {learning-rate: 0.1}\n",
            "unknown key optim.learning-rate (value 0.1); did you mean learning_rate?",
        ),
        (RUN + "optim: {int: 1}\n", "unknown key optim.int (value 1); known here: name"),
        (RUN + "train : {}\nmodel: {moe: {top k: 2}}\n", "key train is there twice"),
        (RUN + "model: {moe: {top k: 2}}\n", "unknown key model.moe.top k (value 2); did you mean top_k?"),
        (RUN + "parallel:\n  literal['auto']: 2\n", "unknown key parallel.literal['auto'] (value 2)"),
        (RUN + "3: 4\n", "line 2: a key is no name: 3"),
        (RUN + "optim: {true: 4}\n", "line 2: a key of optim is no name: true"),
        (RUN + "optim: {~: 4}\n", "line 2: a key of optim is no name: ~"),
        (RUN + "? [a, b]\n: 4\n", "line 2: a key is no name: a list or mapping"),
        (RUN + "optim: {x-a: {}}\n", "unknown key optim.x-a"),
    ],
)
def test_keys_that_are_no_names_are_named(load, text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_keys_for_anchors(load) -> None:
    text = "x-moe: &moe {num_experts: 4}\nx-list: [1]\nmodel: {moe: {<<: *moe, top_k: 1, renormalize_gates: no}}\n"
    moe = load(text + RUN).model.moe
    assert (moe.num_experts, moe.top_k, moe.renormalize_gates) == (4, 1, False)


@pytest.mark.parametrize("name", ["train.run_dir", "data.cache_dir", "data.tokenizer", "checkpoint.resume"])
def test_an_empty_path_is_refused(load, name: str) -> None:
    for text in ("", "  "):
        with pytest.raises(UsageError, match=rf"{name}.* is empty: write a path"):
            load(RUN, f"--{name}={text}")


@pytest.mark.parametrize("word", ["None", "null", "~", "Null", "NULL"])
def test_no_value_has_the_same_words_in_a_file_and_on_the_command_line(load, word: str) -> None:
    for name in ("data.cache_dir", "parallel.network_interface", "model.num_kv_heads", "model.moe_layers"):
        section, _, field = name.partition(".")
        assert value(load(f"{RUN}{section}: {{{field}: {word}}}\n"), name) is None
        assert value(load(RUN, f"--{name}={word}"), name) is None
    for arguments in ((f"train: {{run_dir: {word}}}\n",), (RUN, f"--train.run_dir={word}")):
        with pytest.raises(UsageError, match=r"train\.run_dir \(None\): has no value"):
            load(*arguments)


def test_a_text_in_quotes_is_that_text(load) -> None:
    assert load(RUN + 'data: {cache_dir: "None"}\n').data.cache_dir == "None"
    assert load(RUN, '--data.cache_dir="None"').data.cache_dir == "None"
    assert load(RUN, '--data.cache_dir="a').data.cache_dir == '"a'
    assert load(RUN, "--model.qk_norm=none").model.qk_norm == "none"


@pytest.mark.parametrize(
    ("name", "written", "read"),
    [
        ("train.steps", "1e3", 1000),
        ("train.steps", "1.5e3", 1500),
        ("train.steps", "1_000", 1000),
        ("train.seed", "0x10", 16),
        ("train.seed", "-2e0", -2),
        ("train.global_batch_size", "2.4e1", 24),
        ("optim.learning_rate", "1e-4", 1e-4),
        ("optim.learning_rate", "1E-4", 1e-4),
        ("model.rope_theta", "1e6", 1e6),
        ("train.compile", "yes", True),
        ("train.compile", "off", False),
        ("data.cache_dir", "no", "no"),
        ("train.run_dir", "2024-01-05", "2024-01-05"),
        ("train.run_dir", "010", "010"),
        ("train.run_dir", "1:30", "1:30"),
    ],
)
def test_words_mean_what_their_field_needs(load, name: str, written: str, read: object) -> None:
    section, _, field = name.partition(".")
    run = "" if section == "train" else RUN
    inner = f"run_dir: r, {field}" if section == "train" and field != "run_dir" else field
    for found in (load(f"{run}{section}: {{{inner}: {written}}}\n"), load(RUN, f"--{name}={written}")):
        assert value(found, name) == read
        assert type(value(found, name)) is type(read)


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("train.seed", "010", "must be a number without a leading zero"),
        ("train.steps", "-007", "must be a number without a leading zero"),
        ("optim.learning_rate", "01", "must be a number without a leading zero"),
        ("model.moe_layers", "[01]", "must be a number without a leading zero"),
        ("train.steps", "yes", "must be a number, and this is a switch"),
        ("optim.weight_decay", "off", "must be a number, and this is a switch"),
        ("train.steps", "true", "must be a number, and this is a switch"),
        ("train.micro_batch_size", "on", "must be a number, and this is a switch"),
        ("train.steps", "1:30", "must be a whole number"),
        ("train.steps", "2.5e0", "must be a whole number"),
        ("train.seed", "1e30", "beyond the whole numbers of 64 bits"),
        ("train.seed", "9" * 5000, "train.seed"),
        ("optim.learning_rate", "1e999", "finite"),
    ],
)
def test_words_that_would_be_misread_are_refused(load, name: str, written: str, words: str) -> None:
    section, _, field = name.partition(".")
    text = (
        f"train: {{run_dir: r, {field}: {written}}}\n"
        if section == "train"
        else f"{RUN}{section}: {{{field}: {written}}}\n"
    )
    for arguments in ((text,), (RUN, f"--{name}={written}")):
        if written == "[01]" and len(arguments) == 2:
            continue  # no JSON list: it is refused as such
        with pytest.raises(UsageError) as error:
            load(*arguments)
        assert words in str(error.value)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000


@pytest.mark.parametrize("word", ["yes", "010", "1:30", "2024-01-05", "1_000"])
def test_words_that_no_field_decides_on_are_refused(load, word: str) -> None:
    with pytest.raises(UsageError, match=r"line 2: deepspeed\.a\.0\.b \(.*put quotes around a text"):
        load(f"{RUN}deepspeed: {{a: [{{b: {word}}}]}}\n")
    assert load(f'{RUN}deepspeed: {{a: "{word}", b: true, c: 1e-3}}\n').deepspeed == {"a": word, "b": True, "c": 1e-3}


@pytest.mark.parametrize("tag", ["!!bool maybe", "!!int ''", "!!float ''", "!!float 1:30", "!!int 1:30", "!!int 0b1"])
@pytest.mark.parametrize("place", ["train.steps", "deepspeed.a", "train.seed"])
def test_a_tag_that_does_not_fit_its_word_is_refused(load, tag: str, place: str) -> None:
    section, _, field = place.partition(".")
    with pytest.raises(UsageError) as error:
        load(f"{RUN if section != 'train' else ''}{section}:\n  {field}: {tag}\n")
    name, word = tag.split(" ")
    line = 3 if section != "train" else 2
    assert f"line {line}: {place} ({word.strip(chr(39))!r}) has the tag {name}, and is none: " in str(error.value)


def test_a_tag_that_fits_its_word_stays(load) -> None:
    text = "model: {a: !!int 3, b: !!float 3, c: !!str 3, d: !!bool true, e: !!null '', f: !!float .inf, g: !!int '3'}"
    expected = {"a": 3, "b": 3.0, "c": "3", "d": True, "e": None, "f": float("inf"), "g": 3}
    assert parse_yaml(text) == {"model": expected}
    with pytest.raises(UsageError, match="is not YAML"):
        load(RUN + "x-a: !unknown 3\n")


def test_a_long_file_and_many_aliases_are_told_apart() -> None:
    with pytest.raises(ValueError, match=r"^has more than 100,000 values$"):
        parse_yaml("a:\n" + "- 1\n" * 200_000)
    doubling = "\n".join(f"x{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30))
    with pytest.raises(ValueError, match=r"line \d+: aliases make more than 100,000 values of it"):
        parse_yaml(f"x0: &a0 [1, 1]\n{doubling}\n")


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        (["a,b.jsonl"], ("a,b.jsonl",)),
        (["[ab]*.jsonl"], ("[ab]*.jsonl",)),
        (["{a,b}.jsonl"], ("{a,b}.jsonl",)),
        (["['a,b']"], ("['a,b']",)),
        (['"a,b"'], ("a,b",)),
        (['["a,b", "c"]', "d"], ("a,b", "c", "d")),
        (["[", '"'], ("[", '"')),
        (['{"a": 1}'], ('{"a": 1}',)),
    ],
)
def test_what_is_no_json_list_is_one_path(load, given: list[str], paths: tuple[str, ...]) -> None:
    assert load(RUN, "--data.source=text", *(f"--data.paths={each}" for each in given)).data.paths == paths


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--data.mixture=[{", "data.mixture ('[{')"),
        ("--data.mixture=a,b", "data.mixture ('a,b')"),
        ("--model.kv_layers=[0,2", "model.kv_layers ('[0,2')"),
        ("--model.mixers=['attention']", """model.mixers ("['attention']"): must be a JSON list"""),
        ("--data.paths=[1]", "data.paths.0 (1)"),
        ("--model.moe={a}", "model.moe ('{a}')"),
    ],
)
def test_lists_that_cannot_be_read_are_named(load, option: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(RUN, option)
    assert words in str(error.value)


def test_rows_of_numbers_and_names(load) -> None:
    assert load(RUN, "--model.moe_layers=1,3").model.moe_layers == (1, 3)
    assert load(RUN, "--model.mixers=attention, attention").model.mixers == ("attention", "attention")


@pytest.mark.parametrize("section", ["model", "checkpoint", "telemetry", "deepspeed", "optim"])
def test_an_empty_section_means_its_defaults(load, section: str) -> None:
    assert load(f"{RUN}{section}:\n  # nothing: 1\n") == load(RUN)


def test_an_empty_section_of_a_section_means_its_defaults(load) -> None:
    assert load(RUN + "model:\n  moe:\n    balance:\n    coef_schedules:\n  # attention:\n") == load(RUN)
    with pytest.raises(UsageError, match=r"train\.run_dir is missing"):
        load("train:\n")
    with pytest.raises(UsageError, match=r"train\.run_dir is missing"):
        load("# train: {run_dir: r}\n")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RUN + "data: {source: text, paths: /a.txt}\n", "data.paths ('/a.txt'): must be a list"),
        (RUN + "data: {source: text, paths:}\n", "data.paths (None): has no value"),
        (RUN + "model: {mixers: attention}\n", "model.mixers ('attention'): must be a list"),
        (RUN + "data: {mixture: {source: text}}\n", "data.mixture ({'source': 'text'}): must be a list"),
        (RUN + "data: {mixture: [3]}\n", "data.mixture.0 (3): must be a mapping"),
        (RUN + "optim: adamw\n", "optim ('adamw'): must be a mapping"),
        ("train: {run_dir: r, steps:}\n", "train.steps (None): has no value"),
        ("train: {run_dir: 2024}\n", "put quotes around it"),
    ],
)
def test_values_of_another_kind_are_named(load, text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load(text)
    assert words in str(error.value)


@pytest.mark.parametrize("option", ["--train.compile", "--model.tie_embeddings", "--telemetry.experts"])
def test_a_switch_without_a_value_is_named(load, option: str) -> None:
    for arguments in ([option], [option, "--train.steps=5"]):
        with pytest.raises(UsageError, match=f"{option}: has no value; write {option}=true or {option}=false"):
            load(RUN, *arguments)


def test_two_names_of_a_field_are_refused_together_and_replace_each_other_in_layers(load) -> None:
    earlier = "train: {run_dir: r, recompute_activations: true}\n"
    assert load(earlier).train.recompute == "block"
    assert load(earlier, "--train.recompute=experts").train.recompute == "experts"
    assert (
        load("train: {run_dir: r, recompute: experts}\n", "--train.recompute_activations=no").train.recompute == "none"
    )
    for text, options in (
        ("train: {run_dir: r, recompute_activations: true, recompute: experts}\n", ()),
        (RUN, ("--train.recompute_activations=true", "--train.recompute=experts")),
    ):
        with pytest.raises(UsageError, match=r"recompute \('experts'\) and recompute_activations \([tT]rue\)"):
            load(text, *options)
    with pytest.raises(UsageError, match=r"--train\.recompute_activations \('maybe'\): must be true or false"):
        load(RUN, "--train.recompute_activations=maybe")


def test_several_files_are_merged_in_order_and_said(tmp_path: Path) -> None:
    files = {
        "base": "train: {run_dir: r, steps: 10}\noptim: {beta1: 0.5}\nmodel: {moe: {num_experts: 4}}\n",
        "large": "x-a: 1\nmodel: {hidden_size: 512}\noptim:\n",
        "mine": "train: {steps: 1e1, seed: 3}\nmodel: {hidden_size: 128}\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    said: list[str] = []
    arguments = [f"--config={tmp_path / name}" for name in files]
    config = load_config([*arguments, "--train.seed=4"], program="t", say=said.append)
    assert (config.train.steps, config.train.seed, config.optim.beta1) == (10, 4, 0.5)
    assert (config.model.hidden_size, config.model.moe.num_experts) == (128, 4)
    assert len(said) == 2
    assert said[0].endswith("adds model.hidden_size 512")
    assert "changes model.hidden_size 512 -> 128; adds train.seed 3" in said[1]
    assert str(tmp_path / "mine") in said[1]
    said.clear()
    load_config([arguments[0], "--train.seed=4"], program="t", say=said.append)
    assert said == []
    (tmp_path / "mine").write_text("train: {steps: x}\n")
    with pytest.raises(UsageError) as error:
        load_config([arguments[0], arguments[2]], program="t")
    assert str(error.value) == f"{tmp_path / 'mine'}: train.steps ('x'): must be a whole number"


def test_a_bad_value_is_said_of_the_file_or_the_option_that_it_comes_from(tmp_path: Path) -> None:
    files = [str(tmp_path / name) for name in ("one.yaml", "two.yaml")]
    Path(files[0]).write_text("train: {run_dir: r, steps: x, seed: w}\nmodel: {moe: {num_experts: 4}}\n")
    Path(files[1]).write_text("train: {steps: 5}\noptim: {beta1: z, zzz: 1}\n")
    one, two = (f"--config={file}" for file in files)
    seed = "train.seed ('w'): must be a whole number"
    beta = "optim.beta1 ('z'): must be a number"
    expected = {
        (one,): [f"{files[0]}: train.steps ('x'): must be a whole number; {seed}"],
        (one, "--train.steps="): ["--train.steps (''): must be a whole number", f"; {files[0]}: {seed}"],
        (one, two): [f"{files[1]}: unknown key optim.zzz (value 1); known here: ", f"; {beta}; {files[0]}: {seed}"],
        (one, "--train.seed=1", "--train.steps=2", "--optim.zzz=1"): ["unknown option --optim.zzz"],
        (one, "--train.seed=1", "--train.steps=2", '--optim={"zzz": 1}'): ["--optim: unknown key optim.zzz (value 1)"],
        (one, "--train.seed=1", "--train.steps=2", "--data.paths=[1]"): ["--data.paths: data.paths.0 (1): must be a"],
        (one, "--train.seed=1", "--train.steps=2", "--model.moe.top_k=9"): [f"{files[0]} + options: ", "top_k (9)"],
        ("--train.run_dir=r", "--train.compile=maybe"): ["--train.compile ('maybe'): must be true or false"],
        ("--train.run_dir=r", "--model.moe.top_k=9"): ["top_k (9)"],
        (one, "--train.run_dir=~", "--train.seed=1", "--train.steps=2"): ["--train.run_dir (None): has no value"],
    }
    for arguments, parts in expected.items():
        with pytest.raises(UsageError) as error:
            load_config(arguments, program="t")
        message = str(error.value)
        assert message.startswith(parts[0]) or (arguments[0] != one and parts[0] in message), message
        assert all(part in message for part in parts), message
        assert "Input should" not in message and "unable to" not in message
