"""Vectors of Infini-attention: the whole layer."""

from collections.abc import Iterator

from tests.vectors.layers import Quantity, Sequence, Vector, build_mixer, numbers, outputs

NAMES = {name[0] if name != "output" else "o": f"{name}.weight" for name in ("query", "key", "value", "output")}


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the layer's outputs."""
    model = {
        "hidden_size": len(vector["x"][0]),
        "num_layers": 1,
        "num_heads": vector["heads"],
        "num_kv_heads": vector["kv_heads"],
        "moe_every": 0,
        "mixer": "infini",
        "infini": {"segment_length": vector["segment"], "memory": "delta" if vector["delta"] else "linear"},
    }
    mixer = build_mixer(model, 0, vector["parameters"], NAMES)
    for way, y_SD, _, _ in outputs(mixer, Sequence.of(vector)):
        yield f"y ({way})", y_SD, numbers(vector["y"])
