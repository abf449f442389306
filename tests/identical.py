"""Record what training, resuming, evaluating and generating give, to the last bit, and compare a later state with it.

    python -m tests.identical record FOLDER     # at the commit to compare with
    python -m tests.identical compare FOLDER    # after the change, on the same machine

Rounding depends on the machine's instructions, so that recorded values are worth something only on the machine that
recorded them: they are kept in a folder and not in the repository. The folder holds the runs too: `compare` resumes
their checkpoints, which proves that checkpoints written before can still be read.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from tests.train.runs import records, run_forked

STEPS = 4
BASE = (
    "--config=configs/quickstart.yaml",
    f"--train.steps={STEPS}",
    "--train.precision=fp32",
    "--train.micro_batch_size=auto",
    "--train.global_batch_size=8",
    "--train.sequence_length=64",
    "--train.sample_tokens=8",
    "--data.validation_max_bytes=20000",
    "--optim.warmup_steps=2",
    "--telemetry.every=1",
    "--telemetry.tensorboard=false",
    "--checkpoint.every=2",
)
NO_LOAD_TERM = "--model.moe.load_cv2_coef=0"
# Ranks and options of every setting.
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one": (1, ()),
    "recompute": (1, ("--train.recompute_activations=true",)),
    "documents": (1, ("--model.isolate_documents=true",)),
    "mlkv": (1, ("--model.kv_layers=2",)),
    "window": (1, ("--model.sliding_window=24",)),
    "mixed": (
        1,
        (
            "--model.isolate_documents=true",
            "--model.sliding_window=24",
            "--model.kv_layers=2",
            "--model.qk_norm=head",
            "--train.recompute_activations=true",
            "--train.micro_batch_size=4",
        ),
    ),
    "post_norm": (1, ("--model.norm=layernorm", "--model.norm_position=post", "--model.qk_norm=projection")),
    "capacity": (1, ("--model.moe.capacity_factor=1.1", "--model.moe.num_shared_experts=1", "--model.moe_every=1")),
    "softmax": (
        1,
        (
            "--model.moe.router=softmax_topk",
            NO_LOAD_TERM,
            "--model.moe.switch_aux_coef=0.01",
            "--model.moe.z_loss_coef=0.001",
        ),
    ),
    "sigmoid": (
        1,
        (
            "--model.moe.router=sigmoid_topk",
            NO_LOAD_TERM,
            "--model.moe.num_groups=4",
            "--model.moe.top_k_groups=2",
            "--model.moe.bias_update_rate=0.001",
            "--model.moe.input_jitter=0.01",
        ),
    ),
    "switch": (
        1,
        ("--model.moe.router=switch", "--model.moe.top_k=1", "--model.moe.renormalize_gates=false", NO_LOAD_TERM),
    ),
    "dense": (1, ("--model.moe_every=0",)),
    "flat_2": (2, ("--parallel.expert_parallel_size=2", "--parallel.chunks=2")),
    "unique_2": (2, ("--parallel.dispatch=unique", "--parallel.chunks=3", "--model.kv_layers=2")),
    "replicated_2": (2, ("--parallel.expert_parallel_size=1", "--parallel.zero_stage=2")),
    "zero3_2": (2, ("--parallel.zero_stage=3", "--train.recompute_activations=true", "--model.kv_layers=2")),
    "capacity_2": (2, ("--model.moe.capacity_factor=1.1", "--model.moe.num_shared_experts=1")),
    "two_level_4": (
        4,
        ("--parallel.dispatch=two_level", "--parallel.ranks_per_node=2", "--parallel.chunks=2"),
    ),
    "flat_4": (4, ("--parallel.expert_parallel_size=4", "--parallel.zero_stage=2")),
    "zero3_4": (4, ("--parallel.expert_parallel_size=2", "--parallel.zero_stage=3", "--parallel.dispatch=unique")),
}
USED = ("one", "documents", "mixed", "window", "sigmoid")  # whose models evaluate and generate
TENSOR_FIGURES = ("train/loss", "train/grad_norm", "val/cross_entropy", "moe/max_violation", "moe/load_cv2")


def main() -> int:
    """Record or compare; 1 if something differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.identical", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings (default: all)")
    options = parser.parse_args()
    if options.action == "record":
        options.folder.mkdir(parents=True)
    different = []
    for name in options.only:
        found, kept = (
            observe(name, options.folder, is_first=options.action == "record"),
            options.folder / f"{name}.json",
        )
        if options.action == "record":
            kept.write_text(json.dumps(found, indent=1))
            print(f"recorded  {name}", flush=True)
            continue
        expected = json.loads(kept.read_text())
        faults = [key for key in expected if found.get(key) != expected[key]]
        print(f"{'DIFFERENT' if faults else 'same     '}  {name}  {', '.join(faults)}", flush=True)
        for key in faults:
            print(f"    {key}: {expected[key]} -> {found.get(key)}")
        different += faults
    return 1 if different else 0


def observe(name: str, folder: Path, is_first: bool) -> dict[str, Any]:
    """Everything that a setting gives."""
    ranks, options = SETTINGS[name]
    old, run = folder / name, folder / (name if is_first else f"{name}.now")
    shutil.rmtree(run, ignore_errors=True)
    command(ranks, "train", *BASE, *options, f"--train.run_dir={run}")
    found: dict[str, Any] = {"trained": figures(run)}
    exported = folder / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    command(1, "checkpoint", "export", str(newest(run)), str(exported))
    files = sorted(exported.rglob("*.safetensors"))
    found["weights"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if name in USED:
        text = (
            "--prompt",
            "def main(",
            "--prompt",
            "import",
            "--max-new-tokens",
            "12",
            "--precision",
            "fp32",
            "--json",
        )
        output = last_object(command(1, "generate", "--run", str(run), *text))
        found["generated"] = [each["text"] for each in output["completions"]]
        output = last_object(command(1, "evaluate", "--run", str(run), "--precision", "fp32", "--json"))
        found["evaluated"] = output["loss"]
    resumed = folder / f"{name}.resumed"
    shutil.rmtree(resumed, ignore_errors=True)
    checkpoint = sorted((old / "checkpoints").glob("step_*"))[0]
    more = (f"--checkpoint.resume={checkpoint}", f"--train.run_dir={resumed}")
    command(ranks, "train", *BASE, *options, *more)
    found["resumed"] = figures(resumed)
    for each in (exported, resumed, *([] if is_first else [run])):
        shutil.rmtree(each, ignore_errors=True)
    return found


def newest(run: Path) -> Path:
    """The last checkpoint of a run."""
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def command(ranks: int, *arguments: str) -> str:
    """The output of a subcommand, which has to succeed."""
    result = run_forked(ranks, *arguments, timeout=300)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {result.returncode}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def figures(run: Path) -> list[list[Any]]:
    """Figures of every record, which JSON keeps to the last bit."""
    return [[record.get(key) for key in TENSOR_FIGURES] for record in records(run)]


def last_object(output: str) -> dict[str, Any]:
    """The JSON object in the last line."""
    return json.loads(output.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
