"""The manifests in launch/kubernetes against the operators' schemas, the image, launchers and the configuration."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import config_from_args, parse_args

from moe_train.config.load import load_config
from tests.launch.kubernetes_schema import check
from tests.processes import run_process

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "kubernetes"
FILES = ("pytorchjob", "mpijob")
ENTRYPOINT = ROOT / "docker" / "entrypoint.sh"


def read(file: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{file}.yaml").read_text())


def replica_specs(manifest: dict[str, Any]) -> dict[str, Any]:
    (specs,) = (value for name, value in manifest["spec"].items() if name.endswith("ReplicaSpecs"))
    return specs


def pod(file: str, replica: str) -> dict[str, Any]:
    return replica_specs(read(file))[replica]["template"]["spec"]


def container(file: str, replica: str) -> dict[str, Any]:
    (only,) = pod(file, replica)["containers"]
    return only


PODS = [("pytorchjob", "Worker"), ("mpijob", "Launcher"), ("mpijob", "Worker")]
STARTERS = PODS[:2]  # those that start launch/train.py


@pytest.mark.parametrize("file", FILES)
def test_manifest_follows_its_schema(file: str) -> None:
    check(read(file))


def mappings(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all mappings in a manifest whose keys are fields, not names of resources, replicas and the like."""
    if isinstance(value, dict):
        if not path or not (path[-1] in ("annotations", "limits") or str(path[-1]).endswith("ReplicaSpecs")):
            yield path
        for key, item in value.items():
            yield from mappings(item, (*path, key))
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from mappings(item, (*path, key))


