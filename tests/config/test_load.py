"""Loading: files, overrides, the help text, and every mistake in one message that names the field and its value."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from moe_train.config.base import SectionWithParts
from moe_train.config.data import MixtureEntry
from moe_train.config.errors import UsageError
from moe_train.config.load import dump_yaml, load_config, read_yaml, validate_config
from moe_train.config.root import Config

ROOT = Path(__file__).resolve().parents[2]
RUN = "--train.run_dir=r"
TEXT_ENTRY = MixtureEntry(source="text", paths=("p",), weight=2)


def load(*arguments: str) -> Config:
    return load_config(arguments, program="test")


def is_section(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def all_fields(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every field of the configuration, sections themselves included, by dotted name."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if is_section(field.annotation):
            yield from all_fields(field.annotation, f"{prefix}{name}.")


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return f"--config={path}"

    return write


def test_command_line_is_above_file_is_above_defaults(file):
    config = load(
        file("model: {num_layers: 6, moe: {num_experts: 16, top_k: 4}}\ntrain: {run_dir: a, steps: 200, seed: 5}"),
        "--model.moe.top_k=3",
        "--train.steps",
        "300",
    )
    assert config.model.moe.top_k == 3  # the command line, inside a section that the file has too
    assert config.train.steps == 300
    assert config.model.moe.num_experts == 16  # the file, where the command line says nothing
    assert config.model.num_layers == 6
    assert config.train.seed == 5
    assert config.train.run_dir == "a"
    assert config.model.hidden_size == 256  # the default
    assert load(file("train: {run_dir: a, seed: 5}"), "--train.seed=0").train.seed == 0


def test_no_file_is_needed():
    assert load(RUN) == validate_config({"train": {"run_dir": "r"}})


def test_the_environment_is_not_read(monkeypatch):
    monkeypatch.setenv("TRAIN", '{"steps": 999}')
    monkeypatch.setenv("train.steps", "999")
    monkeypatch.setenv("DEEPSPEED", '{"x": 1}')
    assert load(RUN) == validate_config({"train": {"run_dir": "r"}})


def test_of_layers_given_twice_the_last_count():
    assert load(RUN, "--model.kv_layers=2", "--model.kv_layers=3").model.kv_layers == 3
    assert load(RUN, "--model.kv_layers", "2", "--model.kv_layers", "[0,1]").model.kv_layers == (0, 1)
    assert load(RUN, "--model.kv_layers=0,2", "--train.steps=9", "--model.kv_layers=None").model.kv_layers is None


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("--model.kv_layers=2", 2),
        ("--model.kv_layers=[0,2]", (0, 2)),
        ("--model.kv_layers=0,3", (0, 3)),
        ("--model.kv_layers=None", None),
        ("--model.moe_layers=[1,3]", (1, 3)),
        ("--model.moe_layers=2", (2,)),
        ("--model.moe_layers=None", None),
        ("--model.vocab_size=None", None),
        ("--model.tie_embeddings=true", True),
        ("--model.rope_theta=1e6", 1e6),
        ("--parallel.expert_parallel_size=4", 4),
        ("--parallel.expert_parallel_size=auto", "auto"),
        ("--train.seed=-1", -1),
        ("--optim.learning_rate=3e-4", 3e-4),
        ('--deepspeed={"fp16": {"a": true, "b": 1.5, "c": 2}}', {"fp16": {"a": True, "b": 1.5, "c": 2}}),
        ('--data.mixture=[{"source": "text", "paths": ["p"], "weight": 2}]', (TEXT_ENTRY,)),
    ],
)
def test_every_kind_of_value_can_be_given_on_the_command_line(argument, value):
    found: object = load(RUN, argument)
    for part in argument[2:].partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_lists_on_the_command_line():
    config = load(RUN, "--data.source=text", "--data.paths=a", "--data.paths", "b c")
    assert config.data.paths == ("a", "b c")


def test_the_launchers_local_rank_is_taken_and_ignored():
    assert load(RUN, "--local_rank=3") == load(RUN)
    assert load("--local-rank", "1", RUN) == load(RUN)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["--train.step=5"], ["--train.step ", "5", "--train.steps"], id="near miss"),
        pytest.param(["--train.step", "5"], ["--train.step ", "'5'", "--train.steps"], id="near miss, two words"),
        pytest.param(["--modle.hidden_size=5"], ["--modle.hidden_size", "--model.hidden_size"], id="section"),
        pytest.param(["--zzzz=5"], ["--zzzz", "5", "--help"], id="unlike anything"),
        pytest.param(["--train.ste=5"], ["--train.ste"], id="no abbreviations"),
        pytest.param(["word"], ["word"], id="positional"),
        pytest.param(["--train.steps"], ["--train.steps"], id="no value"),
        pytest.param(["--config"], ["--config"], id="no file"),
        pytest.param(["--train.steps=abc"], ["train.steps", "'abc'", "must be a whole number"], id="not a number"),
        pytest.param(["--train.steps=2.5"], ["train.steps", "2.5", "must be a whole number"], id="not whole"),
        pytest.param(["--train.steps=0"], ["train.steps (0)", "greater than 0"], id="not positive"),
        pytest.param(["--optim.learning_rate=-1"], ["optim.learning_rate", "-1", "greater than 0"], id="negative"),
        pytest.param(["--optim.beta2=1"], ["optim.beta2", "1", "less than 1"], id="beta"),
        pytest.param(["--optim.learning_rate=nan"], ["optim.learning_rate", "nan"], id="nan"),
        pytest.param(
            ["--model.tie_embeddings=maybe"], ["model.tie_embeddings", "'maybe'", "must be true or false"], id="boolean"
        ),
        pytest.param(["--model.norm=batchnorm"], ["model.norm", "'batchnorm'", "rmsnorm"], id="choice"),
        pytest.param(["--parallel.expert_parallel_size=x"], ["expert_parallel_size", "'x'", "auto"], id="union"),
        pytest.param(["--parallel.zero_stage=0"], ["parallel.zero_stage (0)"], id="zero stage"),
        pytest.param(["--model.kv_layers=x"], ["model.kv_layers", "'x'"], id="kv_layers"),
        pytest.param(["--model.moe.top_k=9"], ["top_k (9)", "num_experts (8)"], id="top_k"),
        pytest.param(
            ["--model.moe.num_experts=6", "--parallel.expert_parallel_size=4"],
            ["num_experts (6)", "expert_parallel_size (4)"],
            id="experts do not divide",
        ),
        pytest.param(["--deepspeed=5"], ["deepspeed", "'5'", "JSON"], id="no mapping"),
        pytest.param(["--deepspeed", "fast"], ["deepspeed", "'fast'", "JSON"], id="text for a mapping"),
        pytest.param(['--deepspeed={"a":'], ["deepspeed", '{"a":', "JSON"], id="half of a mapping"),
        pytest.param(["--data.mixture=[1"], ["data.mixture", "'[1'", "JSON"], id="half of a list"),
        pytest.param(["--train={"], ["train", "'{'", "JSON"], id="half of a section"),
        pytest.param(["--data.paths=None"], ["data.paths", "None"], id="no list"),
        pytest.param(
            ['--data.mixture=[{"source": "text", "paths": ["p"], "weigth": 2}]'],
            ["data.mixture.0.weigth", "2", "did you mean weight"],
            id="unknown key in a mixture",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, words):
    with pytest.raises(UsageError) as error:
        load(RUN, *arguments)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("train: {run_dir: a, step: 3}", ["train.step ", "3", "did you mean steps"], id="near miss"),
        pytest.param("modle: {x: 1}\ntrain: {run_dir: a}", ["modle", "did you mean model"], id="section"),
        pytest.param("model: {moe: {topk: 2}}\ntrain: {run_dir: a}", ["model.moe.topk", "2", "top_k"], id="deep"),
        pytest.param("checkpoint: {zzz: 2}\ntrain: {run_dir: a}", ["checkpoint.zzz", "keep_last"], id="not near"),
        pytest.param("1: 2\ntrain: {run_dir: a}", ["1"], id="key is a number"),
        pytest.param(
            "train: {run_dir: a, steps: many}",
            ["train.steps", "'many'", "must be a whole number"],
            id="text for a number",
        ),
        pytest.param(
            "train: {run_dir: a, steps: 2.5}", ["train.steps", "2.5", "must be a whole number"], id="not whole"
        ),
        pytest.param("train: {run_dir: 3}", ["train.run_dir", "3", "string"], id="number for a text"),
        pytest.param("train: [1]", ["train", "[1]"], id="list for a section"),
        pytest.param("model: {hidden_size: [4]}\ntrain: {run_dir: a}", ["model.hidden_size", "[4]"], id="list"),
        pytest.param("deepspeed: 3\ntrain: {run_dir: a}", ["deepspeed", "3"], id="deepspeed is a mapping"),
        pytest.param("train: {steps: 200}", ["train.run_dir", "missing", "--train.run_dir"], id="no run_dir"),
        pytest.param("model: {num_layers: 2}", ["train.run_dir", "missing", "--train.run_dir"], id="no train"),
        pytest.param("train: {run_dir: a", ["not YAML"], id="not YAML"),
        pytest.param("a: b: c", ["not YAML"], id="not YAML either"),
        pytest.param("!!python/object/apply:os.getcwd []", ["not YAML"], id="no Python objects"),
        pytest.param("", ["mapping", "is empty"], id="empty"),
        pytest.param("- 1", ["mapping", "list"], id="list for a file"),
        pytest.param("just words", ["mapping", "str"], id="text for a file"),
    ],
)
def test_mistakes_in_a_file(text, words, file):
    argument = file(text)
    with pytest.raises(UsageError) as error:
        load(argument)
    for word in [*words, "some.yaml"]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_all_mistakes_are_said_at_once(file):
    with pytest.raises(UsageError) as error:
        load(file("train: {run_dir: a, steps: x}\nmodel: {hidden_sise: 3}"), "--optim.beta1=2")
    for word in ["train.steps", "'x'", "model.hidden_sise", "hidden_size", "optim.beta1", "'2'"]:
        assert word in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match=r"--config .*/none\.yaml: cannot be read"):
        load(f"--config={tmp_path / 'none.yaml'}")
    with pytest.raises(UsageError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"train: {run_dir: \xe4}")
    with pytest.raises(UsageError, match=r"latin\.yaml: cannot be read"):
        read_yaml(tmp_path / "latin.yaml")


def test_no_argument_at_all_asks_for_the_run_folder():
    with pytest.raises(UsageError, match=r"train\.run_dir is missing.*--train\.run_dir"):
        load()


def test_dumped_configuration_loads_equal(file):
    config = load(
        file(
            """
            model: {num_layers: 6, kv_layers: [0, 3], moe_layers: [1, 5], norm: layernorm, rope_theta: 1.0e+6,
                    moe: {num_experts: 6, top_k: 1, renormalize_gates: false, balance_scope: local, noise_epsilon: 0.5}}
            data: {mixture: [{source: text, paths: [a, "b*"], weight: 0.3}, {source: huggingface, name: x/y}]}
            parallel: {expert_parallel_size: 2, zero_stage: 3}
            optim: {learning_rate: 0.00012345678901234567, schedule: wsd, decay_fraction: 0.1}
            train: {run_dir: "no: 1", steps: 1000, precision: bf16, seed: -7}
            checkpoint: {resume: "yes"}
            deepspeed: {zero_optimization: {reduce_bucket_size: 5.0e+8, x: [1, null, "off"]}}
            """
        )
    )
    text = dump_yaml(config)
    assert load(file(text)) == config
    assert validate_config(yaml.safe_load(text)) == config
    assert config != load(RUN)
    top = yaml.safe_load(text)
    assert list(top) == list(Config.model_fields)
    assert set(top["train"]) == set(Config.model_fields["train"].annotation.model_fields)  # resolved: every field


def test_every_number_survives_the_dump(file):
    config = load(RUN, "--model.kv_layers=2", "--train.micro_batch_size=3", "--optim.epsilon=1e-20")
    assert load(file(dump_yaml(config))) == config
    assert config.optim.epsilon == 1e-20


def test_help_lists_every_field_with_description_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")  # argparse then breaks no line
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"], program="some-program", description="What it is for.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "some-program" in text
    assert "What it is for." in text
    assert "--config FILE" in text
    assert "local_rank" not in text
    one_line_each = text.replace("\n" + 24 * " ", "  ")  # where argparse puts the description below the option
    listed = dict(re.findall(r"^  --([\w.]+) [^\n]*?\s{2,}(\S[^\n]*)$", one_line_each, re.M))
    checked = 0
    for name, field in all_fields():
        description = " ".join(field.description.split())
        if is_section(field.annotation):
            assert f"{name} options:\n  {description}" in text
            continue
        assert name in listed, f"{name} is not in the help text"
        shown = " ".join(listed[name].split())
        assert description in shown
        if name == "train.run_dir":
            assert "required" in shown
        elif name != "deepspeed":
            assert f"(default: {field.default})" in shown, name
        checked += 1
    assert checked > 60


def sections(section: type[BaseModel] = Config) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        inner = get_args(field.annotation)[0] if get_origin(field.annotation) is tuple else field.annotation
        if is_section(inner):
            yield from sections(inner)


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_field_has_a_docstring_and_sections_are_frozen(section):
    assert section.__doc__
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"
        assert field.description.rstrip().endswith("."), f"{section.__name__}.{name}"
    assert section.model_config["frozen"]
    assert section.model_config["extra"] == ("allow" if issubclass(section, SectionWithParts) else "forbid")


def test_a_section_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load(RUN).train.steps = 5


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_of_the_repository_load(path, file):
    config = load(f"--config={path}")
    assert load(file(dump_yaml(config))) == config
    assert config.train.run_dir == f"runs/{path.stem}"


def test_the_repository_has_configurations():
    assert (ROOT / "configs" / "quickstart.yaml").exists()


def test_schedules_of_the_command_line_replace_those_of_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "train: {run_dir: r}\n"
        "model: {moe: {bias_update_rate: 0.1, coef_schedules: {bias_update_rate: [[0, 1], [9, 0]]}}}\n"
    )
    options = [f"--config={path}", "--model.moe.bias_update_rate=0"]
    with pytest.raises(UsageError, match=r"coef_schedules.bias_update_rate \(\[\[0, 1.0\], \[9, 0.0\]\]\)"):
        load_config(options, program="x")
    assert load_config([*options, "--model.moe.coef_schedules={}"], program="x").model.moe.coef_schedules == {}
    other = ['--model.moe.coef_schedules={"z_loss_coef": [[5, 2]]}', "--model.moe.z_loss_coef=1", options[0]]
    assert load_config(other, program="x").model.moe.coef_schedules == {"z_loss_coef": ((5, 2.0),)}


@pytest.mark.parametrize(
    "given", ["x", "3", '{"load_cv2_coef": 3}', '{"load_cv2_coef": [[0]]}', '{"nobody": [[0, 1]]}']
)
def test_wrong_schedules_are_said_in_one_line(given):
    with pytest.raises(UsageError) as error:
        load_config(["--train.run_dir=r", f"--model.moe.coef_schedules={given}"], program="x")
    assert "coef_schedules" in str(error.value) and "\n" not in str(error.value)
