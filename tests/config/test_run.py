"""Settings of the run and of the data that have no effect in the chosen mode are errors."""

import pytest
from pydantic import ValidationError

from moe_train.config.data import DataConfig
from moe_train.config.run import CheckpointConfig, OptimConfig, ParallelConfig, TelemetryConfig, TrainConfig


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        pytest.param(OptimConfig, {"decay_fraction": 0.5}, ["decay_fraction (0.5)", "'cosine'", "wsd"], id="decay"),
        pytest.param(
            OptimConfig,
            {"schedule": "constant", "min_learning_rate_ratio": 0.5},
            ["min_learning_rate_ratio (0.5)", "'constant'"],
            id="minimum of a constant",
        ),
        pytest.param(OptimConfig, {"schedule": "wsd", "decay_fraction": 0}, ["decay_fraction"], id="no decay"),
        pytest.param(OptimConfig, {"learning_rate": 0}, ["learning_rate"], id="no learning rate"),
        pytest.param(ParallelConfig, {"zero_stage": 4}, ["zero_stage"], id="zero stage"),
        pytest.param(ParallelConfig, {"expert_parallel_size": 0}, ["expert_parallel_size"], id="no ranks"),
        pytest.param(TrainConfig, {"run_dir": "r", "precision": "fp8"}, ["precision"], id="precision"),
        pytest.param(
            TrainConfig,
            {"run_dir": "r", "recompute_every": 2},
            ["recompute_every (2)", "recompute ('none')"],
            id="every block of none",
        ),
        pytest.param(
            TrainConfig,
            {"run_dir": "r", "recompute": "experts", "recompute_activations": True},
            ["recompute ('experts')", "recompute_activations (True)", "'block'"],
            id="two parts",
        ),
        pytest.param(
            TrainConfig,
            {"run_dir": "r", "recompute": "block", "recompute_activations": False},
            ["recompute ('block')", "recompute_activations (False)", "'none'"],
            id="block and none",
        ),
        pytest.param(
            TrainConfig, {"run_dir": "r", "recompute_activations": 7}, ["recompute_activations", "7"], id="no switch"
        ),
        pytest.param(CheckpointConfig, {"keep_last": 0}, ["keep_last"], id="keeps none"),
        pytest.param(TelemetryConfig, {"every": 0}, ["every"], id="never writes"),
        pytest.param(
            TelemetryConfig,
            {"experts": False, "dead_after_steps": 5},
            ["dead_after_steps (5)", "experts (False)"],
            id="alarms of nothing",
        ),
        pytest.param(TelemetryConfig, {"max_violation_alarm": 0}, ["max_violation_alarm", "0"], id="always alarmed"),
        pytest.param(TelemetryConfig, {"entropy_alarm": 1.0}, ["entropy_alarm", "1"], id="entropy above all"),
        pytest.param(DataConfig, {"source": "text"}, ["'text'", "paths"], id="text without paths"),
        pytest.param(DataConfig, {"source": "huggingface"}, ["'huggingface'", "name"], id="hub without name"),
        pytest.param(DataConfig, {"paths": ["a"]}, ["paths (('a',))", "'python_stdlib'"], id="paths without effect"),
        pytest.param(
            DataConfig,
            {"source": "text", "paths": ["a"], "text_column": "t"},
            ["text_column ('t')", "'text'", "jsonl"],
            id="column of a text",
        ),
        pytest.param(
            DataConfig,
            {"source": "jsonl", "paths": ["a"], "split": "s"},
            ["split ('s')", "'jsonl'", "huggingface"],
            id="split of files",
        ),
        pytest.param(
            DataConfig,
            {"source": "text", "paths": ["a"], "mixture": [{}]},
            ["mixture and paths (('a',))"],
            id="mixture and source",
        ),
        pytest.param(DataConfig, {"bpe_vocab_size": 300}, ["bpe_vocab_size (300)", "'bytes'"], id="size of bytes"),
        pytest.param(
            DataConfig, {"tokenizer": "bpe", "end_of_document": "<e>"}, ["end_of_document ('<e>')", "'bpe'"], id="mark"
        ),
        pytest.param(DataConfig, {"mixture": [{"weight": 0}]}, ["mixture", "weight"], id="weight of zero"),
    ],
)
def test_values_that_are_refused(section, values, words):
    with pytest.raises(ValidationError) as error:
        section(**values)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (OptimConfig, {"schedule": "wsd", "decay_fraction": 0.5}),
        (OptimConfig, {"schedule": "wsd", "min_learning_rate_ratio": 0.0}),
        (OptimConfig, {"schedule": "constant"}),
        (OptimConfig, {"max_grad_norm": 0.0}),
        (DataConfig, {"source": "jsonl", "paths": ["a"], "text_column": "t", "validation_paths": ["v"]}),
        (DataConfig, {"source": "huggingface", "name": "n", "split": "s", "validation_split": "v", "subset": "u"}),
        (DataConfig, {"tokenizer": "t.json", "end_of_document": "<e>"}),
        (DataConfig, {"tokenizer": "bpe", "bpe_vocab_size": 300}),
    ],
)
def test_values_that_are_right(section, values):
    config = section(**values)
    assert {name: config.model_dump(mode="json")[name] for name in values} == values


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({}, "none"),
        ({"recompute_activations": True}, "block"),
        ({"recompute_activations": "no"}, "none"),
        ({"recompute_activations": True, "recompute": "block"}, "block"),
        ({"recompute_activations": None, "recompute": "attention"}, "attention"),
    ],
)
def test_the_earlier_form_of_recompute_is_read(values, part):
    config = TrainConfig(run_dir="r", **values)
    assert (config.recompute, config.recompute_activations) == (part, None)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_single_source_is_a_mixture_of_one():
    (entry,) = DataConfig(source="jsonl", paths=("a",), text_column="t").sources
    assert (entry.source, entry.paths, entry.text_column, entry.weight) == ("jsonl", ("a",), "t", 1.0)
    mixed = DataConfig(mixture=({"weight": 2}, {"source": "text", "paths": ("b",), "weight": 3})).sources
    assert [(entry.source, entry.weight) for entry in mixed] == [("python_stdlib", 2.0), ("text", 3.0)]
