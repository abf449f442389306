"""Which layers count where keys and values are averaged."""

from collections import Counter

import pytest

from moe_train.config.model import ModelConfig
from moe_train.interop.reduction import Reduction


class OtherMixers(ModelConfig):
    """Layers 1 and 2 are not attention."""

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        return ("attention", "other", "other", "attention")


@pytest.mark.parametrize(("model", "counts"), [(ModelConfig, {0: 1, 1: 1, 2: 1, 3: 1}), (OtherMixers, {0: 1, 3: 1})])
def test_only_attention_layers_read_keys_and_values(model, counts) -> None:
    source, target = model(num_layers=4), model(num_layers=4, kv_layers=1)
    assert Reduction(source, target).layers(0) == Counter(counts)
