"""The README's pictures of TensorBoard: two short runs, with and without balance losses, seen by headless Chromium.

Needs Chromium in PATH and the packages of the extra `test`. The heat maps are of the last step.

    python -m benchmarks.pictures [--json] [--steps 300] [--output docs/images]
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.runner.command_line import BenchmarkParser
from benchmarks.runner.processes import ROOT, TrainingRun, run_training
from benchmarks.runner.results import print_json, say
from moe_train.host.cores import usable_cores

WIDTH, HEIGHT = 1110, 1200
TIMEOUT_SECONDS = 900
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")
OPTIONS = (
    "--config=configs/quickstart.yaml",
    "--data.bpe_vocab_size=1024",
    "--model.hidden_size=64",
    "--model.intermediate_size=64",
    "--model.moe_every=1",
    "--model.moe.num_experts=16",
    "--train.sample_tokens=0",
    "--train.validate_every=100",
    "--checkpoint.every=0",
)
RUNS = {"no_balance": 0.0, "weak_balance": 0.003}  # the weight of both CV^2 losses


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, look, save; the exit code."""
    parser = BenchmarkParser("pictures", __doc__)
    parser.add_number("--steps", 300, "steps of each run; the first record is of step 10", least=10)
    parser.add_output("the pictures", ROOT / "docs" / "images")
    options = parser.read(arguments)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("chromium is not in PATH: install it (Debian: apt-get install chromium)")
    heatmap, scalars = (options.output / f"tensorboard_{name}.png" for name in ("heatmap", "custom_scalars"))
    with tempfile.TemporaryDirectory(prefix="moe_train_pictures_") as scratch:
        logs = train(Path(scratch), options.steps)
        with tensorboard(logs) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            look_at_images(page, address, heatmap)
            look_at_charts(page, address, scalars)
            browser.close()
    print(heatmap, scalars, sep="\n")
    print_json(options, {"pictures": [str(heatmap), str(scalars)]})
    return 0


def train(scratch: Path, steps: int) -> Path:
    """Train all runs, each in one process.

    Args:
        scratch: Folder for the run folders.
        steps: Steps of each run.

    Returns:
        Folder with the TensorBoard events of each run, by its name.
    """
    runs = []
    for name, coefficient in RUNS.items():
        weights = [f"--model.moe.{term}_cv2_coef={coefficient}" for term in ("importance", "load")]
        runs.append(TrainingRun(name, scratch / name, (*OPTIONS, *weights, f"--train.steps={steps}")))
    run_training(runs, usable_cores(), TIMEOUT_SECONDS, lambda run, seconds: say(f"{run.name}: {seconds:.0f} s"))
    logs = scratch / "logs"
    for run in runs:
        shutil.copytree(run.folder / "tensorboard", logs / run.name)
    return logs


@contextlib.contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """Run TensorBoard while the block runs; its address. It has read everything before it answers."""
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logs.name}", "--host=127.0.0.1", "--port=0"]
    command += ["--load_fast=false", "--reload_interval=0", "--reload_task=blocking"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=logs.parent)
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                return
        raise RuntimeError(f"TensorBoard ended with code {process.wait()} before it was ready")
    finally:
        process.terminate()
        process.wait(timeout=30)


def look_at_images(page: Page, address: str, path: Path) -> None:
    """Save the Images tab."""
    page.goto(f"{address}/#images")
    pictures = page.locator("tf-image-loader img")
    pictures.first.wait_for()
    page.wait_for_timeout(2000)
    bottom = max(box["y"] + box["height"] for box in (picture.bounding_box() for picture in pictures.all()) if box)
    save(page, path, max(bottom + 25, 510))  # the names of the runs stand beside the pictures


def look_at_charts(page: Page, address: str, path: Path) -> None:
    """Save the first charts of the Custom Scalars tab, nothing cut off."""
    page.goto("about:blank")
    page.goto(f"{address}/#custom_scalars")
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    charts.first.locator(".line-plot path.line[d^=M]").first.wait_for(state="attached")
    page.locator("tf-custom-scalar-dashboard paper-checkbox", has_text="Ignore outliers").click()
    page.wait_for_timeout(4000)
    box = charts.nth(5).bounding_box()
    save(page, path, box["y"] + box["height"] if box else HEIGHT)


def save(page: Page, path: Path, bottom: float) -> None:
    """Save the page down to a height, in 256 colours."""
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": WIDTH, "height": min(HEIGHT, bottom)})
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
