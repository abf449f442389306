"""`moe-train doctor` on real ranks, sound ones and such that something is wrong with."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from moe_train.cli.doctor import run
from moe_train.config.errors import UsageError
from moe_train.config.machine import read_machine
from moe_train.distributed.addresses import free_port
from tests.doctor.faulty import examine, report_of
from tests.processes import run_process
from tests.train.runs import CPU, ROOT

TWO_HOSTS = [
    {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": str(rank)} for rank in range(2)
]


def only_problem(results, kind: str) -> dict[str, str]:
    """The one problem that was found."""
    report = report_of(results)
    assert [result.returncode for result in results] == [1] * len(results), report
    assert not report["passed"]
    assert [found["kind"] for found in report["problems"]] == [kind], report["problems"]
    return report["problems"][0]


def test_one_process_alone(tmp_path: Path) -> None:
    output = tmp_path / "machine.json"
    command = [sys.executable, "-m", "moe_train", "doctor", "--quick", "--json", "--output", output]
    result = run_process([*command, "--shared-dir", tmp_path], 90, env=CPU, cwd=ROOT)
    assert result.returncode == 0, result
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["passed"] and report["problems"] == []
    assert (report["collectives"], report["links"]) == ([], [])
    assert any("there is one rank" in text for text in report["not_measured"])
    assert json.loads(output.read_text()) == report
    machine = read_machine(output)
    assert machine.model_dump(mode="json") == report["machine"]
    assert machine.ranks_per_node == 1
    assert {(p.rows, p.width) for p in machine.products["fp32"]} >= {(16, 64), (256, 256)}
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.slow
def test_ranks_of_one_host(tmp_path: Path) -> None:
    results = examine(4, f"--train.run_dir={tmp_path}/run", "--train.seed=7")
    report = report_of(results)
    assert [result.returncode for result in results] == [0] * 4, results[0].stderr
    assert [rank["seed"] for rank in report["ranks"]] == ["7"] * 4
    assert len({rank["config_digest"] for rank in report["ranks"]}) == 1
    assert report["folder"]["path"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    found = {(each["operation"], each["scope"], each["bytes"]) for each in report["collectives"]}
    assert {(name, "within", 1024) for name in ("all_to_all", "all_reduce", "all_gather", "ring")} <= found
    assert all(each["correct"] and each["seconds"] > 0 for each in report["collectives"])
    assert {(link["source"], link["target"]) for link in report["links"]} == {
        (a, b) for a in range(4) for b in range(4) if a != b
    }
    assert report["machine"]["ranks_per_node"] == 4
    assert report["machine"]["inter_node"] is None
    assert results[1].stdout == ""


@pytest.mark.slow
def test_two_hosts_have_a_network_between_them() -> None:
    results = examine(2, environments=TWO_HOSTS)
    report = report_of(results)
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    assert {each["scope"] for each in report["collectives"]} == {"across"}
    assert report["machine"]["inter_node"] is not None
    assert {link["scope"] for link in report["links"]} == {"hosts", "ranks"}
    assert len(report["clocks"]) == 1
    assert abs(report["clocks"][0]["ahead_seconds"]) < 0.5  # one machine has one clock
    assert report["warnings"] == [] or all(found["kind"] != "clock" for found in report["warnings"])


@pytest.mark.slow
def test_another_seed_is_named() -> None:
    problem = only_problem(examine(2, own=[["--train.seed=1"], ["--train.seed=2"]]), "configuration")
    assert "train.seed differs: 1 on rank 0" in problem["message"]
    assert "2 on rank 1" in problem["message"]


@pytest.mark.slow
def test_an_environment_variable_is_named() -> None:
    results = examine(2, environments=[{}, {"OMP_NUM_THREADS": "2"}])
    problem = only_problem(results, "environment")
    assert "OMP_NUM_THREADS differs: 1 on rank 0" in problem["message"]
    assert problem["where"].startswith("rank 1 (")


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_another_checkout_is_named_and_not_measured(world_size: int, tmp_path: Path) -> None:
    results = examine(world_size, f"--shared-dir={tmp_path}/new", faults={"checkout": world_size - 1})
    problem, report = only_problem(results, "code"), report_of(results)
    assert "the code of moe_train differs" in problem["message"]
    assert problem["where"].startswith(f"rank {world_size - 1} (")
    assert [rank["rank"] for rank in report["ranks"]] == list(range(world_size - 1))
    assert (report["machine"], report["folder"]) == (None, None)
    assert len(report["not_measured"]) == 2
    assert all("bring the same checkout" in text for text in report["not_measured"])


@pytest.mark.slow
def test_another_code_is_named_in_a_table() -> None:
    results = examine(2, faults={"code": 1}, as_json=False)
    assert [result.returncode for result in results] == [1, 1]
    assert "PROBLEM [code] rank 1" in results[0].stdout and "all is well" not in results[0].stdout


@pytest.mark.slow
def test_another_version_is_named() -> None:
    problem = only_problem(examine(2, faults={"version": 1}), "versions")
    assert "deepspeed differs: " in problem["message"]
    assert "0.0.1 on rank 1" in problem["message"]


def test_wrong_numbers_are_named() -> None:
    results = examine(2, faults={"wrong": 1})
    report = report_of(results)
    assert {found["kind"] for found in report["problems"]} == {"collective"}
    assert all(found["where"].startswith("rank 1 (") for found in report["problems"])
    assert any("all_to_all of bfloat16 in uneven blocks" in found["message"] for found in report["problems"])
    assert {e["operation"] for e in report["collectives"] if not e["correct"]} == {"all_to_all"}


@pytest.mark.slow
def test_folder_that_is_another_one_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    problem = only_problem(examine(2, own=[[f"--shared-dir={folder}"] for folder in folders]), "folder")
    assert "is another folder than rank 0's" in problem["message"]
    assert problem["where"] == "rank 1"
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


@pytest.mark.slow
def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    problem = only_problem(examine(2, own=[[f"--shared-dir={tmp_path}/{name}"] for name in ("new", "file")]), "folder")
    assert "cannot be written" in problem["message"]
    assert problem["where"] == "rank 1"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_clock_that_is_ahead_is_a_warning() -> None:
    results = examine(2, environments=TWO_HOSTS, faults={"clock": 1})
    report = report_of(results)
    assert [result.returncode for result in results] == [0, 0], report["problems"]
    warnings = [found for found in report["warnings"] if found["kind"] == "clock"]
    assert len(warnings) == 1
    assert "100.00 s ahead of the first host's" in warnings[0]["message"]


@pytest.mark.slow
def test_hosts_with_different_numbers_of_ranks(tmp_path: Path) -> None:
    places = [(0, 2, 0), (1, 2, 0), (0, 1, 1)]
    environments = [
        {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "GROUP_RANK": str(node), "GROUP_WORLD_SIZE": "2"}
        for rank, size, node in places
    ]
    results = examine(3, f"--shared-dir={tmp_path}", environments=environments)
    report = report_of(results)
    assert [result.returncode for result in results] == [0] * 3, (report, results[0].stderr)
    host = [rank["host"] for rank in report["ranks"]]
    assert host[0] == host[1] != host[2]
    told = [found["message"] for found in report["warnings"] if "as many ranks" in found["message"]]
    assert told == [f"not all have as many ranks: 2 on {host[0]}, 1 on {host[2]}"]
    assert {each["scope"] for each in report["collectives"]} == {"within", "across", "all"}
    assert report["machine"]["intra_node"] and report["machine"]["inter_node"]


@pytest.mark.slow
def test_interface_of_the_configuration_is_the_one_that_is_looked_at() -> None:
    results = examine(2, "--parallel.network_interface=lo", "--sizes=1K", environments=TWO_HOSTS)
    report = report_of(results)
    assert [rank["interface"] for rank in report["ranks"]] == ["lo", "lo"]
    assert [rank["environment"]["GLOO_SOCKET_IFNAME"] for rank in report["ranks"]] == ["lo", "lo"]


@pytest.mark.slow
def test_interface_of_the_configuration_that_one_rank_lacks_is_a_problem() -> None:
    results = examine(2, own=[[], ["--parallel.network_interface=ib7"]])
    problem = only_problem(results, "configuration")
    assert "parallel.network_interface ('ib7')" in problem["message"] and problem["where"].startswith("rank 1 (")


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [True, False])
def test_closed_output_ends_as_that_of_other_commands(as_json: bool) -> None:
    command = [sys.executable, "-m", "moe_train", "doctor", "--quick", *(["--json"] if as_json else [])]
    result = run_process(
        ["bash", "-c", f"{shlex.join(command)} | true; echo ${{PIPESTATUS[0]}}"], 90, env=CPU, cwd=ROOT
    )
    assert result.stdout.split() == ["141"], result
    assert "Traceback" not in result.stderr and "gone" not in result.stderr


@pytest.mark.slow
def test_closed_output_lets_the_other_ranks_end_well() -> None:
    results = examine(2, faults={"pipe": 0})
    assert [result.returncode for result in results] == [141, 0], results


@pytest.mark.slow
def test_rank_that_hangs_is_named_and_leaves_none_behind() -> None:
    results = examine(4, "--timeout=4", faults={"hang": 2})
    problem = only_problem(results, "unanswered")
    assert problem["where"].startswith("rank 2 (")
    assert max(result.seconds for result in results) < 60


@pytest.mark.slow
def test_rank_that_never_comes_is_named() -> None:
    environment = CPU | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "moe_train", "doctor", "--quick", "--json", "--timeout=2"]
    result = run_process(command, 60, env=environment, cwd=ROOT)
    assert result.returncode == 1, result
    problem = json.loads(result.stdout.splitlines()[-1])["problems"][0]
    assert (problem["kind"], problem["where"]) == ("unanswered", "rank 1")


@pytest.mark.slow
def test_rank_without_a_first_rank_says_so() -> None:
    environment = CPU | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    result = run_process([sys.executable, "-m", "moe_train", "doctor", "--timeout=1"], 60, env=environment, cwd=ROOT)
    assert result.returncode == 1, result
    assert "rank 1 cannot meet the others: nothing listened at 127.0.0.1" in result.stderr


@pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["--timeout", "--expect-bandwidth"])
def test_numbers_that_are_none(option: str, number: str) -> None:
    with pytest.raises(UsageError, match=rf"^{option} \({number}\) must be more than 0 .*and finite"):
        run([f"{option}={number}"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sizes=1K,x",), "--sizes ('1K,x') must be bytes"),
        (("--output=/no/such/folder/x",), "there is no folder /no/such/folder"),
        (("--train.no_such_field=1",), "unknown option --train.no_such_field"),
        (("--parallel.network_interface=ib7",), "parallel.network_interface ('ib7'): host "),
    ],
)
def test_bad_usage(arguments: tuple[str, ...], message: str) -> None:
    (result,) = examine(1, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_usage_of_ranks_is_said_once() -> None:
    results = examine(2, "--model.moe.num_experts=6", "--parallel.expert_parallel_size=4")
    assert [result.returncode for result in results] == [2, 2]
    said = "".join(result.stderr for result in results)
    assert said.count("must be divisible by") == 1 and "Traceback" not in said


def test_configuration_of_one_rank_alone_is_a_problem(tmp_path: Path) -> None:
    results = examine(2, own=[["--config=configs/quickstart.yaml"], [f"--config={tmp_path}/none.yaml"]])
    assert "cannot be read" in only_problem(results, "configuration")["message"]
