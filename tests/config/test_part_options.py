"""Options of parts on the command line."""

import pytest

from moe_train.config.errors import UsageError
from moe_train.config.load import load_config
from moe_train.config.part_options import take_part_options

TRAIN = ["--train.run_dir=r"]


def test_settings_of_parts_are_nested_by_the_parts_name() -> None:
    given = ["--model.attention.x=0.5", "--model.num_layers=2", "--model.moe.balance.z_loss.a.b", "[1, 2]", "--help"]
    others, values = take_part_options(given)
    assert others == ["--model.num_layers=2", "--help"]
    assert values == {"model": {"attention": {"x": 0.5}, "moe": {"balance": {"z_loss": {"a": {"b": [1, 2]}}}}}}


def test_the_last_one_counts_and_stands_above_the_file(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model: {attention: {x: 1, y: 2}}\ntrain: {run_dir: r}\n")
    config = load_config([f"--config={file}", "--model.attention.x=3", "--model.attention.x=4"], program="t")
    assert config.model.part_settings == {"attention": {"x": 4, "y": 2}}


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--model.attention.x", "--model.attention.x: has no value"),
        ("--model.attention.x=[", "--model.attention.x"),
        ("--model.attentoin.x=1", "unknown option --model.attentoin.x"),
        ("--optim.adamv.x=1", "unknown option --optim.adamv.x"),
    ],
)
def test_what_cannot_be_read_is_named(option: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config([*TRAIN, option], program="t")
    assert words in str(error.value)
