"""Vectors of RWKV-4: the time mix, the channel mix, and the average alone with its state and its gradients."""

from collections.abc import Iterator

import torch

from moe_train.ops.wkv import Average, wkv
from tests.vectors.layers import Quantity, Sequence, Vector, build_channel_mix, build_mixer, numbers, outputs

NAMES = {name: f"{name}.weight" for name in ("key", "value", "receptance", "output")}


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the outputs of both layers, then those of the average."""
    layer, sequence = vector["layer"], Sequence.of(vector)
    model = {
        "hidden_size": len(vector["x"][0]),
        "num_heads": 1,
        "num_layers": vector["num_layers"],
        "moe_every": 0,
        "mixer": "rwkv4",
        "feed_forward": "rwkv_channel_mix",
        "intermediate_size": len(vector["channel"]["key"]),
    }
    mixer = build_mixer(model, layer, vector["time"], NAMES)
    for way, y_SD, _, _ in outputs(mixer, sequence, layer):
        yield f"time_mix ({way})", y_SD, numbers(vector["time_mix"])
    channel = build_channel_mix(model, layer, vector["channel"], NAMES)
    for way, y_SD, _, _ in outputs(channel, sequence, layer):
        yield f"channel_mix ({way})", y_SD, numbers(vector["channel_mix"])
    yield from _average(vector)


def _average(vector: Vector) -> Iterator[Quantity]:
    """Yield what the average alone gives: its k and v are one sequence, without documents."""
    names = ("k", "v", "decay", "first")
    values = [numbers(vector["time"].get(name, vector.get(name))).requires_grad_() for name in names]
    k_SD, v_SD, decay_D, first_D = values
    begins = torch.arange(len(k_SD))[None] == 0
    empty = Average.empty(torch.zeros(1, k_SD.shape[1], dtype=torch.float64))
    y_1SD, after = wkv(k_SD[None], v_SD[None], -decay_D.exp(), first_D, empty, begins)
    yield "wkv", y_1SD[0].detach(), numbers(vector["wkv"])
    # Sums are relative to an exponent that each program chooses: compared relative to the larger of the two.
    theirs = numbers(vector["state_p"])
    common = torch.maximum(theirs, after.exponent[0])
    for name, ours in (("state_a", after.values), ("state_b", after.weights)):
        ours_D = (ours * (after.exponent - common).exp())[0].detach()
        yield name, ours_D, numbers(vector[name]) * (theirs - common.detach()).exp()
    gradients = torch.autograd.grad((y_1SD[0] * numbers(vector["upstream"])).sum(), values)
    for name, gradient in zip(names, gradients, strict=True):
        yield f"grad_{name}", gradient, numbers(vector[f"grad_{name}"])
