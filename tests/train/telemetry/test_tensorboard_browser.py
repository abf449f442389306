"""TensorBoard itself, opened in a browser: it draws the heat map of expert load and a line an expert in one chart.

What is asserted is what Chromium has rendered, held against the run's metrics.jsonl.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moe_train.train.telemetry.heatmap import load_colors
from moe_train.train.telemetry.records import expert_counts
from tests.processes import ProcessResult
from tests.train.runs import records

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

CHROMIUM = shutil.which("chromium")
START_SECONDS = 90  # for TensorBoard to read the records and answer; 4 on two idle cores
WAIT_MS = 30_000  # for anything in the page to appear; 2 s on two idle cores
FLAGS = (  # as root, in a container, without a GPU, and without looking for the network
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
EXPERT_CHART = re.compile(r"^layer (\d+): tokens of each expert over the mean$")
# The pixels of a picture as the browser has decoded them: each colour once, as "r,g,b".
COLORS = """image => {
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext('2d');
    context.drawImage(image, 0, 0);
    const bytes = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const colors = new Set();
    for (let i = 0; i < bytes.length; i += 4) colors.add(bytes.slice(i, i + 3).join());
    return [...colors];
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian, Ubuntu: apt install chromium)"),
]


@pytest.fixture(scope="module")
def board_url(quick_run: tuple[Path, ProcessResult], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a TensorBoard that has read the run."""
    log = tmp_path_factory.mktemp("board") / "log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", quick_run[0] / "tensorboard", "--host=127.0.0.1"]
    # It answers once it has read everything, on a port that the system chooses.
    command += ["--port=0", "--load_fast=false", "--reload_interval=0", "--reload_task=blocking"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield _printed_address(process, log)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _printed_address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"at (http://\S+)", log.read_text()):
            return found.group(1)
        time.sleep(0.1)
    raise AssertionError(f"TensorBoard gave no address in {START_SECONDS} s:\n{log.read_text()}")


@pytest.fixture(scope="module")
def page() -> Iterator["Page"]:
    """A page of a headless Chromium: Debian's, for playwright's own would have to be downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason='no playwright (pip install -e ".[test]")')
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=30_000)
        page = browser.new_page(viewport={"width": 1500, "height": 1400})
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def _open_tab(page: "Page", board_url: str, tab: str) -> None:
    page.goto("about:blank")  # a change of the fragment alone would not load the page
    page.goto(f"{board_url.rstrip('/')}/#{tab}")


def _last_counts(run_dir: Path) -> tuple[int, dict[int, list[int]]]:
    """Step and tokens of every expert, by layer, of the last record that has them."""
    last: dict[str, Any] = [record for record in records(run_dir) if expert_counts(record)][-1]
    return last["step"], expert_counts(last)


def _shares(counts: list[int]) -> np.ndarray:
    return np.array(counts) / np.mean(counts)


def test_the_images_tab_shows_the_heat_map(quick_run: tuple[Path, ProcessResult], board_url: str, page: "Page") -> None:
    step, counts = _last_counts(quick_run[0])
    _open_tab(page, board_url, "images")
    card = page.locator("tf-image-loader").filter(has_text="moe/load_heatmap")
    image = card.locator("img")
    image.wait_for(state="visible")
    page.wait_for_function("image => image.complete", arg=image.element_handle())
    width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width > 100 and height > 20 * len(counts)  # 0 and 0 where the picture is broken
    shown = image.bounding_box()
    assert shown and shown["width"] > 100 and shown["height"] > 20
    assert card.get_by_text(re.compile(rf"^\s*step\s+{step}\s*$")).is_visible()
    colors = set(image.evaluate(COLORS))
    for layer, row in counts.items():
        for expert, color in enumerate(load_colors(_shares(row))):
            assert ",".join(map(str, color)) in colors, (layer, expert)


def test_the_custom_scalars_tab_shows_a_line_an_expert_in_one_chart_a_layer(
    quick_run: tuple[Path, ProcessResult], board_url: str, page: "Page"
) -> None:
    step, counts = _last_counts(quick_run[0])
    _open_tab(page, board_url, "custom_scalars")
    titles = page.get_by_text(EXPERT_CHART)
    titles.first.wait_for(state="visible")
    texts = [title.inner_text().strip() for title in titles.all() if title.is_visible()]
    layers = [int(EXPERT_CHART.findall(text)[0]) for text in texts]
    assert layers == sorted(counts)  # a chart a layer, in the order of the layers
    for layer, text in zip(layers, texts):
        chart = page.locator("tf-custom-scalar-multi-line-chart-card").filter(has_text=text)
        shares = _shares(counts[layer])
        _check_lines(chart, len(shares))
        tooltip = _read_tooltip(page, chart, len(shares))
        assert tooltip == {
            f"workload/layer_{layer:02d}/expert_{expert:03d}": (pytest.approx(share, rel=1e-3), step)  # four digits
            for expert, share in enumerate(shares)
        }


def _check_lines(chart: "Locator", num_lines: int) -> None:
    """The chart has drawn this many lines, none of them empty."""
    plot = chart.locator(".line-plot").last  # of the smoothed values; the faint lines of the values are a plot below it
    lines = plot.locator("path.line[d^=M]")
    lines.nth(num_lines - 1).wait_for(state="attached")
    assert lines.count() == num_lines


def _read_tooltip(page: "Page", chart: "Locator", num_lines: int) -> dict[str, tuple[float, int]]:
    """Value and step by tag, as the chart tells them when the mouse is at its right end."""
    box = chart.locator(".component.main").bounding_box()
    assert box and box["width"] > 100 and box["height"] > 100
    page.mouse.move(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2, steps=3)
    tooltip = page.locator("vz-line-chart-tooltip table:visible")
    tooltip.locator("tbody tr").nth(num_lines - 1).wait_for()
    titles = tooltip.locator("thead th").all_inner_texts()
    name, value, step = (titles.index(title) for title in ("Name", "Value", "Step"))
    rows = [row.locator("td").all_inner_texts() for row in tooltip.locator("tbody tr").all()]
    return {row[name].split()[0]: (float(row[value]), int(row[step])) for row in rows}
