import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from moe_train.host.process_identity import ProcessIdentity
from tests.processes import DROPS, HIDES, needs, run_process

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen]:
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield process
        process.kill()


def identity_of(child: subprocess.Popen) -> ProcessIdentity:
    with open(f"/proc/{child.pid}/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19])
    return replace(ProcessIdentity.own(), pid=child.pid, started=started)


def test_a_living_process_has_not_ended(child: subprocess.Popen) -> None:
    own = ProcessIdentity.own()
    assert not own.has_ended(own) and not identity_of(child).has_ended(own)
    assert ProcessIdentity.of(own.as_dict()) == own


def test_a_killed_process_has_ended_before_its_parent_asks_and_afterwards(child: subprocess.Popen) -> None:
    identity = identity_of(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays as a zombie
    assert identity.has_ended(ProcessIdentity.own())
    child.wait()
    assert identity.has_ended(ProcessIdentity.own())


def test_a_pid_that_another_process_uses_now_has_ended(child: subprocess.Popen) -> None:
    identity = identity_of(child)
    assert replace(identity, started=identity.started - 1).has_ended(ProcessIdentity.own())


LOOKS = """
import pathlib, sys
from moe_train.host.process_identity import ProcessIdentity
identity = ProcessIdentity.parse(sys.argv[1])
print(pathlib.Path(f"/proc/{identity.pid}").exists(), identity.has_ended(ProcessIdentity.own()))
"""


def test_a_process_that_proc_hides_has_not_ended(child: subprocess.Popen) -> None:
    needs(*HIDES, *DROPS)
    words = [*HIDES, *DROPS, sys.executable, "-c", LOOKS, str(identity_of(child))]
    assert run_process(words, 60, cwd=ROOT).stdout == "False False\n"
    child.kill()
    child.wait()
    assert run_process(words, 60, cwd=ROOT).stdout == "False True\n"


@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"boot": "before"}, {"pid_namespace": "pid:[1]"}])
def test_a_pid_of_another_place_tells_nothing(other: dict[str, str]) -> None:
    own = ProcessIdentity.own()
    gone = replace(own, started=own.started - 1)
    assert gone.has_ended(own) and not replace(gone, **other).has_ended(own)


def test_a_place_that_is_not_known_tells_nothing() -> None:
    gone = replace(ProcessIdentity.own(), boot="", pid_namespace="", started=0)
    assert not gone.has_ended(gone)


@pytest.mark.parametrize("values", [{}, {"pid": 1}, ProcessIdentity.own().as_dict() | {"pid": "1"}])
def test_what_is_no_identity_is_refused(values: dict) -> None:
    with pytest.raises(ValueError, match="not the identity"):
        ProcessIdentity.of(values)


def test_the_job_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun without a name
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "job" not in ProcessIdentity.own().describe()
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert ProcessIdentity.own().describe().endswith(f"pid {os.getpid()}, job 4711")
