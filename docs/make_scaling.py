"""Writes the table of docs/scaling.md: what `moe-train plan` says of every configuration, on a cluster that suits it.

python docs/make_scaling.py
"""

from typing import Any

from planned import ROOT, Cluster, command, plan

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


def table() -> str:
    """The whole table, with the commands."""
    rows, commands = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)], []
    for name, cluster in CLUSTERS.items():
        path = str(ROOT / "configs" / f"{name}.yaml")
        config = load_config(["--config", path], program="make_scaling")
        rows.append(row(name, config, cluster, plan(name, cluster)))
        commands.append(" ".join(command(name, cluster)))
    return "\n".join([*rows, "", "```sh", *commands, "```"])


def main() -> None:
    """Write it between the markers."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
