"""`moe-train plan` as the scripts of this folder call it."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cluster:
    """What is planned for.

    Attributes:
        nodes: Hosts.
        gpus_per_node: Devices, and ranks, of a host.
        device: A name that `moe-train plan --device` knows, or a machine file.
    """

    nodes: int
    gpus_per_node: int
    device: str

    @property
    def options(self) -> list[str]:
        """As the command takes it."""
        return ["--nodes", str(self.nodes), "--gpus-per-node", str(self.gpus_per_node), "--device", self.device]

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node} {self.device.upper()}"


def command(config: str, cluster: Cluster, *options: str) -> list[str]:
    """The command, as a user would give it.

    Args:
        config: Name of a file in configs/.
        cluster: What is planned for.
        options: Further ones, such as fields.
    """
    return ["moe-train", "plan", "--config", f"configs/{config}.yaml", *cluster.options, *options]


def plan(config: str, cluster: Cluster, *options: str) -> dict[str, Any]:
    """What the command's JSON says; arguments as `command`'s.

    Raises:
        RuntimeError: If it fails.
    """
    words = [sys.executable, "-m", "moe_train", *command(config, cluster, *options, "--json")[1:]]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
