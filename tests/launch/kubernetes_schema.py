"""The schemas of the jobs that launch/kubernetes starts, held against a manifest strictly.

Those of PyTorchJob and of pods are models in the packages kubeflow-training and kubernetes, which are generated from
the API's own definitions. By themselves these models take a value of any type, and their clients drop unknown fields.
"""

import re
from typing import Any, ClassVar

import kubeflow.training.models as models


class MPIJobV2beta1Spec:
    """MPIJobSpec of kubeflow.org/v2beta1, written by hand: no registry has a package with its schema.

    Its fields are those of type MPIJobSpec in pkg/apis/kubeflow/v2beta1/types.go of github.com/kubeflow/mpi-operator at
    v0.6.0. RunPolicy and ReplicaSpec there have the fields of kubeflow.org/v1, whose published models stand for them.
    """

    openapi_types: ClassVar = {
        "slots_per_worker": "int",
        "run_launcher_as_worker": "bool",
        "run_policy": "KubeflowOrgV1RunPolicy",
        "mpi_replica_specs": "dict(str, KubeflowOrgV1ReplicaSpec)",
        "ssh_auth_mount_path": "str",
        "launcher_creation_policy": "str",
        "mpi_implementation": "str",
    }
    attribute_map: ClassVar = {
        "slots_per_worker": "slotsPerWorker",
        "run_launcher_as_worker": "runLauncherAsWorker",
        "run_policy": "runPolicy",
        "mpi_replica_specs": "mpiReplicaSpecs",
        "ssh_auth_mount_path": "sshAuthMountPath",
        "launcher_creation_policy": "launcherCreationPolicy",
        "mpi_implementation": "mpiImplementation",
    }

    def __init__(self, mpi_replica_specs: Any = None, **_: Any) -> None:
        if mpi_replica_specs is None:
            raise ValueError("Invalid value for `mpi_replica_specs`, must not be `None`")


class MPIJobV2beta1:
    """MPIJob of kubeflow.org/v2beta1: that of v1 with another spec."""

    openapi_types = models.KubeflowOrgV1MPIJob.openapi_types | {"spec": "MPIJobV2beta1Spec"}
    attribute_map = models.KubeflowOrgV1MPIJob.attribute_map

    def __init__(self, **_: Any) -> None:
        pass


# By apiVersion and kind: the model; values of fields outside the pods that are a string to it and that the operator
# checks, by the fields' names; the kinds of replicas, the required one first.
KINDS: dict[str, tuple[Any, dict[str, set[str]], tuple[str, ...]]] = {
    "kubeflow.org/v1 PyTorchJob": (
        models.KubeflowOrgV1PyTorchJob,
        {
            "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
            "cleanPodPolicy": {"None", "Running", "All"},
            "rdzvBackend": {"c10d", "etcd", "etcd-v2"},
        },
        ("Worker", "Master"),
    ),
    "kubeflow.org/v2beta1 MPIJob": (
        MPIJobV2beta1,
        {
            "restartPolicy": {"OnFailure", "Never"},
            "cleanPodPolicy": {"None", "Running", "All"},
            "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
            "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
        },
        ("Launcher", "Worker"),
    ),
}
SCALARS = {"str": str, "int": int, "float": float, "bool": bool}


def check(manifest: dict[str, Any]) -> None:
    """Holds a manifest against its kind's schema, strictly. Raises: ValueError that says where it is wrong."""
    kind = f"{manifest.get('apiVersion')} {manifest.get('kind')}"
    if kind not in KINDS:
        raise ValueError(f"apiVersion and kind ({kind}): must be {' or '.join(KINDS)}")
    model, choices, replicas = KINDS[kind]
    check_model(manifest, model, "", choices)
    (specs,) = (value for name, value in manifest["spec"].items() if name.endswith("ReplicaSpecs"))
    if not {replicas[0]} <= set(specs) <= set(replicas):
        raise ValueError(f"replicas {sorted(specs)}: {replicas[0]} must be among them, and no others than {replicas}")


def check_value(value: Any, kind: str, where: str, choices: dict[str, set[str]]) -> None:
    """Holds a value against the name of a type as the generated models write it, and what is in it likewise."""
    container = re.fullmatch(r"(list)\[(.*)\]|(dict)\(str, (.*)\)", kind)
    if kind == "object":  # anything: in pods these are ports by number or name
        return
    if kind in SCALARS:
        allowed = choices.get(where.rpartition(".")[2]) if ".template." not in where else None
        if type(value) is not SCALARS[kind] or (allowed and value not in allowed):
            raise ValueError(f"{where} ({value!r}): must be {sorted(allowed) if allowed else kind}")
    elif container is None:
        check_model(value, globals().get(kind) or getattr(models, kind), where, choices)
    elif type(value) is not (list if container[1] else dict):
        raise ValueError(f"{where} ({value!r}): must be {kind}")
    else:
        for key, item in enumerate(value) if container[1] else value.items():
            check_value(item, container[2] or container[4], f"{where}.{key}", choices)


def check_model(value: Any, model: Any, where: str, choices: dict[str, set[str]]) -> None:
    """Holds a mapping against a generated model: its fields, their types, and those it may not do without."""
    if type(value) is not dict:
        raise ValueError(f"{where} ({value!r}): must be a mapping of {model.__name__}'s fields")
    attributes = {name: attribute for attribute, name in model.attribute_map.items()}
    for name, item in value.items():
        if name not in attributes:
            raise ValueError(f"{where}.{name}: unknown; {model.__name__} has {', '.join(sorted(attributes))}")
        check_value(item, model.openapi_types[attributes[name]], f"{where}.{name}", choices)
    try:  # the models refuse by themselves that a required field is missing
        model(**{attributes[name]: item for name, item in value.items()})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
