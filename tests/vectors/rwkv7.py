"""Vectors of RWKV-7: the time mix with its state, and what goes up from the first layer; the channel mix."""

from collections.abc import Iterator

from moe_train.model.mixers.rwkv7 import FIRST_VALUES
from tests.vectors.layers import Quantity, Sequence, Vector, build_channel_mix, build_mixer, numbers, outputs

NAMES = {name: f"{name}.weight" for name in ("receptance", "key", "value", "output")}
RANKS = {"decay_rank": "w1", "rate_rank": "a1", "value_rank": "v1", "gate_rank": "g1"}


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the outputs of the layer, its state at the end, and the first values."""
    time, first = vector["time"], vector["v_first_in"]
    model = {
        "hidden_size": len(vector["x"][0]),
        "num_layers": 2,
        "num_heads": vector["heads"],
        "moe_every": 0,
        "mixer": "rwkv7",
        "feed_forward": "rwkv7_channel_mix",
        "intermediate_size": len(vector["channel"]["key"]),
        "rwkv7": {field: len(time[name][0]) for field, name in RANKS.items() if name in time},
    }
    layer = 0 if first is None else 1
    shared = {} if first is None else {FIRST_VALUES: numbers(first)[None]}
    sequence, mixer = Sequence.of(vector), build_mixer(model, layer, time, NAMES)
    for way, y_SD, handed, state in outputs(mixer, sequence, layer, shared):
        yield f"time_mix ({way})", y_SD, numbers(vector["time_mix"])
        if handed:
            yield "v_first_out", handed[FIRST_VALUES][0], numbers(vector["v_first_out"])
        if state is not None:
            yield "state", state["matrix"].tensors["state"][0], numbers(vector["state"])
    # The file does not say the layer of a channel mix: its weights are all given, and the layer changes nothing else.
    channel = build_channel_mix(model, layer, vector["channel"], NAMES)
    for way, y_SD, _, _ in outputs(channel, sequence, layer):
        yield f"channel_mix ({way})", y_SD, numbers(vector["channel_mix"])
