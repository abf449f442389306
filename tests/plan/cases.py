"""Plans of small and large configurations for the tests of this folder."""

from pathlib import Path
from typing import Any

from moe_train.config.load import load_config
from moe_train.config.root import Config
from moe_train.plan.devices import DEVICES
from moe_train.plan.layout import Cluster
from moe_train.plan.planner import Plan, Question, make_plan

ROOT = Path(__file__).resolve().parent.parent.parent
VOCAB = 512
SMALL = {
    "model.vocab_size": VOCAB,
    "model.hidden_size": 64,
    "model.num_layers": 4,
    "model.num_heads": 4,
    "model.intermediate_size": 192,
    "model.moe.num_experts": 8,
    "train.run_dir": "unused",
    "train.precision": "fp32",
    "train.sequence_length": 128,
    "train.micro_batch_size": 4,
    "deepspeed": '{"zero_optimization": {"reduce_bucket_size": 200000}}',
}
LARGE = {
    "model.vocab_size": 32000,
    "model.hidden_size": 2048,
    "model.num_layers": 16,
    "model.num_heads": 16,
    "model.num_kv_heads": 4,
    "model.moe_every": 1,
    "model.moe.num_experts": 64,
    "model.moe.top_k": 8,
    "model.moe.intermediate_size": 1024,
    "train.run_dir": "unused",
    "train.precision": "bf16",
    "train.sequence_length": 2048,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 256,
}


def options(base: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in (base | changes).items()]


def config_of(base: dict[str, Any], **changes: Any) -> Config:
    """A configuration; a change is given as section__field."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(options(base, dotted), program="test")


def planned(base: dict[str, Any] = LARGE, nodes: int = 4, gpus: int = 8, device: str = "h100", **changes: Any) -> Plan:
    """A plan; changes of the configuration are given as section__field."""
    asked = {name: changes.pop(name) for name in ("imbalance", "seed", "margin", "decoding") if name in changes}
    config = config_of(base, **changes)
    assert config.model.vocab_size is not None
    return make_plan(config, config.model.vocab_size, Question(Cluster(nodes, gpus, DEVICES[device]), **asked))
