"""`moe-train checkpoint`: every subcommand, its JSON, its exit codes, and what a user gets wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_train.cli.main import main
from tests.checkpoint.made import CONFIG, made_state, make_checkpoint

COMMANDS = ("list", "verify", "inspect", "diff", "prune", "export")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with three checkpoints."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path / "run" / "checkpoints", step, state=made_state(step))
    return tmp_path / "run"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a subcommand: the exit code, what it prints, and what it complains of."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["checkpoint", *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def call_json(call: Any) -> Any:
    """Runs a subcommand with --json: the exit code and the object on the last line, which is the only one."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        code, out, err = call(*arguments, "--json")
        assert err == ""
        (line,) = out.splitlines()
        return code, json.loads(line)

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_has_help_and_takes_no_abbreviations(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["checkpoint", name, "--help"])
    assert ended.value.code == 0 and "--json" in capsys.readouterr().out
    for arguments in ([name], [name, "x", "--js"]):
        assert main(["checkpoint", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_list(run_dir: Path, call: Any, call_json: Any) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "step_00000001" / "manifest.json").write_bytes(b"{}")
    (checkpoints / "step_00000004.part").mkdir()
    (checkpoints / "step_00000002").rename(checkpoints / "step_00000002.damaged")
    for path in (run_dir, checkpoints):
        code, found = call_json("list", path)
        assert code == 0
        rows = {entry["name"]: entry for entry in found["checkpoints"]}
        assert [(name, row["kind"]) for name, row in rows.items()] == [
            ("step_00000001", "checkpoint"),
            ("step_00000002.damaged", "set aside"),
            ("step_00000003", "checkpoint"),
            ("step_00000004.part", "unfinished"),
        ]
        assert rows["step_00000003"]["is_latest"] and not rows["step_00000001"]["is_latest"]
        assert rows["step_00000001"]["problem"] and rows["step_00000003"]["problem"] is None
        assert rows["step_00000003"]["step"] == 3 and rows["step_00000003"]["layout"]["world_size"] == 2
        size = sum(file.stat().st_size for file in (checkpoints / "step_00000003").iterdir())
        assert rows["step_00000003"]["num_bytes"] == size
    code, out, _ = call("list", run_dir)
    assert code == 0 and "step_00000003" in out and "latest" in out and "2 ranks, EP 1, ZeRO 1" in out


def test_verify(run_dir: Path, call: Any, call_json: Any) -> None:
    newest = run_dir / "checkpoints" / "step_00000003"
    code, found = call_json("verify", run_dir)
    assert code == 0 and found["whole"] and len(found["folders"]) == 4
    code, found = call_json("verify", newest)
    assert code == 0 and [Path(file["path"]).name for file in found["folders"][0]["files"]] == [
        "manifest.json",
        "rank_00000.safetensors",
        "rank_00001.safetensors",
    ]
    path = newest / "rank_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    code, out, _ = call("verify", run_dir)
    assert code == 1 and "DAMAGE" in out and "rank_00001.safetensors" in out and "digest" in out
    code, found = call_json("verify", run_dir, newest)
    assert code == 1 and not found["whole"]
    (problem,) = {file["problem"] for folder in found["folders"] for file in folder["files"] if file["problem"]}
    assert str(path) in problem
    code, found = call_json("verify", run_dir / "checkpoints" / "step_00000002")
    assert code == 0


def test_verify_looks_at_latest_and_strays(run_dir: Path, call_json: Any) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "latest").write_text("step_00000002\n")
    (checkpoints / "notes.txt").touch()
    (checkpoints / "step_00000009.part").mkdir()
    code, found = call_json("verify", run_dir)
    problems = [file["problem"] for folder in found["folders"] for file in folder["files"] if file["problem"]]
    assert code == 1 and len(problems) == 2
    assert "latest" in problems[0] and "step_00000003" in problems[0] and "notes.txt" in problems[1]


