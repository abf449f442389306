"""The container image: its entry point, run without a container; what the files of docker/ promise each other; and,
where buildah and debootstrap are installed, the image itself, built without a daemon."""

import contextlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.processes import ProcessResult, run_process

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
ENTRYPOINT = DOCKER / "entrypoint.sh"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "mpiexec")
BUILD_SECONDS, TEST_SECONDS, COMMAND_SECONDS = 1500, 600, 120
QUICK_TESTS = "-q tests/config tests/ops/test_permute.py tests/distributed/test_launchers.py tests/docker"
SSH_TO_ITSELF = """
export SSH_PORT={port}
docker/entrypoint.sh sshd & trap 'kill $!' EXIT
for each in $(seq 50); do
    if [ -f ~/.ssh/config ] && ssh localhost which deepspeed; then exit 0; fi
    sleep 0.2
done
exit 1
"""


@pytest.fixture
def run(tmp_path):
    """Runs the entry point with a home, a folder for keys and a first folder of PATH of its own."""
    for name in ("home", "keys", "bin"):
        (tmp_path / name).mkdir()

    def run(*words: str, env: Mapping[str, str] | None = None) -> ProcessResult:
        own = {"HOME": f"{tmp_path}/home", "KEYS_DIR": f"{tmp_path}/keys", "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
        return run_process(["bash", ENTRYPOINT, *words], timeout=30, env=own | {"SSH_PORT": "4022"} | dict(env or {}))

    return run


def put_command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("word", [*LAUNCHERS, "moe-train", "python", "make"])
def test_a_word_becomes_the_process_with_its_arguments_and_exit_code(run, tmp_path, word):
    put_command(tmp_path / "bin", word, 'echo "$0"; for each; do echo "[$each]"; done; echo $$ $PPID; exit 75')
    result = run(word, "--config", "two words", "")
    assert result.returncode == 75
    command, *arguments, pids = result.stdout.splitlines()
    assert command == f"{tmp_path}/bin/{word}" and arguments == ["[--config]", "[two words]", "[]"]
    assert int(pids.split()[1]) == os.getpid()  # in the place of the script: a signal to that reaches it


def test_help_names_every_word(run):
    result = run("help")
    assert (result.returncode, result.stderr) == (0, "")
    words = re.findall(r"^  ([a-z][^)]*)\)", ENTRYPOINT.read_text().rpartition("\ncase ")[2], re.MULTILINE)
    named = {word.strip() for each in words for word in each.split("|")}
    assert {*LAUNCHERS, "sshd", "help"} <= named
    assert [word for word in named if not re.search(rf"(^|\| |  ){re.escape(word)}\b", result.stdout)] == []


@pytest.mark.parametrize(
    "words, env, said",
    [
        ((), {}, "no command: deepspeed,"),
        (("train.py",), {}, "train.py: no such command"),
        (("deepspeed",), {}, "deepspeed is not on PATH ("),
        (("sshd", "-p", "22"), {}, "sshd takes no arguments, not -p 22"),
        (("sshd",), {"SSH_PORT": "ssh"}, "SSH_PORT (ssh) must be a number"),
        (("sshd",), {"KEYS_DIR": "/dev/null/keys"}, "KEYS_DIR (/dev/null/keys) must be a folder that user "),
        (("sshd",), {"OMP_PLACES": '"cores"'}, 'OMP_PLACES ("cores") must be without quotation marks'),
        (("keep_running.sh",), {}, "keep_running.sh: "),
    ],
)
def test_a_wrong_call_is_one_message(run, tmp_path, words, env, said):
    put_command(tmp_path / "bin", "sshd", "exit 0")
    result = run(*words, env=env)
    assert result.returncode == 2, result
    assert said in result.stderr and result.stdout == ""


@pytest.fixture
def host(run, tmp_path):
    """Starts sshd by the entry point: a command in its place shows its configuration."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no command ssh-keygen: install openssh-client")
    put_command(tmp_path / "bin", "sshd", 'echo "$@"; for last; do :; done; cat "$last"')

    def start(**env: str) -> list[str]:
        result = run("sshd", env=env)
        assert result.returncode == 0, result
        return result.stdout.splitlines()

    return start


def test_sshd_makes_keys_once_for_all_hosts(host, tmp_path):
    host()
    keys = tmp_path / "keys"
    first = {path.name: path.read_bytes() for path in keys.iterdir()}
    assert set(first) == {
        ".lock", "authorized_keys", "host_ed25519", "host_ed25519.pub", "id_ed25519", "id_ed25519.pub", "known_hosts"
    }  # fmt: skip
    assert first["known_hosts"].split() == [b"*", *first["host_ed25519.pub"].split()[:2]]
    assert first["authorized_keys"] == first["id_ed25519.pub"]
    for name in ("host_ed25519", "id_ed25519", "authorized_keys"):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600, name
    host()
    assert {path.name: path.read_bytes() for path in keys.iterdir()} == first
    (keys / "known_hosts").unlink()  # the first host was cut off while it made them
    host()
    assert (keys / "id_ed25519").read_bytes() != first["id_ed25519"]


def test_sshd_hands_on_what_ranks_need_and_nothing_else(host):
    called, *lines = host(OMP_NUM_THREADS="3", NCCL_DEBUG="WARN", DS_ACCELERATOR="cpu", TOKEN="secret")
    assert called.startswith("-D -e -f ")
    settings = dict(line.split(" ", 1) for line in lines)
    assert settings["Port"] == "4022" and settings["AuthenticationMethods"] == "publickey"
    handed_on = dict(re.findall(r'(\w+)="([^"]*)"', settings["SetEnv"]))
    assert handed_on["PATH"].endswith("/bin:/usr/bin:/bin")
    assert (handed_on["OMP_NUM_THREADS"], handed_on["NCCL_DEBUG"], handed_on["DS_ACCELERATOR"]) == ("3", "WARN", "cpu")
    assert "TOKEN" not in handed_on and "HOME" not in handed_on


def test_launchers_of_a_host_find_the_others(host, run, tmp_path):
    host()
    written = tmp_path / "home/.ssh/config"
    lines = [line.strip() for line in written.read_text().splitlines()]
    assert {"Port 4022", f"IdentityFile {tmp_path}/keys/id_ed25519", "StrictHostKeyChecking yes"} <= set(lines)
    written.unlink()  # a container that runs no sshd itself, with the same volume
    put_command(tmp_path / "bin", "deepspeed", "exit 0")
    assert run("deepspeed").returncode == 0 and "Port 4022" in written.read_text()
    written.write_text("Host *\n  Port 22\n")
    host()
    assert written.read_text() == "Host *\n  Port 22\n"  # the user's own stays


def test_dockerfile_is_pinned_unprivileged_and_takes_a_device():
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert arguments["DEVICE"] == "cuda"
    for name in ("CUDA_IMAGE", "CPU_IMAGE"):
        image, _, version = arguments[name].partition(":")
        assert image and re.search(r"\d+\.\d+\.\d+|\d{8}", version), name  # one release, not a series of them
    assert set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)) == {
        "${CUDA_IMAGE}", "${CPU_IMAGE}", "${BASE_IMAGE}", "scratch"
    }  # fmt: skip
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (\S+)$", last, re.MULTILINE)[-1] == "moe"
    assert re.search(r"^ARG DEVICE$", last, re.MULTILINE)
    *_, script = json.loads(re.findall(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)[0])
    assert ROOT / Path(script).relative_to("/opt/moe_train") == ENTRYPOINT and os.access(ENTRYPOINT, os.X_OK)


def test_what_the_dockerfile_copies_is_there_and_not_ignored():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {".git", ".venv", "runs"} <= set(ignored)
    sources = {
        word
        for line in re.findall(r"^COPY --chown=\S+ (.*)$", DOCKERFILE, re.MULTILINE)
        for word in line.split()[:-1]
        if word != "."
    }
    assert {"pyproject.toml", "requirements", "moe_train/__init__.py"} <= sources
    assert [word for word in sources if not (ROOT / word).exists() or word in ignored] == []


def services(*files: str) -> dict[str, dict]:
    """Of compose files, later ones over earlier ones, as far as these overlap: mappings by key."""
    merged: dict[str, dict] = {}
    for name in files:
        for service, settings in yaml.safe_load((DOCKER / name).read_text())["services"].items():
            before = merged.setdefault(service, {})
            for key, value in settings.items():
                before[key] = before[key] | value if isinstance(before.get(key), dict) else value
    return merged


def hostfile() -> dict[str, str]:
    lines = (DOCKER / "hostfile").read_text().splitlines()
    return dict(line.split() for line in lines if line and not line.startswith("#"))


def test_compose_starts_the_hosts_of_the_hostfile():
    hosts = services("compose.yaml")
    assert {name: "slots=2" for name in hosts} == hostfile() and len(hosts) == 2
    for name, settings in hosts.items():
        assert settings["hostname"] == name and settings["command"] == "sshd"
        assert settings["image"] == "moe-train:cpu" and settings["build"]["args"] == {"DEVICE": "cpu"}
        assert settings["environment"]["DS_ACCELERATOR"] == "cpu"
        assert settings["volumes"] == ["keys:/keys", "runs:/runs"]
        context = (DOCKER / settings["build"]["context"]).resolve()
        assert context == ROOT and context / settings["build"]["dockerfile"] == DOCKER / "Dockerfile"
    assert set(yaml.safe_load((DOCKER / "compose.yaml").read_text())["volumes"]) == {"keys", "runs"}


def test_compose_gives_each_host_a_gpu_of_its_own():
    hosts = services("compose.yaml", "compose.gpu.yaml")
    assert set(hosts) == set(hostfile())
    given = []
    for settings in hosts.values():
        assert settings["image"] == "moe-train:cuda" and settings["build"]["args"] == {"DEVICE": "cuda"}
        assert settings["environment"]["DS_ACCELERATOR"] == "cuda"
        (device,) = settings["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]
        given += device["device_ids"]
    assert len(given) == len(set(given)) == len(hosts)
    assert "compose.gpu.yaml: slots=1" in (DOCKER / "hostfile").read_text()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tag"], "--tag: unknown, or its value is missing"),
        (["--no-cache", "x"], "--no-cache: no such option"),
        (["--device", "tpu"], "--device (tpu) must be cpu or cuda"),
        (["--wheels", "/dev/null"], "--wheels (/dev/null) must be a folder"),
        (["--ca", "/dev"], "--ca (/dev) must be a file"),
        (["--archive", "/dev/null"], "--archive (/dev/null) exists already"),
    ],
)
def test_wrong_options_of_the_build(arguments, said):
    result = run_process([DOCKER / "build_without_daemon.sh", *arguments], timeout=30)
    assert result.returncode == 2, result
    assert f"build_without_daemon.sh: {said}" in result.stderr and "usage: " in result.stderr


def test_the_build_passes_arguments_that_the_dockerfile_has():
    passed = set(re.findall(r'--build-arg "(\w+)=', (DOCKER / "build_without_daemon.sh").read_text()))
    assert passed == {"BASE_IMAGE", "DEVICE", "PIP_ARGS"}
    assert passed <= set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))


def why_no_build() -> str | None:
    if os.geteuid() != 0:
        return f"only root can make a base image by debootstrap, and this is user {os.geteuid()}"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in ("buildah", "debootstrap") if shutil.which(name, path=path) is None]
    return f"no command {' and '.join(absent)}: install both to build the image" if absent else None


@pytest.fixture
def storage() -> Iterator[dict[str, str]]:
    """Environment in which buildah keeps its images in a folder that goes with the test."""
    info = subprocess.run(["buildah", "info"], capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True)
    with tempfile.TemporaryDirectory(prefix="moe-train-image-", ignore_cleanup_errors=True) as folder:
        places = f'graphroot = "{folder}/images"\nrunroot = "{folder}/run"\n'
        driver = json.loads(info.stdout)["store"]["GraphDriverName"]
        Path(folder, "storage.conf").write_text(f'[storage]\ndriver = "{driver}"\n{places}')
        environment = {"CONTAINERS_STORAGE_CONF": f"{folder}/storage.conf", "BUILDAH_ISOLATION": "chroot"}
        try:
            yield environment
        finally:
            for kind in (["rm", "--all"], ["rmi", "--all", "--force"]):
                with contextlib.suppress(TimeoutError):
                    run_process(["buildah", *kind], timeout=COMMAND_SECONDS, env=environment)


def test_the_image_for_gpus_can_use_infiniband():
    """Without the libraries, the devices and locked memory NCCL takes TCP, and does not say so."""
    libraries = re.search(r'\$\(\[ "\$\{DEVICE\}" = cpu \] \|\| echo ([^)]*)\)', DOCKERFILE)
    assert libraries is not None
    assert set(libraries[1].split()) == {"ibverbs-providers", "libibverbs1", "librdmacm1"}
    services = yaml.safe_load((DOCKER / "compose.infiniband.yaml").read_text())["services"]
    assert services.keys() == yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"].keys()
    for service in services.values():
        assert service["devices"] == ["/dev/infiniband"]
        assert service["cap_add"] == ["IPC_LOCK"] and service["ulimits"] == {"memlock": -1}


@pytest.mark.slow
@pytest.mark.timeout(BUILD_SECONDS + TEST_SECONDS + 6 * COMMAND_SECONDS)
@pytest.mark.skipif(why_no_build() is not None, reason=str(why_no_build()))
def test_image_builds_without_a_daemon_and_passes_quick_tests(storage):
    # Where pip gets its packages on this machine holds for the build too.
    options = ["--ca", os.environ["PIP_CERT"]] if os.environ.get("PIP_CERT") else []
    wheels = os.environ.get("PIP_FIND_LINKS", "")
    options += ["--wheels", wheels] if Path(wheels).is_dir() and wheels else []
    build = [DOCKER / "build_without_daemon.sh", "--tag", "moe-train:test", *options]
    built = run_process(build, timeout=BUILD_SECONDS, env=storage)
    assert built.returncode == 0, built
    made = run_process(["buildah", "from", "--pull-never", "moe-train:test"], timeout=COMMAND_SECONDS, env=storage)
    assert made.returncode == 0, made

    def run(*words: str, timeout: float = COMMAND_SECONDS) -> ProcessResult:
        # By its own host name, which here has no address, torchrun would not find itself.
        start = ["buildah", "run", "--hostname", "localhost", made.stdout.strip(), "--", "/usr/bin/tini", "-s", "--"]
        return run_process([*start, "docker/entrypoint.sh", *words], timeout=timeout, env=storage)

    assert run("bash", "-c", "id -un").stdout.strip() == "moe"
    assert run("deepspede").returncode == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = SSH_TO_ITSELF.format(port=free.getsockname()[1])
    reached = run("bash", "-c", script)
    assert reached.returncode == 0 and "/opt/moe_train/.venv/bin/deepspeed" in reached.stdout, reached
    tested = run("make", "test", f"ARGS={QUICK_TESTS}", timeout=TEST_SECONDS)
    assert tested.returncode == 0, tested.stdout[-8000:]
    assert int(re.findall(r"(\d+) passed", tested.stdout)[-1]) >= 100
