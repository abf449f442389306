"""Writes the table of docs/scaling.md: what `moe-train plan` says of every configuration, on a cluster that suits it.

python docs/make_scaling.py            writes it
python docs/make_scaling.py --check    exit code 1 if the table is not what the planner says now
"""

import argparse
import contextlib
import io
import json
import sys
from typing import Any

from planned import ROOT, Cluster, command

from moe_train.cli.main import main as moe_train
from moe_train.config.load import load_config
from moe_train.config.root import Config

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- by docs/make_scaling.py: begin -->", "<!-- by docs/make_scaling.py: end -->"
CLUSTERS = {
    "olmoe_1b_7b": Cluster(1, 8, "h100"),
    "moe_7b_a1b_mlkv": Cluster(1, 8, "h100"),
    "deepseek_moe_16b": Cluster(2, 8, "h100"),
    "qwen3_30b_a3b": Cluster(4, 8, "h100"),
    "mixtral_8x7b": Cluster(4, 8, "h100"),
    "mixtral_8x22b": Cluster(8, 8, "h100"),
    "qwen3_235b_a22b": Cluster(16, 8, "h100"),
}
COLUMNS = (
    "configuration",
    "parameters",
    "active",
    "cluster",
    "EP, ZeRO, dispatch",
    "memory a rank",
    "step",
    "tokens/s",
)
COLUMNS += ("MFU", "largest term")


def row(name: str, config: Config, cluster: Cluster, found: dict[str, Any]) -> str:
    """A line of the table."""
    parameters, step, parallel = found["parameters"], found["step"], config.parallel
    assert config.train.global_batch_size is not None
    tokens = config.train.global_batch_size * config.train.sequence_length / step["seconds"]
    memory = sum(found["memory"].values()) / 2**30
    cells = [
        f"`{name}`",
        f"{parameters['total']:,}",
        f"{parameters['active']:,}",
        str(cluster),
        f"{parallel.expert_parallel_size}, {parallel.zero_stage}, {parallel.dispatch}",
        f"{memory:.1f} GiB{'' if found['fits'] else ', too much'}",
        f"{step['seconds']:.1f} s",
        f"{tokens:,.0f}",
        f"{found['mfu']:.0%}",
        str(step["largest_term"]).replace("_", " "),
    ]
    return f"| {' | '.join(cells)} |"


def answer(path: str, cluster: Cluster) -> dict[str, Any]:
    """What the command's JSON says, in this process: one that starts for each row would take most of the time.

    Args:
        path: Of the configuration.
        cluster: What is planned for.

    Raises:
        RuntimeError: If it fails.
    """
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = moe_train(["plan", "--config", path, *cluster.options, "--json"])
    if code:
        raise RuntimeError(f"moe-train plan --config {path}: exit code {code}")
    found: dict[str, Any] = json.loads(output.getvalue().strip().splitlines()[-1])
    return found


def table() -> str:
    """The whole table, with the commands."""
    rows, commands = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)], []
    for name, cluster in CLUSTERS.items():
        path = str(ROOT / "configs" / f"{name}.yaml")
        config = load_config(["--config", path], program="make_scaling")
        rows.append(row(name, config, cluster, answer(path, cluster)))
        commands.append(" ".join(command(name, cluster)))
    return "\n".join([*rows, "", "```sh", *commands, "```"])


def main() -> int:
    """Write it between the markers, or compare what is there; the exit code."""
    parser = argparse.ArgumentParser(prog="make_scaling.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="exit code 1 if the page is not what would be written")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"
    if not options.check:
        PAGE.write_text(made, encoding="utf-8")
    elif made != text:
        print("docs/scaling.md is not what the planner says now: run python docs/make_scaling.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
