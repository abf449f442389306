"""What keys and values cost when fewer layers and heads own them: cache, largest batch, decoding speed, quality.

Each row of the table is one (kv_layers, num_kv_heads) of one model: MHA (all, all), GQA (all, some), MQA (all, 1), and
MLKV (some, any). First each is trained from the same seed on the same tokens, in small (kv_cache.yaml), for its loss;
then each decodes, with heads of 64, in one process, the rows in turn in every round. Writes kv_cache.md and
kv_cache.png.

    python benchmarks/kv_cache.py [--json] [--steps 300] [--lengths 128 512 1024 2048] [--jobs N] [--skip-training]
                                  [--memory-gib 1] [--output FOLDER] ...
"""

import argparse
import json
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from kv_cache_decode import STEPS, DecodePlan, measure_decoding, measure_recomputation  # noqa: E402
from kv_cache_rows import RECOMPUTED_LENGTH, Sharing, claims_of, result_rows  # noqa: E402
from reports import can_draw, make_output, processor, say, write_whole  # noqa: E402
from training_runs import RunFailed, TrainingRun, run_all  # noqa: E402

from moe_train.host.cores import usable_cores  # noqa: E402

EXIT_USAGE = 2
RUN_TIMEOUT_SECONDS = 1800
MIN_STEPS = 20
CONFIG = ROOT / "benchmarks" / "kv_cache.yaml"
KV_LAYERS, NUM_KV_HEADS = (8, 4, 2, 1), (8, 2, 1)
LENGTHS = (128, 512, 1024, 2048)


def train_rows(sharings: list[Sharing], options: argparse.Namespace, folder: Path) -> dict[Sharing, float]:
    """Train all rows, with a line on stderr for each that is done; the held-out loss of each, nats a token.

    Raises:
        RunFailed: One did not end well.
    """
    shared = (
        f"--config={CONFIG}",
        f"--train.steps={options.steps}",
        f"--train.seed={options.seed}",
        f"--optim.warmup_steps={options.steps // 5}",
    )
    runs: dict[TrainingRun, Sharing] = {}
    for sharing in sharings:
        name = f"kv_layers_{sharing.kv_layers}_heads_{sharing.num_kv_heads}"
        own = (f"--model.kv_layers={sharing.kv_layers}", f"--model.num_kv_heads={sharing.num_kv_heads}")
        runs[TrainingRun(name, folder / name, (*shared, *own))] = sharing
    losses: dict[Sharing, float] = {}

    def note(run: TrainingRun, seconds: float) -> None:
        losses[runs[run]] = loss = run.records()[-1]["val/cross_entropy"]
        say(f"[{len(losses)}/{len(runs)}] {runs[run].name} {runs[run].pair}: loss {loss:.3f}, {seconds:.0f} s")

    say(f"{len(runs)} runs of {options.steps} steps, {options.jobs} at a time")
    run_all(list(runs), options.jobs, RUN_TIMEOUT_SECONDS, note)
    return losses