def test_inspect(run_dir: Path, call: Any, call_json: Any) -> None:
    for path in (run_dir, run_dir / "checkpoints", run_dir / "checkpoints" / "step_00000003"):
        code, found = call_json("inspect", path)
        assert code == 0 and found["step"] == 3 and found["parameters"] == 30
        assert found["buffer_values"] == {"router.bias": [0.5, -0.25]}
    code, out, _ = call("inspect", run_dir)
    assert code == 0 and "experts.gate_up" in out and "[2, 3, 2]" in out and "40.00 %" in out
    code, found = call_json("inspect", run_dir, "--tensor", "norm.weight")
    weight = found["statistics"][0]
    expected = float(made_state(3)["weight/norm.weight"].max())
    assert code == 0 and found["shape"] == [3] and weight["kind"] == "weight" and weight["max"] == expected
    code, out, _ = call("inspect", run_dir, "--tensor", "norm.weight")
    assert code == 0 and "exp_avg_sq" in out
    code, out, _ = call("inspect", run_dir, "--config")
    assert code == 0 and yaml.safe_load(out) == CONFIG
    assert call_json("inspect", run_dir, "--config")[1]["config"] == CONFIG


def test_diff(run_dir: Path, tmp_path: Path, call: Any, call_json: Any) -> None:
    other = make_checkpoint(tmp_path / "other" / "checkpoints", 3, world_size=4, state=made_state(3))
    code, found = call_json("diff", run_dir, other)
    assert code == 0 and found["equal"] and not found["config"]
    code, out, _ = call("diff", run_dir, other)
    assert code == 0 and "layout.world_size" in out and "equal bit for bit" in out
    two = run_dir / "checkpoints" / "step_00000002"
    code, found = call_json("diff", run_dir, two)
    assert code == 1 and not found["equal"] and found["tensors"][0]["relative_l2"] > 0
    code, out, _ = call("diff", run_dir, two)
    assert code == 1 and "tensors that differ: 9" in out and "not equal" in out
    assert call("diff", run_dir, two, "--tolerance", 2)[0] == 0  # the distance is at most the sum of both norms


def test_prune(run_dir: Path, call: Any, call_json: Any) -> None:
    checkpoints = run_dir / "checkpoints"
    before = sorted(os.listdir(checkpoints))
    code, found = call_json("prune", run_dir, "--keep-last", 1, "--keep-every", 2, "--dry-run")
    assert code == 0 and found["removed"] == ["step_00000001"] and found["dry_run"]
    assert sorted(os.listdir(checkpoints)) == before
    code, out, _ = call("prune", run_dir, "--keep-last", 1, "--keep-every", 2)
    assert code == 0 and "removed: step_00000001" in out and "freed" in out
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000002", "step_00000003"]
    (checkpoints / "step_00000003" / "rank_00000.safetensors").unlink()
    code, out, _ = call("prune", run_dir, "--keep-last", 1)
    assert code == 0 and "step_00000003 is damaged" in out and "step_00000002 is the newest whole one" in out
    assert sorted(os.listdir(checkpoints)) == ["latest", "step_00000002", "step_00000003"]


def test_export(run_dir: Path, tmp_path: Path, call: Any, call_json: Any) -> None:
    code, found = call_json("export", run_dir, tmp_path / "out", "--dtype", "bf16", "--max-shard-bytes", 40)
    assert code == 0 and found["folder"] == str(tmp_path / "out") and found["tensors"] == 5
    assert found["bytes"] == 2 * 30 + 4 * 2 and found["shards"] == len(list((tmp_path / "out").glob("model-*")))
    code, _, err = call("export", run_dir, tmp_path / "out")
    assert code == 2 and str(tmp_path / "out") in err and "exists" in err
    code, out, _ = call("export", run_dir / "checkpoints" / "step_00000001", tmp_path / "again")
    assert code == 0 and "5 tensors" in out


