"""Ranks meet in the store of their own launch, and say so in one message where something else has its port."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_train.config.errors import UsageError
from moe_train.distributed import missing_ranks, rendezvous
from moe_train.distributed.addresses import free_port
from moe_train.distributed.rendezvous import LAUNCH_MARK, launch_name, open_rendezvous
from moe_train.distributed.world import Launcher, World
from tests.processes import ProcessResult, run_process

ROOT = Path(__file__).resolve().parents[2]
LIMIT = timedelta(seconds=20)


def world(rank: int, port: int, size: int = 4) -> World:
    return World(rank, size, rank, size, 1, 0, "127.0.0.1", port, "environment")


def test_ranks_of_a_launch_meet() -> None:
    port = free_port()
    with ThreadPoolExecutor(4) as threads:
        stores = list(threads.map(lambda rank: open_rendezvous(world(rank, port), LIMIT, {}), range(4)))
    stores[3].set("said", "yes")
    assert stores[1].get("said") == b"yes"


@pytest.mark.parametrize(
    ("own", "size"),
    [
        pytest.param({LAUNCH_MARK: "another"}, 4, id="another launch"),
        pytest.param({LAUNCH_MARK: "first"}, 8, id="of another size"),
        pytest.param({LAUNCH_MARK: "first"}, 4, id="of the same name", marks=pytest.mark.slow),  # it has all its ranks
    ],
)
def test_a_store_of_another_launch_is_left_alone(own: dict[str, str], size: int) -> None:
    port = free_port()
    foreign = [open_rendezvous(world(rank, port), LIMIT, {LAUNCH_MARK: "first"}) for rank in range(4)]
    before = foreign[0].num_keys()
    with pytest.raises(UsageError, match=rf"MASTER_PORT \({port}\).*another launch"):
        open_rendezvous(world(1, port, size), LIMIT, own)
    with pytest.raises(UsageError, match=rf"MASTER_PORT \({port}\)"):
        open_rendezvous(world(0, port, size), LIMIT, own)
    assert foreign[0].num_keys() == before


def test_a_store_of_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_NAME_SECONDS", 0.5)
    foreign = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(UsageError, match="what listens there is not rank 0's store"):
        open_rendezvous(world(1, foreign.port), LIMIT, {})


def test_a_listener_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        started = time.monotonic()
        with pytest.raises(UsageError, match="what listens there gives no answer"):
            open_rendezvous(world(1, server.getsockname()[1]), LIMIT, {})
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_master_whose_name_nobody_knows(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    monkeypatch.setattr(rendezvous, "_RESOLVE_SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"MASTER_ADDR \('no-such-host\.invalid'\): .* does not know this host"):
        open_rendezvous(replace(world(rank, free_port()), master_addr="no-such-host.invalid"), LIMIT, {})
    assert time.monotonic() - started < 10


@pytest.fixture
def store_of_a_process() -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """A store that is open, but nothing is written into it."""
    code = (
        "import time, torch.distributed as dist; "
        "store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False); "
        "print(store.port, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


def test_a_rank_0_that_is_lost_is_a_fault(store_of_a_process: tuple["subprocess.Popen[bytes]", int]) -> None:
    process, port = store_of_a_process
    timer = threading.Timer(1.0, process.kill)
    timer.start()
    with pytest.raises(ConnectionError, match="was lost"):
        open_rendezvous(world(1, port), LIMIT, {})


def test_name_of_a_launch_has_what_launchers_say() -> None:
    step = World(1, 2, 1, 2, 1, 0, "127.0.0.1", 1, "srun")
    names = {launch_name(step, {"SLURM_JOB_ID": job, "SLURM_STEP_ID": "0"}) for job in ("1", "2")}
    assert len(names) == 2
    # mpirun's ranks on other hosts see other variables of Slurm than those beside it.
    alike = World(1, 2, 1, 2, 1, 0, "127.0.0.1", 1, "mpirun")
    assert launch_name(alike, {"SLURM_STEP_ID": "0", "PMIX_NAMESPACE": "n"}) == launch_name(
        alike, {"PMIX_NAMESPACE": "n"}
    )


@pytest.mark.slow
def test_doctor_ends_on_all_ranks_where_its_port_is_taken() -> None:
    """By real processes: a thread that waits for the listener must not hold them."""
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])

        def doctor(rank: int) -> ProcessResult:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            environment = {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, "-m", "moe_train", "doctor", "--timeout", "2"]
            return run_process(command, 60, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=ROOT)

        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(doctor, range(2)))
    for result in results:
        assert result.returncode == 2, result
        assert result.seconds < 40, result
    assert sum(result.stderr.count(f"MASTER_PORT ({port})") for result in results) == 1, results


def test_missing_ranks_are_named_with_what_made_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_SECONDS", 0.3)
    monkeypatch.setattr(missing_ranks, "NOTICE_SECONDS", 0.3)
    port, said = free_port(), list[str]()
    environ = {"RANK": "0", "WORLD_SIZE": "4"}
    stores = [open_rendezvous(world(rank, port), LIMIT, environ) for rank in (0, 2)]
    with pytest.raises(TimeoutError, match=r"after 1 s .*ranks 1, 3 of 4 have not come.*WORLD_SIZE \(4\)"):
        rendezvous.wait_for_ranks(stores[0], world(0, port), timedelta(seconds=1), environ, said.append)
    assert len(said) == 1 and "unset WORLD_SIZE RANK" in said[0]
    late = [open_rendezvous(world(rank, port), LIMIT, environ) for rank in (1, 3)]
    rendezvous.wait_for_ranks(stores[0], world(0, port), LIMIT, environ, said.append)
    assert len(said) == 1 and len(late) == 2


@pytest.mark.parametrize(
    ("launcher", "environ", "unset"),
    [
        ("srun", {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0"}, "unset SLURM_PROCID"),
        ("mpirun", {"OMPI_COMM_WORLD_SIZE": "2"}, "unset OMPI_COMM_WORLD_SIZE"),
        ("torchrun", {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "unset TORCHELASTIC_RUN_ID"),
        ("deepspeed", {"WORLD_SIZE": "2", "RANK": "0", "CROSS_SIZE": "1"}, "unset WORLD_SIZE RANK CROSS_SIZE"),
    ],
)
def test_what_to_unset(launcher: Launcher, environ: dict[str, str], unset: str) -> None:
    place = replace(world(0, 1, 2), launcher=launcher)
    text = missing_ranks.describe_missing([1], place, environ)
    assert "rank 1 of 2 has not come" in text and unset in text
    assert all(f"{name} ({value})" in text for name, value in environ.items())


def test_an_agent_that_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = world(1, server.getsockname()[1])
        with pytest.raises(ConnectionError, match=r"torchrun's agent at .* gives no answer"):
            rendezvous.open_store(place, LIMIT, {"TORCHELASTIC_USE_AGENT_STORE": "True"})
