"""Parameter groups: the rules of mixers, and the routers' learning rate, which acts on their maps and nothing else."""

from moe_train.config.run import OptimConfig
from moe_train.train.engine.groups import parameter_groups
from tests.model.small import small_config, small_model


def factors(factor: float) -> dict[str, float]:
    model = small_model(small_config(moe_every=2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(router_lr_factor=factor))
    found = {names[id(parameter)]: group["lr_factor"] for group in groups for parameter in group["params"]}
    assert found.keys() == set(names.values())  # each once, none left out
    return found


def test_only_the_routers_maps_have_the_factor() -> None:
    found = factors(0.25)
    maps = {name for name in found if ".router." in name}
    assert {name.rpartition("router.")[2] for name in maps} == {"gate.weight", "noise.weight"}
    assert {name for name, factor in found.items() if factor == 0.25} == maps
    assert {factor for name, factor in found.items() if name not in maps} == {1.0}


def test_a_factor_of_one_makes_no_group_of_its_own() -> None:
    model = small_model(small_config(moe_every=2))
    names = [group["name"] for group in parameter_groups(model, OptimConfig(router_lr_factor=1.0))]
    assert names == ["decay", "no_decay"]
    assert set(factors(1.0).values()) == {1.0}


def test_groups_follow_the_rules_of_a_hybrid():
    section = {"segment_length": 5, "gate_lr_factor": 7.0}
    model = small_model(small_config(mixers=["rwkv4", "infini"], infini=section, feed_forward="rwkv_channel_mix"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(router_lr_factor=0.25, weight_decay=0.2))
    found = {
        names[id(parameter)]: (group["lr_factor"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values()) and sum(len(group["params"]) for group in groups) == len(found)
    decayed, plain = (1.0, 0.2), (1.0, 0.0)
    own = {name.removeprefix("blocks.0."): each for name, each in found.items() if name.startswith("blocks.0.")}
    assert own == {
        **dict.fromkeys(("mixer_norm.weight", "feed_forward_norm.weight"), plain),
        **{f"mixer.{name}.weight": decayed for name in ("key", "value", "receptance", "output")},
        **{f"feed_forward.{name}.weight": decayed for name in ("key", "value", "receptance")},
        **dict.fromkeys(("feed_forward.mix_k", "feed_forward.mix_r"), plain),
        **dict.fromkeys(("mixer.mix_k", "mixer.mix_v", "mixer.mix_r"), plain),
        "mixer.decay": (2.0, 0.0),
        "mixer.first": (3.0, 0.0),
    }
    assert found["blocks.1.mixer.beta"] == (7.0, 0.0) and found["blocks.1.mixer.query.weight"] == decayed
    assert {found[f"blocks.1.feed_forward.router.{name}.weight"] for name in ("gate", "noise")} == {(0.25, 0.2)}
    assert sorted(set(found.values())) == [(0.25, 0.2), plain, decayed, (2.0, 0.0), (3.0, 0.0), (7.0, 0.0)]
