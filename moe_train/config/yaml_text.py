"""YAML as it was written: the words of YAML 1.2, every key once, and no key that is not text.

YAML 1.1, which PyYAML reads, makes 8 of 010, True of yes, 90 of 1:30 and a date of 2024-01-05, and of two equal keys it
drops the first. Here such words stay text, and the field that they are for decides what they mean.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

_MOST_VALUES = 100_000  # values of a file; aliases can stand for more than memory holds
_DEEPEST = 50  # nesting of a file: code that walks values is recursive
NULL_WORDS = ("None", "null", "Null", "NULL", "~")  # in a file and on the command line
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_UNTYPED = "deepspeed"  # section without a schema: no field decides what a word means


class _Dumper(yaml.SafeDumper):
    """A dumper that puts quotes around text which YAML 1.1 or 1.2 would read as something else."""


class _Loader(yaml.SafeLoader):
    """A loader with the words of YAML 1.2, and None for null; it makes no other objects than JSON has."""

    # Of the parent's, which has dates, binary values and sets too.
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  # declared so by PyYAML
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (
            *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")),
            None,
        )
    }


for _tag, _words, _first in (
    ("null", r"None|null|Null|NULL|~|", [*"Nn~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    ("int", r"[-+]?(0|[1-9][0-9]{0,18})", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", [*"-+."]),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"({_words})\Z"), _first)


def write_yaml(value: Any, *, in_one_line: bool = False) -> str:
    """Write values as YAML text, which `parse_yaml` and readers of YAML 1.1 read back.

    Args:
        value: Values as JSON has them.
        in_one_line: Whether to write lists and mappings in brackets, without a line end.
    """
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=in_one_line, width=10**6 if in_one_line else 80
    )
    return text.removesuffix("\n").removesuffix("\n...").strip() if in_one_line else text


def parse_yaml(text: str) -> Any:
    """Parse one YAML document.

    Args:
        text: The document.

    Returns:
        Values as JSON has them. Top-level keys that begin with "x-", which may hold anchors, are left out.

    Raises:
        ValueError: If it is not YAML, if a key is there twice or is not text, or if it is nested too deeply; the
            message names the line.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check(root, loader)
        value = loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(f"is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"is nested deeper than {_DEEPEST}") from error
    if isinstance(value, dict):
        return {key: each for key, each in value.items() if not key.startswith("x-")}
    return value


def _check(root: yaml.Node, loader: _Loader) -> None:
    """Refuse what could be misread, before values are made of it."""
    count, nodes = 0, set[int]()
    left = [(root, 0, "", False)]
    while left:
        node, depth, place, is_untyped = left.pop()
        count += 1
        nodes.add(id(node))
        if depth > _DEEPEST:  # also where an anchor contains itself
            raise ValueError(f"line {_line(node)}: is nested deeper than {_DEEPEST}")
        if count > _MOST_VALUES:
            if len(nodes) == count:
                raise ValueError(f"has more than {_MOST_VALUES:,} values")
            # An alias leads to a node again.
            raise ValueError(f"line {_line(node)}: aliases make more than {_MOST_VALUES:,} values of it")
        if isinstance(node, yaml.MappingNode):
            for key, child in _pairs(node, place):
                name = f"{place}.{key}" if place else key
                left.append((child, depth + 1, name, is_untyped or (depth == 0 and key == _UNTYPED)))
        elif isinstance(node, yaml.SequenceNode):
            left += [(child, depth + 1, f"{place}.{i}", is_untyped) for i, child in enumerate(node.value)]
        else:
            _check_tag(node, place, loader)
            if is_untyped:
                _check_word(node, place)


def _pairs(node: yaml.MappingNode, place: str) -> Iterator[tuple[str, yaml.Node]]:
    """Yield the keys of a mapping with their values, after a look at the keys."""
    lines: dict[str, int] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (_STR, _MERGE):
            written = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            where = f" of {place}" if place else ""
            raise ValueError(f"line {_line(key)}: a key{where} is no name: {written}; names are text, such as 'steps'")
        if key.value in lines:
            name = f"{place}.{key.value}" if place else key.value
            hint = "give one list of them: <<: [*a, *b]" if key.tag == _MERGE else "put both together"
            raise ValueError(f"key {name} is there twice, in line {lines[key.value]} and in line {_line(key)}; {hint}")
        lines[key.value] = _line(key)
        yield key.value, child


def _check_tag(node: yaml.Node, place: str, loader: _Loader) -> None:
    """Refuse a tag that does not fit its word, such as `!!bool maybe`; PyYAML reads such words in ways of its own."""
    meant = loader.resolve(yaml.ScalarNode, node.value, (True, False))
    allowed = {meant, _STR, _FLOAT} if meant == _INT else {meant, _STR}
    if node.tag in _Loader.yaml_constructors and node.tag not in allowed:
        where = f"{place} " if place else ""
        raise ValueError(
            f"line {_line(node)}: {where}({node.value!r}) has the tag !!{node.tag.rpartition(':')[2]}, and is none: "
            "leave the tag out, the field decides what the word means"
        )


def _check_word(node: yaml.Node, place: str) -> None:
    """Refuse a word without quotes that YAML 1.1 does not read as text, where no field says what it means."""
    is_plain = node.style is None and node.tag == _STR
    if is_plain and yaml.SafeLoader("").resolve(yaml.ScalarNode, node.value, (True, False)) != _STR:
        raise ValueError(
            f"line {_line(node)}: {place} ({node.value}) may be a number, a switch, a date or text: write true, false "
            "or the number in plain digits, or put quotes around a text"
        )


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
