"""What the pages say against the code: commands, configurations, paths and quoted messages."""

import ast
import inspect
import re
import shlex
from functools import cache

import pytest
import yaml

import moe_train
from moe_train.cli.main import SUBCOMMANDS
from moe_train.config.load import load_config, validate_config
from moe_train.config.part_options import PLACES
from moe_train.config.registry import REGISTRY
from tests.docs.pages import DOCS, ROOT, Command, all_page_names, blocks, commands, load_script, read_page
from tests.parts import FOLDER as PARTS
from tests.test_floors import HOUSE

LAUNCHED = "launch/train.py"
SCRIPTS = ("launch/deepspeed.sh", "launch/torchrun.sh", "launch/mpirun.sh", "launch/slurm.sbatch")
ALL_COMMANDS = [command for name in all_page_names() for command in commands(read_page(name), name)]
YAML_BLOCKS = [(name, text) for name in all_page_names() for text in blocks(read_page(name), "yaml")]


def check_command(command: str) -> None:
    """Assert that a command of ours, or what it starts of ours, is there, with all of its options."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        path = word.rpartition("=")[2]
        if re.match(r"(configs|launch|benchmarks|docs|requirements|docker|tests)/", path):
            assert (ROOT / path).exists(), f"{path} is not in the repository"
        if re.fullmatch(r"benchmarks\.\w+", word):
            assert is_benchmark(word), f"there is no benchmark {word}"
        if word == LAUNCHED or (word in SCRIPTS and "--config" in words):
            return check_training(words[words.index("--config") :] if word in SCRIPTS else words[place + 1 :])
        if word == "moe-train":
            return check_subcommand(words[place + 1 :])
        if word == "make":
            return check_make(words[place + 1 :])
    return None


def is_benchmark(module: str) -> bool:
    """Whether `python -m MODULE` starts something."""
    return (ROOT / module.replace(".", "/") / "__main__.py").exists()


def check_training(arguments: list[str]) -> None:
    """The arguments load, where their configuration file is in the repository; else their names are known."""
    at = arguments.index("--config") if "--config" in arguments else None
    if at is not None and not (ROOT / arguments[at + 1]).exists():
        assert arguments[at + 1].startswith("runs/"), arguments[at + 1]
        arguments = [*arguments[:at], *arguments[at + 2 :]]
    rooted = [str(ROOT / each) if each.startswith("configs/") else each for each in arguments]
    load_config(rooted, program="train", defaults={"train": {"run_dir": "unused", "global_batch_size": 8}})


def check_subcommand(arguments: list[str]) -> None:
    """The subcommand is there, and has every option."""
    name, rest = arguments[0], arguments[1:]
    if "--" in rest:  # moe-train launch starts another command
        check_command(shlex.join(rest[rest.index("--") + 1 :]))
        rest = rest[: rest.index("--")]
    if name == "--version" or name == "SUBCOMMAND":
        return
    assert name in SUBCOMMANDS, name
    if name == "train" and "--help" not in rest:
        check_training(rest)
        return
    script = load_script("make_reference")
    parsers = script.parsers_of(name)
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for parser in list(parsers):
        for action in parser._actions:
            if action.choices is not None and not action.option_strings and isinstance(action.choices, dict):
                assert rest[0] in action.choices, f"moe-train {name} {rest[0]}"
                known |= set(action.choices[rest[0]]._option_string_actions)
    if script.takes_fields(parsers):
        known |= script.config_options() | {"--config"}
    for word in rest:
        if word.startswith("--") and word != "--":
            assert word.partition("=")[0] in known, f"moe-train {name} has no option {word}"


def check_make(arguments: list[str]) -> None:
    """The targets and variables are the Makefile's; ARGS of make train load."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    given = dict(word.split("=", 1) for word in arguments if "=" in word)
    targets = [word for word in arguments if "=" not in word]
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"make {target}"
    for variable in given:
        assert re.search(rf"^{variable} \?=", makefile, re.MULTILINE), f"make {variable}="
    if targets == ["train"]:
        check_training(
            ["--config", given.get("CONFIG", "configs/quickstart.yaml"), *shlex.split(given.get("ARGS", ""))]
        )


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=str)
def test_a_command_of_a_page_is_real(command: Command):
    check_command(command.text)


def test_commands_are_found():
    assert len(ALL_COMMANDS) > 30
    assert {"make", "moe-train", "deepspeed", "torchrun"} <= {each.text.split()[0] for each in ALL_COMMANDS}


