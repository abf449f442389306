"""Draws the pictures of docs/memory.md and docs/parallelism.md from what `moe-train plan` says.

python docs/make_pictures.py    (pip install -c requirements/constraints.txt -e ".[bench]")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from planned import ROOT, Cluster, plan

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

IMAGES = ROOT / "docs" / "images"
CONFIG, CLUSTER = "qwen3_30b_a3b", Cluster(4, 8, "h100")
# Okabe and Ito's colours, which people who do not tell red from green tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999", "#000000")


@dataclass(frozen=True)
class Bar:
    """A stacked bar.

    Attributes:
        label: Below it.
        parts: Heights by the name of the part.
    """

    label: str
    parts: dict[str, float]


def draw_bars(axes: Axes, bars: Sequence[Bar], title: str) -> None:
    """Stacked bars side by side; parts that are nothing in all of them are left out."""
    colours = dict(zip(bars[0].parts, COLOURS))  # by the part's place, so that panels agree
    bottoms = [0.0] * len(bars)
    for name in (name for name in colours if any(bar.parts[name] > 0 for bar in bars)):
        heights = [bar.parts[name] for bar in bars]
        axes.bar(range(len(bars)), heights, 0.7, bottom=bottoms, color=colours[name], label=name.replace("_", " "))
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights)]
    for place, top in enumerate(bottoms):
        axes.text(place, top, f"{top:,.0f}" if top >= 100 else f"{top:.3g}", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def planned(*options: str) -> dict[str, Any]:
    """The plan of the pictures' model and cluster, with some fields changed."""
    return plan(CONFIG, CLUSTER, *options)


def draw_memory() -> None:
    """Memory of a rank by part, over ZeRO stages and expert-parallel sizes."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), sharey=True)
    for stage, axes in zip((1, 2, 3), panels):
        bars = []
        for size in (1, 8, 32):
            found = planned(f"--parallel.zero_stage={stage}", f"--parallel.expert_parallel_size={size}")
            bars.append(Bar(f"EP {size}", {name: held / 2**30 for name, held in found["memory"].items()}))
        draw_bars(axes, bars, f"ZeRO {stage}")
        axes.axhline(80e9 / 2**30, color="black", linewidth=0.8, linestyle="--")
    panels[0].set_ylabel("GiB a rank (dashed: 80 GB)")
    save(figure, panels, "plan_memory.png", f"{CONFIG} on {CLUSTER}")


def draw_traffic() -> None:
    """All-to-all bytes of a step and rank, inside and across nodes, by dispatch and expert-parallel size."""
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.2), sharey=True)
    for size, axes in zip((8, 16, 32), panels):
        bars = []
        for dispatch in ("flat", "unique", "two_level"):
            found = planned(f"--parallel.dispatch={dispatch}", f"--parallel.expert_parallel_size={size}")
            parts = [sent for part, sent in found["traffic_by_part"].items() if part.startswith("all_to_all")]
            totals = {where: sum(part[where] for part in parts) / 1e9 for where in ("intra_node", "inter_node")}
            bars.append(Bar(dispatch, totals))
        draw_bars(axes, bars, f"EP {size}")
    panels[0].set_ylabel("GB a step and rank")
    save(figure, panels, "plan_traffic.png", f"{CONFIG} on {CLUSTER}")


def save(figure: Any, panels: Sequence[Axes], name: str, title: str) -> None:
    """With one legend for all panels."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="lower center", ncols=min(7, len(found)), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(IMAGES / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_memory()
    draw_traffic()