def at(manifest: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        manifest = manifest[key]
    return manifest


@pytest.mark.parametrize("file", FILES)
def test_unknown_field_is_refused_at_every_depth(file: str) -> None:
    paths = list(mappings(read(file)))
    assert max(map(len, paths)) >= 8  # into the containers' lists
    for path in paths:
        manifest = read(file)
        at(manifest, path)["imagee"] = "x"
        with pytest.raises(ValueError, match=r"imagee: unknown"):
            check(manifest)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_value_of_another_type_is_refused_wherever_it_stands(file: str) -> None:
    refused = 0
    for path in mappings(read(file)):
        for name, value in at(read(file), path).items():
            if path[-1:] == ("tcpSocket",):  # a port, by number or name
                continue
            for other in ("8", 8, 8.0, True, ["8"], {"8": "8"}, None):
                if type(other) is not type(value):
                    manifest = read(file)
                    at(manifest, path)[name] = other
                    with pytest.raises(ValueError):
                        check(manifest)
                    refused += 1
    assert refused > 300


def edited(file: str, path: str, value: Any = None) -> dict[str, Any]:
    """The manifest with the value at a path set, or removed."""
    manifest = copy.deepcopy(read(file))
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    if value is None:
        del at(manifest, tuple(parents))[last]
    else:
        at(manifest, tuple(parents))[last] = value
    return manifest


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("pytorchjob", "spec.nprocPerNode", 8, r"nprocPerNode \(8\): must be str"),
        ("pytorchjob", "spec.elasticPolicy.maxRestarts", "10", r"maxRestarts \('10'\): must be int"),
        ("pytorchjob", "spec.runPolicy", None, "run_policy.*must not be"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Worker", None, "Worker must be among"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Launcher", {"replicas": 1}, "no others"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Worker.restartPolicy", "onFailure", "restartPolicy.*OnFailure"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Worker.template.spec.containers", None, "containers.*must not be"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Worker.template.spec.containers.0.name", None, "name.*must not be"),
        ("pytorchjob", "apiVersion", "kubeflow.org/v2", "apiVersion and kind.*must be"),
        ("mpijob", "apiVersion", "kubeflow.org/v1", "apiVersion and kind.*must be"),
        ("mpijob", "spec.cleanPodPolicy", "Running", "cleanPodPolicy: unknown"),  # of kubeflow.org/v1
        ("mpijob", "spec.mpiImplementation", "openmpi", "mpiImplementation.*OpenMPI"),
        ("mpijob", "spec.launcherCreationPolicy", "WaitForWorkers", "launcherCreationPolicy.*WaitForWorkersReady"),
        ("mpijob", "spec.slotsPerWorker", "8", r"slotsPerWorker \('8'\): must be int"),
        ("mpijob", "spec.mpiReplicaSpecs", None, "mpi_replica_specs.*must not be"),
        ("mpijob", "spec.mpiReplicaSpecs.Worker.restartPolicy", "ExitCode", "restartPolicy.*OnFailure"),
        (
            "mpijob",
            "spec.mpiReplicaSpecs.Worker.template.spec.containers.0.volumeMounts.0.mountPath",
            None,
            "mount_path",
        ),
        ("mpijob", "spec.mpiReplicaSpecs.Worker.template.spec.containers.0.args", "sshd", r"must be list\[str\]"),
    ],
)
def test_wrong_manifest_is_refused_with_the_place(file: str, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(edited(file, path, value))


def recorded(tmp_path: Path, args: list[str], *programs: str) -> tuple[list[str], Path]:
    """Runs the image's entry point with programs in the place of real ones that note their arguments and return 2.

    Returns: the first word and the arguments of the program that ran, and the home folder.
    """
    home, keys, stubs = tmp_path / "home", tmp_path / "keys", tmp_path / "bin"
    for folder in (home, keys, stubs):
        folder.mkdir()
    for program in programs:
        (stubs / program).write_text(f'#!/bin/sh\nprintf "%s\\n" {program} "$@" >{tmp_path}/ran\nexit 2\n')
        (stubs / program).chmod(0o755)
    if "sshd" not in args:
        (keys / "known_hosts").write_text("* ssh-ed25519 AAAA\n")  # the workers', who started before
    environment = {"HOME": str(home), "KEYS_DIR": str(keys), "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}"}
    result = run_process([ENTRYPOINT, *args], 30, env=environment | {"SSH_PORT": None}, cwd=ROOT)
    assert result.returncode == 2 and (tmp_path / "ran").exists(), result
    return (tmp_path / "ran").read_text().splitlines(), home


def test_entry_point_starts_torchrun(tmp_path: Path) -> None:
    args = container("pytorchjob", "Worker")["args"]
    ran, _ = recorded(tmp_path, args, "torchrun")
    assert ran == args


def test_entry_point_starts_mpirun_which_finds_the_workers(tmp_path: Path) -> None:
    args = container("mpijob", "Launcher")["args"]
    ran, home = recorded(tmp_path, args, "mpirun")
    assert ran == args[args.index("mpirun") :]
    port = container("mpijob", "Worker")["readinessProbe"]["tcpSocket"]["port"]
    config = home / ".ssh" / "config"
    assert config.exists(), "mpirun's ssh knows neither the port nor the key of the workers' sshd"
    assert f"Port {port}\n" in config.read_text()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")
def test_entry_point_starts_sshd_on_the_port_that_is_probed(tmp_path: Path) -> None:
    worker = container("mpijob", "Worker")
    ran, home = recorded(tmp_path, worker["args"], "sshd")
    assert ran[0] == "sshd"
    assert f"Port {worker['readinessProbe']['tcpSocket']['port']}\n" in (home / ".ssh" / "sshd_config").read_text()


def training_arguments(file: str, replica: str) -> list[str]:
    args = container(file, replica)["args"]
    return args[args.index("launch/train.py") + 1 :]


@pytest.mark.parametrize(("file", "replica"), STARTERS)
def test_configuration_takes_the_arguments(file: str, replica: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # /opt/moe_train in the image
    assert Path("launch/train.py").exists()
    config = load_config(training_arguments(file, replica), program="train.py")
    mounts = [Path(mount["mountPath"]) for mount in container("mpijob", "Worker")["volumeMounts"]]
    for folder in (config.train.run_dir, config.data.cache_dir):
        assert any(Path(str(folder)).is_relative_to(mount) for mount in mounts if mount.name == "shared")


def test_torchrun_takes_the_operators_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator makes PET_ variables of the elasticPolicy; without a Master, PET_NPROC_PER_NODE is the pod's own."""
    manifest, worker = read("pytorchjob"), container("pytorchjob", "Worker")
    policy, name = manifest["spec"]["elasticPolicy"], manifest["metadata"]["name"]
    variables = {
        "PET_RDZV_BACKEND": policy["rdzvBackend"],
        "PET_RDZV_ENDPOINT": f"{name}-worker-0:23456",
        "PET_RDZV_ID": policy["rdzvId"],
        "PET_NNODES": f"{policy['minReplicas']}:{policy['maxReplicas']}",
        "PET_MAX_RESTARTS": str(policy["maxRestarts"]),
    }
    for variable, value in (variables | {item["name"]: item["value"] for item in worker["env"]}).items():
        monkeypatch.setenv(variable, value)
    assert worker["name"] == "pytorch"  # the container whose port the operator makes the rendezvous' port
    config, _, command = config_from_args(parse_args(worker["args"][1:]))
    replicas = replica_specs(manifest)["Worker"]["replicas"]
    assert (config.min_nodes, config.max_nodes) == (replicas, replicas)
    assert config.nproc_per_node == int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert config.nproc_per_node == int(manifest["spec"]["nprocPerNode"])
    assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", f"{name}-worker-0:23456")
    assert (config.max_restarts, config.run_id) == (10, name)
    assert command[-len(worker["args"][2:]) :] == worker["args"][2:]
    assert 0 < config.shutdown_timeout < pod("pytorchjob", "Worker")["terminationGracePeriodSeconds"]


def test_mpirun_starts_a_rank_for_each_gpu() -> None:
    spec, args = read("mpijob")["spec"], container("mpijob", "Launcher")["args"]
    workers = spec["mpiReplicaSpecs"]["Worker"]["replicas"]
    assert int(args[args.index("-n") + 1]) == workers * spec["slotsPerWorker"]
    assert container("mpijob", "Worker")["resources"]["limits"]["nvidia.com/gpu"] == str(spec["slotsPerWorker"])
    assert spec["mpiReplicaSpecs"]["Launcher"]["replicas"] == 1
    assert args[args.index("--hostfile") + 1] == "/etc/mpi/hostfile"
    grace = pod("mpijob", "Launcher")["terminationGracePeriodSeconds"]
    assert grace >= pod("pytorchjob", "Worker")["terminationGracePeriodSeconds"]  # the same training has to be saved


@pytest.mark.slow
def test_worker_stays_until_its_ranks_have_saved() -> None:
    """Deletion sends SIGTERM to all pods: sshd ends at once, and its container with it, but for preStop."""
    worker = container("mpijob", "Worker")
    *shell, script = worker["lifecycle"]["preStop"]["exec"]["command"]
    processes = "/proc/[0-9]*/cmdline"
    assert processes in script
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3)", "launch/train.py"]) as rank:
        run_process([*shell, script.replace(processes, f"/proc/{rank.pid}/cmdline")], 30)
        assert rank.poll() == 0
    alone = run_process([*shell, script.replace(processes, "/proc/$$/cmdline /proc/self/cmdline")], 30)
    assert alone.returncode == 0, alone  # and in time: it does not wait for itself
    graces = [pod("mpijob", replica)["terminationGracePeriodSeconds"] for replica in ("Launcher", "Worker")]
    assert graces[0] <= graces[1]


@pytest.mark.parametrize("file", FILES)
def test_pods_are_started_again_after_a_fault(file: str) -> None:
    """No exit code of a launcher tells an operator whether a run can go on: torchrun makes 1 of all, 75 may be any."""
    assert {spec["restartPolicy"] for spec in replica_specs(read(file)).values()} == {"OnFailure"}
    assert read(file)["spec"]["runPolicy"]["backoffLimit"] > 0


@pytest.mark.parametrize(("file", "replica"), PODS)
def test_pod_mounts_what_it_names_as_the_images_user(file: str, replica: str) -> None:
    spec, only = pod(file, replica), container(file, replica)
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text()
    user = int(re.search(r"^ARG UID=(\d+)$", dockerfile, re.MULTILINE)[1])  # type: ignore[index]
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == user
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert {mount["name"] for mount in only["volumeMounts"]} == set(volumes)
    assert volumes["shared"] == {"name": "shared", "persistentVolumeClaim": {"claimName": "moe-train"}}
    assert only["image"] == container("pytorchjob", "Worker")["image"]
    mounts = {mount["mountPath"]: mount.get("subPath") for mount in only["volumeMounts"] if mount["name"] == "shared"}
    assert mounts == ({"/shared": None} if file == "pytorchjob" else {"/shared": None, "/keys": "keys"})
    for variable in only.get("env", []):
        if variable["value"].startswith("/"):
            assert variable["value"].startswith("/shared/")


def commands(file: str) -> list[str]:
    """The kubectl commands of a manifest's header."""
    lines = (FOLDER / f"{file}.yaml").read_text().splitlines()
    return [line.lstrip("# ").partition(" #")[0].strip() for line in lines if line.startswith("#   kubectl ")]


@pytest.mark.parametrize("file", FILES)
def test_documented_commands_are_those_of_the_manifests(file: str) -> None:
    name, kind = read(file)["metadata"]["name"], read(file)["kind"].lower()
    create, logs, delete = commands(file)
    assert create == f"kubectl create -f launch/kubernetes/{file}.yaml"
    assert re.search(rf"[ =]{name}\b", logs)
    assert delete in (f"kubectl delete {kind} {name}", f"kubectl delete {kind}/{name}")
    lines = (ROOT / "docs" / "launching.md").read_text().splitlines()
    assert [command for command in (create, logs, f"kubectl delete {kind}/{name}") if command not in lines] == []