@pytest.mark.parametrize(
    "command",
    [
        "moe-train nowhere",
        "moe-train load runs/a --sideways",
        "moe-train checkpoint destroy runs/a",
        "moe-train checkpoint list runs/a --keep-last 2",
        "moe-train train --config configs/quickstart.yaml --train.stepz=3",
        "deepspeed launch/train.py --config configs/nowhere.yaml",
        "torchrun launch/train.py --config configs/quickstart.yaml --model.moe.top_k=100",
        "make nothing",
        'make train ARGS="--train.stepz=3"',
        "make train COLOUR=red",
        "python -m benchmarks.nowhere",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, ValueError)):
        check_command(command)


@pytest.mark.parametrize(("page", "text"), YAML_BLOCKS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(YAML_BLOCKS)])
def test_a_configuration_of_a_page_is_valid(page, text):
    del page
    values = yaml.safe_load(text)
    if set(values) <= {"model", "data", "parallel", "optim", "train", "checkpoint", "telemetry", "deepspeed"}:
        assert validate_config({"train": {"run_dir": "unused"}} | values).train.run_dir
    else:
        pytest.fail(f"a block of YAML that is no configuration: {sorted(values)}; mark it as text")


def test_paths_that_are_named_exist():
    named = re.compile(r"`(?:python )?((?:configs|launch|benchmarks|docs|docker|tests|moe_train|requirements)/[\w./]*)")
    rooms = "|".join(room for row in HOUSE for room in row if room != "launch")  # a folder of the repository too
    inside = re.compile(rf"`((?:{rooms})/[\w/]+\.py)[`:]")
    missing, seen = [], 0
    for page in all_page_names():
        text = " ".join(read_page(page).split())  # a command in backquotes may go over two lines
        for path in named.findall(text):
            seen += 1
            missing += [f"{page}: {path}"] if not (ROOT / path).exists() and "NAME" not in path else []
        for path in inside.findall(text):
            seen += 1
            missing += [f"{page}: {path}"] if not (ROOT / "moe_train" / path).exists() else []
        missing += [f"{page}: {name}" for name in re.findall(r"\bbenchmarks\.\w+", text) if not is_benchmark(name)]
    assert seen > 20
    assert missing == []


def test_links_to_pages_and_pictures_lead_somewhere():
    broken, seen = [], 0
    for page in all_page_names():
        for target in re.findall(r"\]\(([^)\s]+)\)", read_page(page)):
            path = target.partition("#")[0]
            if path and "://" not in path:
                seen += 1
                broken += [] if (DOCS / page).parent.joinpath(path).exists() else [f"{page}: {target}"]
    assert seen > 30
    assert broken == []


HOLE = "\0"


def template(node: ast.AST) -> str | None:
    """The constant parts of a text that an expression forms, with HOLE for what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [template(node.left), template(node.right)]
        return None if sides == [None, None] else "".join(HOLE if side is None else side for side in sides)
    return None


@cache
def templates() -> tuple[str, ...]:
    """Every text that the package and the scripts of launch/ may form."""
    found = []
    for folder in ("moe_train", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = template(node)
                if text is not None:
                    found.append(" ".join(text.split()))
    found += [path.read_text(encoding="utf-8") for path in (ROOT / "launch").glob("*.s*")]
    return tuple(found)


def occurs(message: str) -> bool:
    """Whether a text of the source has the message's constant parts, in order."""
    parts = [part.strip() for part in message.split("…") if part.strip(" ;:,'\"().")]
    pattern = re.compile(r".*?".join(re.escape(part) for part in parts), re.DOTALL)
    return bool(parts) and any(pattern.search(text) for text in templates())


def quoted_messages() -> list[str]:
    lines = re.findall(r"^- (`.*)$", read_page("troubleshooting.md"), re.MULTILINE)
    return [message for line in lines for message in re.findall(r"`([^`]+)`", line)]


@pytest.mark.parametrize("message", quoted_messages())
def test_a_quoted_message_is_in_the_source(message):
    assert occurs(message), "the code prints no such message any more: change docs/troubleshooting.md"


def test_messages_are_found_and_others_are_not():
    assert len(quoted_messages()) > 60
    assert not occurs("num_experts (…) shall be divisible by expert_parallel_size (…)")
    assert not occurs("expert_parallel_size (…) must be divisible by num_experts (…)")


