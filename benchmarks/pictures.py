"""The README's pictures of TensorBoard: two short runs, with and without balance losses, seen by headless Chromium.

    python benchmarks/pictures.py [--out docs/images] [--steps 300]

Needs Chromium in PATH and the packages of the extra `test`. The heat maps are of the last step.
"""

import argparse
import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
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


def main() -> int:
    """Train, look, save; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder of the pictures")
    parser.add_argument("--steps", type=int, default=300, help="steps of each run (default: 300)")
    options = parser.parse_args()
    if options.steps < 10:
        parser.error(f"--steps ({options.steps}) must be 10 or more: the first record is of step 10")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("chromium is not in PATH: install it (Debian: apt-get install chromium)")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moe_train_pictures_") as scratch:
        logs = Path(scratch) / "logs"
        for name, coefficient in RUNS.items():
            train(Path(scratch) / name, coefficient, options.steps)
            shutil.copytree(Path(scratch) / name / "tensorboard", logs / name)
        with tensorboard(logs) as address, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            look_at_images(page, address, options.out / "tensorboard_heatmap.png")
            look_at_charts(page, address, options.out / "tensorboard_custom_scalars.png")
            browser.close()
    return 0


def train(run_dir: Path, coefficient: float, steps: int) -> None:
    """One run in one process."""
    weights = [f"--model.moe.{name}_cv2_coef={coefficient}" for name in ("importance", "load")]
    arguments = [*OPTIONS, *weights, f"--train.steps={steps}", f"--train.run_dir={run_dir}"]
    command = [sys.executable, "-m", "moe_train", "train", *arguments]
    subprocess.run(command, cwd=ROOT, check=True, timeout=TIMEOUT_SECONDS)


@contextlib.contextmanager
def tensorboard(logs: Path) -> Iterator[str]:
    """TensorBoard while the block runs; its address. It has read everything before it answers."""
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
    """The Images tab."""
    page.goto(f"{address}/#images")
    pictures = page.locator("tf-image-loader img")
    pictures.first.wait_for()
    page.wait_for_timeout(2000)
    bottom = max(box["y"] + box["height"] for box in (picture.bounding_box() for picture in pictures.all()) if box)
    save(page, path, max(bottom + 25, 510))  # the names of the runs stand beside the pictures


def look_at_charts(page: Page, address: str, path: Path) -> None:
    """The first charts of the Custom Scalars tab, nothing cut off."""
    page.goto("about:blank")
    page.goto(f"{address}/#custom_scalars")
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    charts.first.locator(".line-plot path.line[d^=M]").first.wait_for(state="attached")
    page.locator("tf-custom-scalar-dashboard paper-checkbox", has_text="Ignore outliers").click()
    page.wait_for_timeout(4000)
    box = charts.nth(5).bounding_box()
    save(page, path, box["y"] + box["height"] if box else HEIGHT)


def save(page: Page, path: Path, bottom: float) -> None:
    """The page down to a height, in 256 colours."""
    page.screenshot(path=path, clip={"x": 0, "y": 0, "width": WIDTH, "height": min(HEIGHT, bottom)})
    Image.open(path).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
