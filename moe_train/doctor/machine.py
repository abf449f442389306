"""Description of the measured machine, in the form that the planner reads."""

import statistics
from collections.abc import Sequence

from moe_train.config.machine import Host, Link, Machine, Network, Product
from moe_train.doctor.collectives import Timing
from moe_train.doctor.facts import Facts
from moe_train.doctor.operations import OPERATIONS
from moe_train.doctor.speed import Speed


def fit_link(points: Sequence[tuple[float, float]]) -> Link:
    """Fit the line seconds = latency + bytes / rate through the shortest and the longest message.

    Each point is already a median of repetitions. The points between often bend away from a line: an idle line sends a
    first burst faster, and libraries change their algorithm. So a fit of all points is far off at the longest message,
    where most of training's bytes are.

    Args:
        points: Pairs of bytes and seconds, both above 0.
    """
    (least, shortest), (most, longest) = min(points), max(points)
    slope = (longest - shortest) / (most - least) if most > least else 0.0
    if slope * most < longest / 100:  # longer messages took no longer: count a hundredth of the time as theirs
        slope = longest / 100 / most if most > least else longest / most
    latency = max(0.0, shortest - slope * least)
    return Link(latency_seconds=latency, bytes_per_second=1 / slope)


def fit_network(timings: Sequence[Timing], scope: str) -> Network | None:
    """Fit a link to every operation of one scope; None if the scope was not measured."""
    links = {}
    for operation in OPERATIONS:
        points = [(t.sent_bytes, t.seconds) for t in timings if (t.scope, t.operation) == (scope, operation)]
        if not points and operation == "ring":
            continue
        if not points:
            return None
        links[operation] = fit_link(points)
    return Network(**links)


def combine_products(speeds: Sequence[Speed]) -> dict[str, tuple[Product, ...]]:
    """Combine the products that all ranks measured, each at the speed of the median rank."""
    combined = {}
    for precision in dict.fromkeys(name for speed in speeds for name in speed.products):
        found = [{tuple(p[:2]): p[2] for p in speed.products.get(precision, [])} for speed in speeds]
        shapes = [shape for shape in found[0] if all(shape in products for products in found)]
        combined[precision] = tuple(
            Product(rows=rows, width=width, flops_per_second=statistics.median(p[rows, width] for p in found))
            for rows, width in shapes
        )
    return {precision: products for precision, products in combined.items() if products}


def make_host(facts: Sequence[Facts], speeds: Sequence[Speed]) -> Host | None:
    """Make the host of a node from the measurements of all ranks; None: their devices are CPUs.

    Args:
        facts: Facts of each rank.
        speeds: Device speed of each rank.
    """
    memory = [s.host_memory_bytes_per_second for s in speeds if s.host_memory_bytes_per_second is not None]
    links = [s.host_link_bytes_per_second for s in speeds if s.host_link_bytes_per_second is not None]
    if not (memory and links):
        return None
    return Host(
        memory_bytes=min(fact.memory for fact in facts),
        memory_bytes_per_second=statistics.median(memory),
        link_bytes_per_second=statistics.median(links),
    )


def make_machine(
    facts: Sequence[Facts], timings: Sequence[Timing], speeds: Sequence[Speed], peaks: dict[str, float]
) -> Machine:
    """Make one machine from the measurements of all ranks.

    Args:
        facts: Facts of each rank.
        timings: Timings, merged over the ranks.
        speeds: Device speed of each rank.
        peaks: Published operations per second by precision, where known; otherwise the best measured product counts.
    """
    counts = [sum(other.node == fact.node for other in facts) for fact in facts]
    per_node = statistics.multimode(counts)[0]
    products = combine_products(speeds)
    best = {name: max(product.flops_per_second for product in found) for name, found in products.items()}
    memory = statistics.median(speed.memory_bytes_per_second for speed in speeds)
    first = facts[0]
    own = [fact.device["memory"] // (1 if fact.device["kind"] == "cuda" else n) for fact, n in zip(facts, counts)]
    plural = "" if first.threads == 1 else "s"
    name = first.device["name"] + (f", {first.threads} thread{plural} a rank" if first.device["kind"] == "cpu" else "")
    return Machine(
        name=name,
        device=first.device["kind"],
        memory_bytes=min(own),
        flops_per_second=best | {name: peak for name, peak in peaks.items() if name in best},  # type: ignore[arg-type]
        products=products,  # type: ignore[arg-type]
        memory_bytes_per_second=memory,
        operation_seconds=statistics.median(speed.operation_seconds for speed in speeds),
        ranks_per_node=per_node,
        host=make_host(facts, speeds),
        intra_node=fit_network(timings, "within"),
        inter_node=fit_network(timings, "across"),
    )
