"""No configuration file and no command line ends in a traceback: each gives a configuration or one message."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_train.config.command_line import read_command_line
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, load_config, read_yaml
from moe_train.config.machine import read_machine
from moe_train.config.root import Config

WORDS = st.sampled_from(
    [
        "None",
        "~",
        "yes",
        "010",
        "1e3",
        "1e400",
        "-1",
        "0",
        "2",
        "4",
        ".nan",
        "9" * 30,
        "auto",
        "[",
        "{",
        "[1,2]",
        "[[]]",
    ]
    + [
        '["a"]',
        '{"a": 1}',
        "1:30",
        "2024-01-05",
        "''",
        "true",
        "*a",
        "&a [*a]",
        "!!set {a}",
        "!!binary aa",
        "attention",
    ]
    + ["switch", "text", "\\x00", "\udcff", "ä", "a,b", "0.5", "-", "--", "<<", "? a", "#", "%", "\t", '"\\ud800"']
)
FIELDS = [
    f"{name}.{field}"
    for name, each in Config.model_fields.items()
    for field in getattr(each.annotation, "model_fields", ())
] + ["model.moe.top_k", "model.moe.num_experts", "model.moe.balance", "model.moe.coef_schedules", "model.attention.x"]
NAMES = st.sampled_from(
    [*FIELDS, *Config.model_fields, "config", "x-a", "local_rank", "model.moe.noisy_topk", "optim.adamw"]
)
KEYS = st.sampled_from([part for name in FIELDS for part in name.split(".")]) | WORDS
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def one_message(error: UsageError) -> Iterator[bool]:
    text = str(error)
    yield "\n" not in text
    yield 0 < len(text) < 20_000
    yield error.exit_code == 2


def check(*arguments: str) -> None:
    """A configuration loads again from what it dumps; anything else is one message."""
    try:
        config = load_config([*arguments, "--train.run_dir=r"], program="t")
    except UsageError as error:
        assert all(one_message(error)), error
        return
    except SystemExit as ended:
        assert ended.code == 0  # --help, -h
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "c.yaml").write_text(dump_yaml(config), encoding="utf-8")
        assert load_config([f"--config={folder}/c.yaml"], program="t") == config


def check_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(data)
        check(f"--config={path}")
        try:
            read_machine(path)
        except UsageError as error:
            assert all(one_message(error)), error


@settings(deadline=None, max_examples=60)
@given(
    st.binary(max_size=60)
    | st.lists(WORDS | st.sampled_from([": ", "\n", " ", ", ", "model", "}", "]"]), max_size=12).map(
        lambda parts: "".join(parts).encode("utf-8", "surrogateescape")
    )
)
def test_any_text_as_a_file(data: bytes) -> None:
    check_file(data)


@settings(deadline=None, max_examples=80)
@example({"model": {"\n": None}}, False)
@given(st.dictionaries(st.sampled_from(list(Config.model_fields)), TREES, max_size=3), st.booleans())
def test_any_tree_as_a_file(tree: object, is_flow: bool) -> None:
    check_file(yaml.safe_dump(tree, default_flow_style=is_flow, allow_unicode=True).encode("utf-8", "surrogatepass"))


@settings(deadline=None, max_examples=120)
@given(st.lists(st.tuples(NAMES, WORDS | st.text(max_size=6), st.booleans()), max_size=3))
def test_any_command_line(given_options: list[tuple[str, str, bool]]) -> None:
    arguments = []
    for name, value, is_one in given_options:
        arguments += [f"--{name}={value}"] if is_one else [f"--{name}", value]
    check(*arguments)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS | st.text(max_size=8), max_size=3))
def test_any_words_as_a_command_line(words: list[str]) -> None:
    check(*words)


def test_files_that_would_take_all_memory_or_time(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    doubling = "\n".join(f"x{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))
    for text in (f"x0: &a0 [1, 1]\n{doubling}\n", "a: " + "[" * 3000, "a: " * 3000, "a: &a [*a]\n", "b: &b {c: *b}\n"):
        path.write_text(text)
        try:
            read_yaml(path)
        except UsageError as error:
            assert all(one_message(error)), error
            continue
        raise AssertionError(f"{text[:30]!r} was read")
    nested = '{"a": ' * 3000
    try:
        read_command_line([f"--deepspeed={nested}"], program="t")
    except UsageError as error:
        assert "deepspeed" in str(error)
        return
    raise AssertionError("half a mapping was read")