def parse_options(model: dict[str, Any]) -> argparse.Namespace:
    """The command line, checked against the model."""
    parser = argparse.ArgumentParser(
        prog="kv_cache.py",
        description=__doc__.split("\n\n")[0],
        epilog="Twenty minutes or so on two cores, five with --skip-training; needs 5 GB of memory.",
        allow_abbrev=False,
    )
    results = ROOT / "benchmarks" / "results"
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object as the last line of stdout")
    add("--kv-layers", type=int, nargs="+", default=KV_LAYERS, metavar="M", help="rows: layers that own (8 4 2 1)")
    add("--kv-heads", type=int, nargs="+", default=NUM_KV_HEADS, metavar="G", help="rows: heads of each (8 2 1)")
    add("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens at which decoding is timed")
    add("--batch-size", type=int, default=16, metavar="N", help="sequences that are decoded together (default: 16)")
    add("--rounds", type=int, default=15, metavar="N", help=f"timings, each of {STEPS} tokens a sequence (default: 15)")
    add(
        "--memory-gib", type=float, default=1.0, metavar="GIB", help="for weights and cache: largest batch (default: 1)"
    )
    add("--steps", type=int, default=300, metavar="N", help="steps of each training run (default: 300)")
    add("--seed", type=int, default=0, metavar="N", help="of all runs (default: 0)")
    add("--jobs", type=int, default=usable_cores(), metavar="N", help="training runs at a time (default: the cores)")
    add("--skip-training", action="store_true", help="no training: no losses")
    add("--output", type=Path, default=results, metavar="FOLDER", help="of kv_cache.md, .png (benchmarks/results)")
    options = parser.parse_args()
    for name, least in (("steps", MIN_STEPS), ("seed", 0), ("jobs", 1), ("batch_size", 1), ("rounds", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} ({getattr(options, name)}) must be {least} or more")
    if not 0 < options.memory_gib < float("inf"):
        parser.error(f"--memory-gib ({options.memory_gib:g}) must be more than 0")
    if min(options.lengths) < STEPS:
        parser.error(f"--lengths ({min(options.lengths)}) must be {STEPS} or more, the tokens of one timing")
    options.lengths = sorted(set(options.lengths))
    for name, field in (("kv_layers", "num_layers"), ("kv_heads", "num_heads")):
        option, most = f"--{name.replace('_', '-')}", model[field]
        values = sorted(set(getattr(options, name)), reverse=True)
        if most not in values:
            parser.error(f"{option} ({_listed(values)}) must include {most}, {field} of {CONFIG.name}: MHA")
        for value in values:
            if not 1 <= value <= most or (name == "kv_heads" and most % value):
                what = "divide" if name == "kv_heads" else "be 1 to"
                parser.error(f"{option} ({value}) must {what} {field} ({most}) of {CONFIG.name}")
        setattr(options, name, values)
    make_output(parser, options.output)
    return options


def main() -> int:
    """Train, decode, write and print; the exit code."""
    model = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["model"]
    options = parse_options(model)
    if not can_draw("kv_cache.py"):
        return EXIT_USAGE
    from kv_cache_report import draw_chart, markdown_report

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the runs are ended too
    shape = (model["num_layers"], model["num_heads"])
    sharings = [Sharing(layers, heads, *shape) for layers in options.kv_layers for heads in options.kv_heads]
    losses: dict[Sharing, float] = {}
    if not options.skip_training:
        with tempfile.TemporaryDirectory(prefix="moe_train_kv_cache_") as folder:
            try:
                losses = train_rows(sharings, options, Path(folder).resolve())
            except RunFailed as error:
                say(f"kv_cache.py: {error}")
                return 1
    torch.set_num_threads(usable_cores())
    plan = DecodePlan(model, options.batch_size, tuple(options.lengths), options.rounds, options.seed)
    decoded = measure_decoding(sharings, plan, say)
    recomputed = measure_recomputation(sharings[0], plan, RECOMPUTED_LENGTH)  # MHA: the largest cache
    rows = result_rows(decoded, losses, int(options.memory_gib * 2**30))
    claims = claims_of(rows, recomputed)
    figures = {
        "machine": {"cpu": processor(), "threads": torch.get_num_threads(), "torch": version("torch")},
        "lengths": options.lengths,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
        "memory_gib": options.memory_gib,
        "steps": None if options.skip_training else options.steps,
        "seed": options.seed,
        "rows": [row.as_dict() for row in rows],
        "recomputed": recomputed.as_dict(),
        "claims": claims,
    }
    report = markdown_report(rows, recomputed, claims, figures)
    write_whole(options.output / "kv_cache.md", report.encode())
    write_whole(options.output / "kv_cache.png", draw_chart(rows, figures))
    print(report)
    if options.json:
        print(json.dumps(figures))
    return 0


def _listed(values: list[int]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
