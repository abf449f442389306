"""Heat maps of expert load: white at the mean, red above it, blue below, black for none.

Legend: L MoE layers, E experts, N records.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_DEAD, _LOW, _MEAN, _HIGH = (20, 20, 20), (33, 102, 172), (247, 247, 247), (178, 24, 43)
_END = 4.0  # the share of the mean, and its inverse, where colours end
_LEGEND = ((0.0, "none"), (0.25, "1/4"), (0.5, "1/2"), (1.0, "mean"), (2.0, "2 x"), (4.0, "4 x or more"))
_CELL_HEIGHT, _LEFT, _TOP, _TEXT = 22, 52, 20, (50, 50, 50)
_WIDTH = 350  # pixels that TensorBoard shows without shrinking
_HISTORY_WIDTH = 600  # pixels of the cells of a picture over time


def load_colors(shares: np.ndarray) -> np.ndarray:
    """Compute the colours of shares of the mean, on a logarithmic scale from a quarter to four times; black for none.

    Args:
        shares: [...], tokens of an expert over the mean of its layer.

    Returns:
        uint8 [..., 3].
    """
    place = np.log(np.clip(shares, 1 / _END, _END)) / math.log(_END)  # -1 .. 1
    amount = np.abs(place)[..., None]
    end = np.where(place[..., None] < 0, np.array(_LOW, dtype=float), np.array(_HIGH, dtype=float))
    colors = np.array(_MEAN) * (1 - amount) + end * amount
    colors[shares <= 0] = _DEAD
    return colors.round().astype(np.uint8)


def draw_load(counts_LE: np.ndarray, layers: Sequence[int]) -> Image.Image:
    """Draw the heat map, in RGB.

    Args:
        counts_LE: Number of tokens of every expert.
        layers: Index in the model of each MoE layer.
    """
    num_layers, num_experts = counts_LE.shape
    shares_LE = counts_LE / np.maximum(counts_LE.mean(1, keepdims=True), 1e-9)
    width = max(5, min(40, (_WIDTH - _LEFT - 6) // num_experts))  # of a cell
    cells = load_colors(shares_LE).repeat(_CELL_HEIGHT, 0).repeat(width, 1)
    bottom = _TOP + num_layers * _CELL_HEIGHT
    canvas = Image.new("RGB", (max(_LEFT + num_experts * width + 6, _WIDTH), bottom + 34), "white")
    canvas.paste(Image.fromarray(cells), (_LEFT, _TOP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for row, layer in enumerate(layers):
        pen.text((4, _TOP + row * _CELL_HEIGHT + 5), f"layer {layer:02d}", _TEXT, font)
    pen.text((4, 4), "expert", _TEXT, font)
    for expert in range(0, num_experts, max(1, math.ceil(18 / width))):
        pen.text((_LEFT + expert * width + 1, 4), str(expert), _TEXT, font)
    _draw_legend(pen, bottom + 12)
    return canvas


def draw_history(shares_EN: np.ndarray, steps: Sequence[int]) -> Image.Image:
    """Draw the load of a layer's experts over the run: one row per expert, time to the right, in RGB.

    Args:
        shares_EN: Tokens of every expert over the mean, of each record.
        steps: Steps done at each record, ascending.
    """
    num_experts, num_records = shares_EN.shape
    height, width = max(3, min(_CELL_HEIGHT, 360 // num_experts)), max(1, _HISTORY_WIDTH // num_records)
    cells = load_colors(shares_EN).repeat(height, 0).repeat(width, 1)
    bottom = _TOP + num_experts * height
    canvas = Image.new("RGB", (_LEFT + max(_HISTORY_WIDTH, num_records * width) + 6, bottom + 52), "white")
    canvas.paste(Image.fromarray(cells), (_LEFT, _TOP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    pen.text((4, 4), "expert", _TEXT, font)
    for expert in range(0, num_experts, max(1, math.ceil(12 / height))):
        pen.text((4, _TOP + expert * height + (height - 11) // 2), str(expert), _TEXT, font)
    end = _LEFT + num_records * width
    pen.text((_LEFT, bottom + 4), f"step {steps[0]}", _TEXT, font)
    if num_records * width > 120:
        pen.text((end - font.getlength(f"{steps[-1]}"), bottom + 4), f"{steps[-1]}", _TEXT, font)
    _draw_legend(pen, bottom + 30)
    return canvas


def draw_kinds(lifts: Sequence[Sequence[float]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Draw how much more than its share each row gets of each column, in RGB; white where a column is empty.

    Args:
        lifts: For each row, its share of each column over the column's share of everything; may be not a number.
        rows: Names of the rows.
        columns: Names of the columns.
    """
    shares = np.nan_to_num(np.array(lifts, dtype=float), nan=1.0)
    width, height = 84, 16
    cells = load_colors(shares).repeat(height, 0).repeat(width, 1)
    bottom = _TOP + len(rows) * height
    canvas = Image.new("RGB", (_LEFT + len(columns) * width + 6, bottom + 34), "white")
    canvas.paste(Image.fromarray(cells), (_LEFT, _TOP))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for place, name in enumerate(columns):
        pen.text((_LEFT + place * width + 2, 4), name, _TEXT, font)
    for place, name in enumerate(rows):
        pen.text((4, _TOP + place * height + 2), name, _TEXT, font)
    _draw_legend(pen, bottom + 12)
    return canvas


def _draw_legend(pen: ImageDraw.ImageDraw, top: int) -> None:
    left, font = 4, ImageFont.load_default()
    for share, text in _LEGEND:
        color = tuple(int(value) for value in load_colors(np.array([share]))[0])
        pen.rectangle((left, top, left + 12, top + 12), fill=color, outline=_TEXT)
        pen.text((left + 16, top), text, _TEXT, font)
        left += 16 + math.ceil(font.getlength(text)) + 12


def encode_png(picture: Image.Image) -> bytes:
    """Encode a picture as a PNG file, with light compression, because this happens in the training loop."""
    file = io.BytesIO()
    picture.save(file, format="png", compress_level=1)
    return file.getvalue()
