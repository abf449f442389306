"""The scripts that ask the planner: what they make of its answer, and what stands in docs/scaling.md."""

import re
from pathlib import Path

import pytest

from moe_train.config.load import load_config
from tests.docs.pages import ROOT, load_script, read_page

ANSWER = {
    "parameters": {"total": 1000, "active": 500},
    "memory": {"weights": 2 * 2**30, "gradients": 2**30},
    "traffic": {"intra_node": 1, "inter_node": 2},
    "step": {"seconds": 2.0, "largest_term": "experts", "p50": 2.1, "p99": 2.5},
    "mfu": 0.4,
    "fits": False,
}


def rows() -> dict[str, list[str]]:
    """Cells of the table by configuration."""
    found = {}
    for line in read_page("scaling.md").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and re.fullmatch(r"`\w+`", cells[0]):
            found[cells[0].strip("`")] = cells[1:]
    return found


def test_a_row_says_what_the_planner_said():
    script = load_script("make_scaling")
    config = load_config(["--config", str(ROOT / "configs/olmoe_1b_7b.yaml")], program="test")
    made = script.row("olmoe_1b_7b", config, script.Cluster(2, 8, "h100"), ANSWER)
    tokens = config.train.global_batch_size * config.train.sequence_length / 2
    for expected in ("1,000", "500", "2 x 8 H100", "3.0 GiB, too much", "2.0 s", f"{tokens:,.0f}", "40%", "experts"):
        assert f"| {expected} |" in made
    assert made.count("|") == len(script.COLUMNS) + 1


def test_every_large_configuration_has_its_row():
    large = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"quickstart"}
    assert set(load_script("make_scaling").CLUSTERS) == large
    assert set(rows()) == large, "run python docs/make_scaling.py"


@pytest.mark.parametrize("name", sorted(rows()))
def test_parameters_of_the_table_are_the_models(name):
    from moe_train.model.count import count_parameters

    config = load_config(["--config", str(ROOT / f"configs/{name}.yaml")], program="test")
    count = count_parameters(config.model, config.model.vocab_size or 0)
    assert rows()[name][:2] == [f"{count.total:,}", f"{count.active:,}"], "run python docs/make_scaling.py"


def test_a_layout_of_the_table_is_the_configurations():
    for name, cells in rows().items():
        parallel = load_config(["--config", str(ROOT / f"configs/{name}.yaml")], program="test").parallel
        assert cells[3] == f"{parallel.expert_parallel_size}, {parallel.zero_stage}, {parallel.dispatch}", name


def test_bars_stand_on_each_other(tmp_path: Path):
    pytest.importorskip("matplotlib", reason='needs the bench extra: pip install -e ".[bench]"')
    script = load_script("make_pictures")
    figure, axes = script.plt.subplots()
    bars = [script.Bar("a", {"x": 1.0, "none": 0.0, "y": 2.0}), script.Bar("b", {"x": 3.0, "none": 0.0, "y": 4.0})]
    script.draw_bars(axes, bars, "title")
    places = [(patch.get_y(), patch.get_height()) for patch in axes.patches]
    assert places == [(0.0, 1.0), (0.0, 3.0), (1.0, 2.0), (3.0, 4.0)]
    assert [text.get_text() for text in axes.texts] == ["3", "7"]
    figure.savefig(tmp_path / "bars.png")
    script.plt.close(figure)