WRONG = [
    (("list", "{run}/nowhere"), ("RUN_DIR", "nowhere", "not a folder")),
    (("list", "{run}/checkpoints/step_00000001/manifest.json"), ("RUN_DIR", "not a folder")),
    (("list", "{run}/empty"), ("RUN_DIR", "empty", "has no checkpoints")),
    (("verify", "{run}", "{run}/nowhere"), ("PATH", "nowhere")),
    (("verify", "{run}/checkpoints/step_00000009.part"), ("PATH", "step_00000009.part")),
    (("verify", "{run}/none"), ("PATH", "none", "has no checkpoint")),
    (("inspect", "{run}/nowhere"), ("CHECKPOINT", "nowhere")),
    (("inspect", "{run}/none"), ("CHECKPOINT", "none", "has no checkpoint")),
    (("inspect", "{run}/checkpoints/step_00000009.part"), ("CHECKPOINT", "step_00000009.part", "manifest.json")),
    (("inspect", "{run}", "--tensor", "head"), ("--tensor ('head')",)),
    (("inspect", "{run}/other_format"), ("format version 9",)),
    (("diff", "{run}", "{run}/nowhere"), ("B (", "nowhere")),
    (("diff", "{run}", "{run}", "--tolerance=-1"), ("--tolerance (-1.0)",)),
    (("diff", "{run}", "{run}", "--tolerance=nan"), ("--tolerance (nan)",)),
    (("prune", "{run}", "--keep-last", "0"), ("--keep-last (0)", "1 or more")),
    (("prune", "{run}", "--keep-last", "1", "--keep-every", "-1"), ("--keep-every (-1)",)),
    (("export", "{run}", "{run}/empty"), ("FOLDER", "empty", "exists")),
    (("export", "{run}", "{run}/out", "--max-shard-bytes", "0"), ("--max-shard-bytes (0)",)),
    (("export", "{run}", "{run}/metrics.jsonl/out"), ("metrics.jsonl",)),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=[" ".join(case[0]) for case in WRONG])
def test_wrong_input_is_one_message(
    run_dir: Path, call: Any, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    for folder in ("empty", "none/checkpoints", "checkpoints/step_00000009.part"):
        (run_dir / folder).mkdir(parents=True)
    (run_dir / "metrics.jsonl").touch()
    make_checkpoint(run_dir / "other_format", format_version=9)
    code, out, err = call(*(argument.replace("{run}", str(run_dir)) for argument in arguments))
    assert code == 2 and out == "", out
    (line,) = err.splitlines()
    for word in words:
        assert word in line


def test_a_checkpoint_that_vanishes_is_a_message(run_dir: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_train.checkpoint.tools import inspection

    def vanish(manifest: Any) -> None:
        shutil.rmtree(manifest.folder)
        check_sizes(manifest)

    check_sizes = inspection.check_sizes
    monkeypatch.setattr(inspection, "check_sizes", vanish)
    code, _, err = call("inspect", run_dir, "--tensor", "norm.weight")
    assert code == 2 and len(err.splitlines()) == 1 and "step_00000003" in err


def test_hostile_names_do_not_reach_the_terminal(tmp_path: Path, call: Any) -> None:
    make_checkpoint(
        tmp_path / "checkpoints", shapes={"\x1b]0;owned\x07": (3,), "[red]": (1,), "\ud800": (0,)}, tokenizer="\x1b[2J"
    )
    code, out, _ = call("inspect", tmp_path)
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert "\\x1b]0;owned" in out and "[red]" in out and "\\ud800" in out


def test_deepspeed_is_not_imported(run_dir: Path) -> None:
    code = (
        "import sys; from moe_train.cli.main import main; "
        "codes = [main(['checkpoint', *arguments.split()]) for arguments in sys.argv[1:]]; "
        "print('deepspeed' in sys.modules, codes, file=sys.stderr)"
    )
    arguments = [f"list {run_dir}", f"verify {run_dir}", f"inspect {run_dir}", f"diff {run_dir} {run_dir}"]
    arguments += [f"prune {run_dir} --keep-last 1", f"export {run_dir} {run_dir}/out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
    assert result.stderr.splitlines()[-1] == f"False {[0] * 6}", result.stderr
