"""The generated pages: equal to what the schema and the parsers give now, and complete by another way of looking."""

import argparse
import json
import re
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from moe_train.cli.main import SUBCOMMANDS
from moe_train.config.root import Config
from tests.docs.pages import load_script, read_page

REMEDY = "run `python docs/make_reference.py` and look at what changed"


@pytest.mark.parametrize("name", ["configuration.md", "commands.md"])
def test_the_page_is_what_the_code_gives_now(name):
    made: str = load_script("make_reference").PAGES[name]()
    is_equal = read_page(name) == made  # not compared by assert: its difference of two long texts takes minutes
    assert is_equal, f"docs/{name} is out of date: {REMEDY}"


def schema_fields() -> dict[str, dict[str, Any]]:
    """Every field by its dotted name, from pydantic's JSON schema: a way of its own to look at the models."""
    schema = Config.model_json_schema()

    def walk(section: dict[str, Any], prefix: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for name, field in section["properties"].items():
            reference = field.get("$ref", "").rpartition("/")[2]
            if reference:
                found |= walk(schema["$defs"][reference], f"{prefix}{name}.")
            else:
                found[f"{prefix}{name}"] = field
        return found

    return walk(schema, "")


def rows() -> dict[str, list[str]]:
    """Cells of the page's tables by the field that they begin with."""
    found = {}
    for line in read_page("configuration.md").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and re.fullmatch(r"`[\w.]+`", cells[0]) and "." in cells[0]:
            assert cells[0] not in found, f"{cells[0]} is there twice"
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_every_field_has_its_row():
    fields = schema_fields()
    assert len(fields) > 90
    assert set(rows()) == set(fields) - {"deepspeed"}
    assert "`deepspeed`: mapping" in read_page("configuration.md")


def test_a_row_has_the_description_the_default_and_the_bounds():
    words = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}
    num_bounds = 0
    for name, (kind, default, what) in rows().items():
        field = schema_fields()[name]
        assert " ".join(field["description"].split()) == what.replace("\\", ""), name
        if "default" not in field:
            assert default == "required", name
        else:
            shown = default.strip("`")
            expected = field["default"]
            if isinstance(expected, float):
                assert float(shown) == expected, name
            else:
                assert shown == (expected if isinstance(expected, str) else _as_written(expected)), name
        for part in [field, *field.get("anyOf", [])]:
            for key, word in words.items():
                if key in part:
                    num_bounds += 1
                    assert f"{word} {part[key]:g}" in kind, name
            for value in part.get("enum", [part["const"]] if "const" in part else []):
                assert f"`{value}`" in kind, name
            if part.get("type") == "null":
                assert "None" in kind, name
    assert num_bounds > 50


def _as_written(value: Any) -> str:
    return str(value) if value is None or isinstance(value, bool) else json.dumps(value)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (int, "int"),
        (Annotated[int, Field(ge=1, le=3)], "int at least 1 and at most 3"),
        (Annotated[float, Field(gt=0)] | None, "float above 0 or None"),
        (Annotated[int, Field(gt=0)] | Literal["auto"], "int above 0 or `auto`"),
        (Literal["a", "b", "c"], "`a`, `b` or `c`"),
        (tuple[str, ...], "list of str"),
        (tuple[int, float], "[int, float]"),
        (dict[str, Any], "mapping of str to anything"),
    ],
)
def test_a_type_in_words(annotation, expected):
    from pydantic import create_model

    field = create_model("Made", value=(annotation, ...)).model_fields["value"]
    assert load_script("make_reference").type_text(field.annotation, tuple(field.metadata)) == expected


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_option_of_a_subcommand_is_on_the_page(name):
    script, page = load_script("make_reference"), read_page("commands.md")
    section = page[page.index(f"\n## moe-train {name}\n") :]
    section = section[: section.find("\n## ", 1)]
    fields, seen = script.config_options(), 0

    def look(parser: argparse.ArgumentParser) -> None:
        nonlocal seen
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner_name, inner in action.choices.items():
                    assert f"### moe-train {name} {inner_name}\n" in section
                    look(inner)
            for option in action.option_strings:
                if option not in (*fields, "-h", "--help") and action.help != argparse.SUPPRESS:
                    seen += 1
                    assert f"`{option}`" in section or f"`{option} " in section, option

    for parser in script.parsers_of(name):
        look(parser)
    assert seen
