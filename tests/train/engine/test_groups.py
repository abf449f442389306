"""Parameter groups: the routers' learning rate acts on their maps and on nothing else."""

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
