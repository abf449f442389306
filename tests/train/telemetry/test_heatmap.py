"""The picture of expert load: colours mean what the legend says, and every expert has its cell."""

import io

import numpy as np
import pytest
from PIL import Image

from moe_train.train.telemetry.heatmap import draw_load, encode_png, load_colors


def test_colours_of_known_shares() -> None:
    dead, low, quarter, mean, high, most = load_colors(np.array([0.0, 0.1, 0.25, 1.0, 1.5, 9.0]))
    assert dead.max() < 40  # near black
    assert (low == quarter).all() and quarter[2] > quarter[0]  # blue, and the scale ends at a quarter
    assert mean.min() > 240  # near white
    assert most[0] > 150 and most[2] < 60  # red
    assert mean[1] > high[1] > most[1]
    # Twice and half are as far from the mean, and half way to the ends.
    above, below = load_colors(np.array([2.0, 0.5]))
    assert np.abs((247 - above.astype(int)) / (247 - most) - 0.5).max() < 0.01
    assert np.abs((247 - below.astype(int)) / (247 - quarter.astype(int)) - 0.5).max() < 0.01


@pytest.mark.parametrize(("layers", "experts"), [(1, 1), (2, 8), (3, 64), (2, 256)])
def test_a_cell_an_expert(layers: int, experts: int) -> None:
    counts = np.full((layers, experts), 10)
    counts[-1, -1] = 0
    drawn = draw_load(counts, range(1, layers + 1))
    with Image.open(io.BytesIO(encode_png(drawn))) as read:
        picture = np.array(read)
    assert np.array_equal(picture, np.array(drawn)) and picture.shape[2] == 3
    assert max(picture.shape) <= 2000
    dead = np.argwhere((picture == load_colors(np.array([0.0]))[0]).all(2))
    legend = dead[dead[:, 0] >= 20 + layers * 22]
    cell = dead[dead[:, 0] < 20 + layers * 22]
    assert len(legend) and len(cell) and len(cell) % 22 == 0
    assert cell[:, 1].max() - cell[:, 1].min() < 40  # one cell, at the end of its row
    assert cell[:, 0].min() == 20 + (layers - 1) * 22


def test_a_layer_without_tokens_is_drawn_dead() -> None:
    picture = np.array(draw_load(np.zeros((1, 4), dtype=int), [0]))
    assert (picture[22, 62] == load_colors(np.array([0.0]))[0]).all()
