"""The page of the mixers: its tables are those of the code."""

import re

import torch

from moe_train.config.model import ModelConfig
from moe_train.config.registry import REGISTRY, load_part
from moe_train.model.build import mixer_of
from moe_train.model.mixers.rwkv7 import start_values
from moe_train.model.parameters import Computed
from tests.docs.test_pages import read_page

PAGE = read_page("mixers.md")


def test_every_mixer_is_there_with_the_numbers_of_its_state():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d,]+)[^|]* \|", PAGE.partition("## ")[0], re.MULTILINE))
    assert set(rows) == set(REGISTRY["mixers"])
    for name, number in rows.items():
        config = ModelConfig.model_validate({"hidden_size": 768, "num_heads": 12, "mixer": name})
        kind, spec = mixer_of(config, 0)
        found = kind.state_bytes(spec, 1, 4) // 4
        if name == "infini":
            found -= 1536  # keys and values of the one token
        assert int(number.replace(",", "")) == found, name


def test_settings_are_those_of_the_sections():
    rows = re.findall(r"^\| `model\.(\w+)\.(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
    sections = {name: load_part("mixers", name).section for name in REGISTRY["mixers"]}
    known = [
        (name, field, str(info.default))
        for name, section in sections.items()
        if section is not None
        for field, info in section.model_fields.items()
    ]
    assert sorted(rows) == sorted(known)


def test_start_values_of_rwkv7_are_those_of_the_table():
    text = PAGE.partition("Start values")[2]
    formulas = {
        name: formula
        for names, formula in re.findall(r"^\| (`[^|]+`) \| \[D\] \| ([^|;]+)", text, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", names)
    }
    width, size, layer, layers = 16, 4, 2, 5
    values = start_values(layer, layers, width, size, 0.02)
    for name, value in values.items():
        if not isinstance(value, Computed):
            continue
        source = re.sub(r"(?<=[\d)]) (?=[a-z(\d])", "*", formulas[name].strip()).replace("^", "**")
        for i in range(width):
            z = (i % size - (size - 1) / 2) / ((size - 1) / 2)
            names = {"i": i, "D": width, "up": layer / (layers - 1), "down": 1 - layer / layers}
            names |= {"lin": i / (width - 1) - 0.5, "zig": z * abs(z)}
            found = value.function(torch.tensor([i], dtype=torch.float64)).item()
            assert abs(found - eval(source, {}, names)) < 1e-12, (name, source, i)
