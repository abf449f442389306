"""Vectors of TTT layers: the whole layer, with its inner learning rate and without."""

from collections.abc import Iterator

from tests.vectors.layers import Quantity, Sequence, Vector, build_mixer, numbers, outputs

LINEAR = {"q": "query", "k": "key", "v": "value", "o": "output", "gate": "gate"}
NAMES = {short: f"{name}.weight" for short, name in LINEAR.items()} | {
    "norm_weight": "inner_norm_weight",
    "norm_bias": "inner_norm_bias",
    "post_weight": "post_norm.weight",
    "post_bias": "post_norm.bias",
}


def check(vector: Vector) -> Iterator[Quantity]:
    """Yield the layer's outputs."""
    values = vector["parameters"]
    for quantity, rate in (("y", vector["base_lr"]), ("y_base_lr_0", 0.0)):
        name = f"ttt_{vector['kind']}"
        section = {
            "mini_batch": vector["mini_batch"],
            "inner_learning_rate": rate,
            "gate": "gate" in values,
            "short_conv": "conv_q" in values,
        }
        width, heads = len(vector["x"][0]), vector["heads"]
        model = {"hidden_size": width, "num_layers": 1, "num_heads": heads, "moe_every": 0}
        mixer = build_mixer(model | {"mixer": name, name: section}, 0, values, NAMES)
        mixer.warm_up(1.0)
        for way, y_SD, _, _ in outputs(mixer, Sequence.of(vector)):
            yield f"{quantity} ({way})", y_SD, numbers(vector[quantity])