def test_alarms_that_telemetry_quotes_are_in_the_source():
    text = read_page("telemetry.md").partition("## Alarms")[2].partition("\n## ")[0]
    quoted = [cell for cell in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)]
    assert len(quoted) >= 3
    assert [alarm for alarm in quoted if not occurs(re.sub(r"\bN\b", "…", alarm))] == []


def test_numbers_of_the_checkpoint_format_are_the_codes():
    from moe_train.checkpoint.manifest import FORMAT_VERSION

    assert f"| `format_version` | {FORMAT_VERSION};" in read_page("checkpoints.md")


def test_pages_name_no_path_of_a_machine():
    for page in all_page_names():
        assert not re.search(r"/(work|tmp|root|home)/", read_page(page)), page


def test_exit_codes_are_the_codes():
    from moe_train.config import errors

    text = read_page("restarts.md").partition("## ")[0]
    told = {int(code): what for code, what in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)}
    known = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert set(told) == {0} | known
    assert "usage" in told[errors.EXIT_USAGE] and "signal" in told[errors.EXIT_STOPPED]
    assert "lost" in told[errors.EXIT_LOST] and "numbers" in told[errors.EXIT_DIVERGED]


def test_what_is_said_of_parts_is_there():
    text = read_page("../CONTRIBUTING.md").partition("## Add a part")[2].partition("\n## ")[0]
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "moe_train").rglob("*.py"))
    rows = re.findall(
        r"^\| [\w ]+ \| `(\w+)` \| `([\w/.]+)` \| [^|]+ \| (?:`([\w.]+)\.NAME`|none) \|$", text, re.MULTILINE
    )
    assert {group for group, _, _ in rows} == set(REGISTRY)
    assert {path for _, path, _ in rows} == {f"tests/parts/{each.name}" for each in PARTS.glob("[!_]*.py")}
    assert {section: group for group, _, section in rows if section} == PLACES
    kinds = set(re.findall(r"^class (\w+Kind)\b", source, re.MULTILINE))
    assert len(kinds) == len(REGISTRY)
    assert set(re.findall(r"\b([A-Z]\w*Kind)\b", text)) == kinds
    described = dict(re.findall(r"^\| `(\w+Kind)` \| `([\w/.]+)` \|", read_page("architecture.md"), re.MULTILINE))
    assert set(described) == kinds
    for kind, path in described.items():
        assert re.search(rf"^class {kind}\b", (ROOT / "moe_train" / path).read_text(encoding="utf-8"), re.MULTILINE), (
            kind
        )
    functions = set(re.findall(r"`(\w+)\(", text))
    assert len(functions) >= 10
    assert [name for name in functions if not re.search(rf"def {name}\(", source)] == []


def test_the_python_example_of_the_readme_fits_the_interface():
    """The example names what `moe_train` has, with arguments that fit; its configuration loads."""
    (text,) = blocks(read_page("../README.md"), "python")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    ours = {node.func.attr: node for node in calls if isinstance(node.func, ast.Attribute)}
    assert {"load_config", "run_training", "load_run", "generate"} == set(ours)
    for name, call in ours.items():
        function = getattr(moe_train.LoadedRun if name == "generate" else moe_train, name)
        arguments = [*(["self"] if name == "generate" else []), *call.args]
        inspect.signature(function).bind(*arguments, **{word.arg: word.value for word in call.keywords if word.arg})
    arguments = {word.arg: ast.literal_eval(word.value) for word in ours["load_config"].keywords}
    config = moe_train.load_config(ROOT / ast.literal_eval(ours["load_config"].args[0]), **arguments)
    assert config.train.run_dir == ast.literal_eval(ours["load_run"].args[0])


def test_the_readme_is_short():
    assert len(read_page("../README.md").splitlines()) < 150
    assert len(read_page("../CONTRIBUTING.md").splitlines()) < 200


def test_every_decision_is_in_the_index_and_says_what_was_chosen():
    index = read_page("decisions/index.md")
    records = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    assert [name[:4] for name in records] == [f"{number:04d}" for number in range(1, len(records) + 1)]
    assert re.findall(r"^\| \[\d{4}\]\((.+?)\) \|", index, re.MULTILINE) == records
    assert re.findall(r"^(\d{4}-\S+)$", index, re.MULTILINE) == [name.removesuffix(".md") for name in records]
    for name in records:
        text = read_page(f"decisions/{name}")
        assert text.startswith(f"# {name[:4]}: ")
        assert {"## Context", "## Options"} <= set(text.splitlines()), name
        assert re.search(r"^## (Decision|What was chosen)$", text, re.MULTILINE), name
