"""Plan of a configuration on a cluster: memory, traffic, time of a step and MFU."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_train.config.resolve import ResolvedConfig
from moe_train.config.root import Config
from moe_train.plan.layout import Cluster, Layout, plan_layout, settings_not_planned
from moe_train.plan.loads import RowLoads, row_loads
from moe_train.plan.memory import Decoding, Memory, plan_memory
from moe_train.plan.rates import Rates
from moe_train.plan.shapes import ModelShape, model_shape
from moe_train.plan.step import Step, Traffic, plan_step, step_traffic


@dataclass(frozen=True)
class Question:
    """Settings of a plan, beside the configuration.

    Attributes:
        cluster: Cluster to plan for.
        imbalance: Coefficient of variation of the experts' shares of the assignments.
        seed: Seed of the draws.
        shares_LE: Measured shares of the experts in every MoE layer, used instead of draws; None: draws.
        decoding: Sequences whose keys and values are kept beside training; None: no KV cache.
        margin: Share of the memory to leave free.
    """

    cluster: Cluster
    imbalance: float = 0.0
    seed: int = 0
    shares_LE: np.ndarray | None = None
    decoding: Decoding | None = None
    margin: float = 0.0

    @property
    def capacity(self) -> float:
        """Bytes of memory that a rank may use."""
        return self.cluster.machine.memory_bytes * (1 - self.margin)

    @property
    def host_capacity(self) -> float | None:
        """Bytes of the host's memory that a rank may use; None: nothing is known of it, or the device is a CPU."""
        host = self.cluster.machine.host
        return None if host is None else host.memory_bytes / self.cluster.gpus_per_node * (1 - self.margin)

    def fits(self, memory: Memory) -> bool:
        """Whether a peak is within the memory of the device and of its host."""
        in_host = self.host_capacity is None or memory.host_total <= self.host_capacity
        return memory.total <= self.capacity and in_host


@dataclass(frozen=True)
class Plan:
    """Memory, traffic and time of a configuration on a cluster.

    Attributes:
        config: The resolved configuration.
        layout: Layout of the run.
        shape: Sizes of the model.
        loads: Rows at the experts of a rank.
        memory: Peak memory of the rank that needs most.
        traffic: Bytes that a rank sends per step.
        step: Time of a step.
        mfu: Model FLOPs utilisation: operations that the model needs, divided by operations at the peak rate.
        question: Settings of the plan.
        not_planned: Settings of DeepSpeed that were given but do not change the plan.
        warnings: Messages about what the plan cannot know.
    """

    config: ResolvedConfig
    layout: Layout
    shape: ModelShape
    loads: RowLoads
    memory: Memory
    traffic: Traffic
    step: Step
    mfu: float
    question: Question
    not_planned: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the peak memory is within the capacity of the device and of its host."""
        return self.question.fits(self.memory)

    @property
    def capacity(self) -> float:
        """Bytes of the device's memory that a rank may use."""
        return self.question.capacity

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all ranks."""
        return self.config.train.global_batch_size * self.layout.sequence_length / self.step.seconds

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        count, total, host_capacity = self.shape.parameters, self.traffic.total, self.question.host_capacity
        return {
            "parameters": {"total": count.total, "active": count.active},
            "memory": {name: int(held) for name, held in self.memory.parts.items()},
            "memory_total": int(self.memory.total),
            "memory_capacity": int(self.capacity),
            "memory_moment": self.memory.moment,
            "host_memory": {name: int(held) for name, held in self.memory.host.items()},
            "host_memory_total": int(self.memory.host_total),
            "host_memory_capacity": None if host_capacity is None else int(host_capacity),
            "traffic": {"intra_node": int(total.intra_node), "inter_node": int(total.inter_node)},
            "traffic_by_part": {
                name: {"intra_node": int(sent.intra_node), "inter_node": int(sent.inter_node)}
                for name, sent in self.traffic.parts.items()
            },
            "step": {
                "seconds": self.step.seconds,
                "largest_term": self.step.largest_term,
                "p50": self.step.p50,
                "p99": self.step.p99,
                "terms": self.step.terms,
                "hidden_all_to_all": self.step.hidden,
                "tokens_per_second": self.tokens_per_second,
            },
            "mfu": self.mfu,
            "fits": self.fits,
            "not_planned": list(self.not_planned),
            "warnings": list(self.warnings),
            "layout": self.layout_fields(),
        }

    def layout_fields(self) -> dict[str, Any]:
        """Return the layout by names of configuration fields."""
        layout = self.layout
        return {
            "world_size": layout.world_size,
            "expert_parallel_size": layout.ep_size,
            "zero_stage": layout.zero_stage,
            "context_parallel_size": layout.context_size,
            "micro_batch_size": layout.micro_batch,
            "gradient_accumulation": layout.accumulation,
            "recompute": layout.recompute.part,
            "recompute_every": layout.recompute.every,
            "offload_optimizer": "cpu" if layout.offloads else "none",
            "dispatch": layout.dispatch,
            "chunks": layout.chunks,
            "precision": layout.precision,
        }


def make_plan(config: Config, vocab_size: int, question: Question) -> Plan:
    """Plan memory, traffic and time of a configuration.

    Args:
        config: Configuration as loaded.
        vocab_size: Rows of the embedding.
        question: Settings of the plan.

    Raises:
        UsageError: If sizes do not divide, or a setting of the plan is impossible.
    """
    resolved, layout = plan_layout(config, question.cluster, vocab_size)
    shape = model_shape(resolved.model, resolved.model.vocab_size, layout.sequence_length)
    loads = row_loads(shape, layout, question.imbalance, question.seed, question.shares_LE)
    machine = question.cluster.machine
    memory = plan_memory(shape, layout, loads, machine.device, question.decoding)
    step = plan_step(shape, layout, loads, memory.states, Rates(machine, layout.precision))
    traffic = step_traffic(shape, layout, loads, memory.states)
    flops = shape.flops_per_token * resolved.train.global_batch_size * layout.sequence_length
    mfu = flops / (step.seconds * layout.world_size * machine.flops_per_second[layout.precision])
    ignored, warnings = settings_not_planned(resolved), question.cluster.warnings
    return Plan(resolved, layout, shape, loads, memory, traffic, step, mfu, question, ignored, warnings)
