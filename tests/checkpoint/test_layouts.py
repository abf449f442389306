"""Saved in one layout and loaded in another: the same bits, and the same losses afterwards."""

import itertools
from pathlib import Path

import pytest

from tests.checkpoint.layouts import (
    LAYOUTS,
    LOSS_TOLERANCE,
    Layout,
    Origin,
    Resumption,
    covering_pairs,
    differing,
    resume_in_layouts,
    save_in_layouts,
    whole_state,
)
from tests.checkpoint.made import made_state, make_checkpoint

PAIRS = covering_pairs()  # `python -m benchmarks.layout_matrix` has all 324
# What is saved is fp32 in every precision.
NARROW = Layout(1, 1, 2, "bf16")
PRECISION_PAIRS = [(NARROW, Layout(2, 2, 3)), (Layout(2, 1, 1), Layout(1, 1, 3, "bf16"))]
OFFLOADED = [Layout(2, 2, stage, offload_optimizer="cpu") for stage in (1, 2, 3)]
OFFLOAD_PAIRS = [
    *((saved_by, Layout(2, 2, saved_by.zero_stage)) for saved_by in OFFLOADED),
    *((Layout(2, 2, loaded_by.zero_stage), loaded_by) for loaded_by in OFFLOADED),
    (OFFLOADED[1], OFFLOADED[2]),
    (OFFLOADED[2], Layout(4, 2, 1)),
    (Layout(1, 1, 3), OFFLOADED[0]),
]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Origin]:
    """The same training in every layout, saved and gone on."""
    return save_in_layouts([*LAYOUTS, NARROW, *OFFLOADED], tmp_path_factory.mktemp("origins"))


@pytest.fixture(scope="module")
def resumptions(
    origins: dict[Layout, Origin], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[Layout, Layout], Resumption]:
    """Each pair."""
    pairs = [(origins[saved_by], loaded_by) for saved_by, loaded_by in [*PAIRS, *PRECISION_PAIRS, *OFFLOAD_PAIRS]]
    found = resume_in_layouts(pairs, tmp_path_factory.mktemp("resumed"))
    return {(one.saved_by, one.loaded_by): one for one in found}


def test_the_pairs_cover_every_change() -> None:
    assert len(LAYOUTS) == 18
    assert sorted(saved.name for saved, _ in PAIRS) == sorted(loaded.name for _, loaded in PAIRS)
    assert {loaded for _, loaded in PAIRS} == set(LAYOUTS)
    for field, values in (("world_size", (1, 2, 4)), ("expert_parallel_size", (1, 2, 4)), ("zero_stage", (1, 2, 3))):
        changes = {(getattr(saved, field), getattr(loaded, field)) for saved, loaded in PAIRS}
        assert changes == set(itertools.product(values, repeat=2)), field


def test_what_is_compared_is_there(origins: dict[Layout, Origin]) -> None:
    state = whole_state(origins[LAYOUTS[-1]].checkpoint)
    assert state["optimizer_step"] == 3
    assert any(any(values) for name, values in state["buffers"].items() if name.endswith("selection_bias"))
    for name in state["tensors"]:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert state[f"{kind}/{name}"].any() and (state[f"{kind}/{name}"] != 0xFFFFFFFF).all(), name


def test_what_differs_is_found(tmp_path: Path) -> None:
    state = made_state()
    whole = make_checkpoint(tmp_path / "whole", world_size=2, state=state)
    assert differing(whole, make_checkpoint(tmp_path / "spread", world_size=3, state=state)) == []
    state["exp_avg/norm.weight"][1] *= 1 + 2**-23  # the last bit
    changes = {"optimizer_step": 2, "buffers": {"router.bias": [0.5, -0.125]}}
    other = make_checkpoint(tmp_path / "other", world_size=3, state=state, **changes)
    assert differing(whole, other) == ["buffers", "exp_avg/norm.weight", "optimizer_step"]


@pytest.mark.parametrize("layout", [*LAYOUTS, *OFFLOADED], ids=lambda layout: layout.name)
def test_every_layout_trains_alike(origins: dict[Layout, Origin], layout: Layout) -> None:
    assert origins[layout].losses == pytest.approx(origins[LAYOUTS[0]].losses, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("pair", [*PAIRS, *OFFLOAD_PAIRS], ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
def test_it_goes_on_in_another_layout(
    resumptions: dict[tuple[Layout, Layout], Resumption], pair: tuple[Layout, Layout]
) -> None:
    assert resumptions[pair].differing == []
    assert resumptions[pair].loss_difference <= LOSS_TOLERANCE


@pytest.mark.parametrize("pair", PRECISION_PAIRS, ids=lambda pair: f"{pair[0].name}-{pair[1].name}")
def test_it_goes_on_in_another_precision(
    resumptions: dict[tuple[Layout, Layout], Resumption], pair: tuple[Layout, Layout]
) -> None:
    assert resumptions[pair].differing == []
    # bf16 has 8 bits: 0.4 % a rounding, and a token may go to another expert.
    assert resumptions[pair].loss_difference <= 0.02
