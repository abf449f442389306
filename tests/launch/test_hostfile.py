"""Hostfiles, the choice of a network interface, a master's port that is taken, and what is handed on to other hosts."""

import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_train.config.errors import UsageError
from moe_train.distributed.addresses import choose_interface
from moe_train.distributed.rendezvous import open_rendezvous
from moe_train.distributed.world import World
from moe_train.launch.commands import passed_environment
from moe_train.launch.hostfile import HostLine, read_hostfile


def test_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two\na-1.b slots=8\n\n  c   slots=2 \n")
    assert read_hostfile(path) == [
        HostLine("a-1.b", 8, f"--hostfile {path}, line 2"),
        HostLine("c", 2, f"--hostfile {path}, line 4"),
    ]


@pytest.mark.parametrize(
    ("line", "user", "slots"),
    [
        ("a slots=2 # rack 1", None, 2),
        ("a slots=2# rack 1", None, 2),
        ("a slots=2 max_slots=4", None, 2),
        ("a max-slots=4 slots=2", None, 2),
        ("a slots = 2", None, 2),
        ("a\tslots=2\r", None, 2),
        ("a:3", None, 3),
        ("me@a slots=2", "me", 2),
        ("me@a:2", "me", 2),
        ("\ufeffa slots=2", None, 2),
    ],
)
def test_hostfiles_of_others(tmp_path: Path, line: str, user: str | None, slots: int) -> None:
    path = tmp_path / "hosts"
    path.write_text(f"{line}\n", encoding="utf-8")
    host = HostLine("a", slots, f"--hostfile {path}, line 1", user)
    assert read_hostfile(path) == [host]
    assert host.target == (f"{user}@a" if user else "a")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fd00::1 slots=2", "an IPv6 address needs a name"),
        ("a slots=4 max_slots=2", r"slots \(4\) must be at most max_slots \(2\)"),
        ("a slots=2 slots=3", "must be a name and slots=N"),
        ("a slots=2 cores=3", "must be a name and slots=N"),
        ("a:x", r"slots \('x'\)"),
        ("@a slots=2", "is no host name"),
    ],
)
def test_lines_of_others_that_are_named(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "hosts").write_text(line)
    with pytest.raises(UsageError, match=f"line 1.*{said}"):
        read_hostfile(tmp_path / "hosts")


def test_a_host_stands_there_once(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=1\nme@a slots=1\n")
    with pytest.raises(UsageError, match="line 2: a stands in line 1 already"):
        read_hostfile(tmp_path / "hosts")


@settings(deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=80)
    | st.from_regex(r"(\w+@?\w* ?(slots|max_slots)? ?=? ?\w*\n?){1,4}")
)
def test_no_hostfile_ends_in_a_traceback(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hosts"
        path.write_text(text, encoding="utf-8")
        try:
            assert all(host.slots > 0 and host.name for host in read_hostfile(path))
        except UsageError as error:
            assert "--hostfile" in str(error)


@pytest.mark.parametrize("line", ["a", "a slots=0", "a slots=-1", "a slots=²", "-o slots=1", "a slots=1 b"])
def test_lines_that_are_no_hosts(tmp_path: Path, line: str) -> None:
    (tmp_path / "hosts").write_text(f"good slots=1\n{line}\n")
    with pytest.raises(UsageError, match="line 2"):
        read_hostfile(tmp_path / "hosts")


def test_interface_by_name() -> None:
    environ: dict[str, str] = {}
    choose_interface("lo", environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}  # else NCCL would take lo2 too
    told = {"NCCL_SOCKET_IFNAME": "lo"}
    choose_interface("lo", told)
    assert told == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    unset: dict[str, str] = {}
    choose_interface(None, unset)
    assert unset == {}


def test_interface_that_is_not_there_or_contradicted() -> None:
    with pytest.raises(UsageError, match=r"network_interface \('ib7'\).* it has .*lo"):
        choose_interface("ib7", {})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        with pytest.raises(UsageError, match=rf"network_interface \('lo'\) contradicts {name} \('eth9'\)"):
            choose_interface("lo", {name: "eth9"})


def test_port_taken_is_said_on_rank_0() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        world = World(0, 2, 0, 2, 1, 0, "127.0.0.1", port, "environment")
        with pytest.raises(UsageError, match=rf"MASTER_PORT \({port}\)"):
            open_rendezvous(world, timedelta(seconds=5), {})


def test_environment_that_is_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").write_text("A=1\n")
    environ = {"NCCL_DEBUG": "INFO", "HOME": "/x", "PATH": "/bin", "MINE": "m", "DS_ENV_FILE": "env"}
    found = passed_environment(["MINE", "B=2"], "k", "/venv/bin/python", environ)
    assert found == {
        "NCCL_DEBUG": "INFO",
        "PATH": "/venv/bin:/bin",
        "A": "1",
        "MINE": "m",
        "B": "2",
        "MOE_TRAIN_LAUNCH": "k",
    }
    with pytest.raises(UsageError, match="--env YOURS"):
        passed_environment(["YOURS"], "k", "/venv/bin/python", environ)
