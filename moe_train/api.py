"""The Python interface: what `import moe_train` offers.

    import moe_train

    config = moe_train.load_config("configs/quickstart.yaml", train={"steps": 100, "run_dir": "runs/mine"})
    result = moe_train.run_training(config)
    run = moe_train.load_run("runs/mine")
    print(run.generate("def main():")[0])

Under a launcher every rank calls the same functions, in the same order.
"""

import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from moe_train.config.base import merge
from moe_train.config.errors import RunFailed, UsageError
from moe_train.config.load import read_yaml, validate_config
from moe_train.config.root import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_train.data import PreparedData, Tokenizer
    from moe_train.infer.speculative import Draft
    from moe_train.model.transformer import Transformer
    from moe_train.train.loop import TrainResult

__all__ = [
    "Config",
    "LoadedRun",
    "RunFailed",
    "UsageError",
    "build_model",
    "load_config",
    "load_run",
    "open_data",
    "run_training",
]

_NO_RUN_DIR = "unused"


def load_config(file: str | Path | None = None, **sections: Mapping[str, Any]) -> Config:
    """Load and check a configuration.

    Args:
        file: YAML file; None: every field has its default.
        sections: Fields that override those of the file, one mapping per section: `train={"steps": 10}`.

    Returns:
        The frozen configuration; `train.run_dir` is "unused" if it is given nowhere.

    Raises:
        UsageError: If fields are wrong; one message names every wrong field and its value.
    """
    values = read_yaml(file, "the configuration") if file is not None else {}
    defaults = {"train": {"run_dir": _NO_RUN_DIR}}
    config = validate_config(
        merge(merge(defaults, values), _plain(sections)), origin=str(file) if file is not None else None
    )
    if file is not None and "run_dir" not in sections.get("train", {}):
        config.note_moved_run(str(file))
    return config


def _plain(value: Any) -> Any:
    """Convert a value to what a YAML file gives: a mapping to a dict, a path to text."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, PurePath) else value


def open_data(config: Config) -> "PreparedData":
    """Prepare the data that a configuration names, or open it if it was prepared before.

    Args:
        config: Configuration from `load_config`.

    Returns:
        Training sequences (`train.batch(indices)` gives those of the run by number: tokens [B, S + 1]), held-out
        sequences and the tokenizer.

    Raises:
        UsageError: If a source cannot be read, or has too little text.
    """
    from moe_train.data import prepare_data
    from moe_train.distributed.bootstrap import discover_world

    world = discover_world()
    return prepare_data(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        min_sequences=config.train.global_batch_size or 1,
        local_rank=world.local_rank,
        show_progress=False,
    )


def build_model(
    config: Config, vocab_size: int | None = None, *, device: str = "cpu", dtype: "torch.dtype | None" = None
) -> "Transformer":
    """Build the model of a configuration with its initial weights, all experts in this process.

    Args:
        config: Configuration from `load_config`.
        vocab_size: Number of tokens of the tokenizer; None: model.vocab_size.
        device: Device of the weights.
        dtype: dtype of the weights; None: fp32.

    Returns:
        The model: `model(Tokens(...))` gives logits [B, S, V]; `LoadedRun.logits` is a shorter way.

    Raises:
        UsageError: If the size of the vocabulary is unknown, or a part refuses its settings.
    """
    import torch

    from moe_train.config.parts import load_kinds
    from moe_train.model import build
    from moe_train.model.parameters import materialize

    size = vocab_size or config.model.vocab_size
    if size is None:
        raise UsageError("model.vocab_size (None): give vocab_size, such as open_data(config).tokenizer.vocab_size")
    load_kinds(config).check(config)
    model = build.build_model(config.model, size, seed=config.train.seed)
    materialize(model, seed=config.train.seed, dtype=dtype or torch.float32, device=torch.device(device))
    return model


def run_training(config: Config) -> "TrainResult":
    """Train as `moe-train train` does: in the folder train.run_dir, from its newest checkpoint if there is one.

    Meanwhile, the output of libraries goes to logs/ in the run's folder, and progress to the standard output.

    Args:
        config: Configuration from `load_config`, with train.run_dir.

    Returns:
        The result of training: held-out loss, last checkpoint, steps and seconds.

    Raises:
        UsageError: If the configuration, the data or the checkpoint is wrong.
        RunFailed: If the run fails; its __cause__ is the error.

    Collective: All ranks.
    """
    if config.train.run_dir == _NO_RUN_DIR:
        raise UsageError('train.run_dir is missing: load_config(..., train={"run_dir": "runs/mine"})')
    from moe_train.distributed.bootstrap import discover_world
    from moe_train.liveness.signals import SIGNALS
    from moe_train.plan.room import check_room
    from moe_train.train.preparation import prepare_run
    from moe_train.train.rank_log import redirected_output

    prepared = prepare_run(config, discover_world(), check_room)
    with redirected_output(prepared.folder, prepared.world.rank) as log:
        from moe_train.infer.closing_sample import sample_text  # imports DeepSpeed: after the device is chosen
        from moe_train.train.engine.groups import leave_process_groups
        from moe_train.train.training import train_prepared

        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            return train_prepared(prepared, log, sample_text)
        finally:
            leave_process_groups()
            for number, handler in handlers.items():  # a run that failed leaves them ignored, for it is about to end
                signal.signal(number, handler)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready for use.

    Attributes:
        model: Model in evaluation mode, with the experts of this rank.
        tokenizer: Tokenizer that the model was trained with.
        config: Configuration that the model was trained with, with the sizes of this use.
        step: Number of steps that the model was trained for.
    """

    model: "Transformer"
    tokenizer: "Tokenizer"
    config: Config
    step: int

    def logits(self, ids_BS: "Tensor | Sequence[Sequence[int]]") -> "Tensor":
        """Compute the logits of the next token at every place.

        Args:
            ids_BS: Token ids of sequences of equal length; each begins a document.

        Returns:
            Logits [B, S, V].

        Collective: All ranks that share the experts.
        """
        import torch

        from moe_train.model.transformer import Tokens

        ids = torch.as_tensor(ids_BS, dtype=torch.int64, device=self.model.embedding.weight.device)
        with torch.no_grad():
            logits: Tensor = self.model(Tokens(ids, torch.arange(len(ids), device=ids.device), 0)).logits_BSV
        return logits

    def generate(
        self,
        *prompts: str,
        max_new_tokens: int = 64,
        temperature: float = 0.7,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        draft: "LoadedRun | int | None" = None,
        draft_tokens: int | None = None,
    ) -> list[str]:
        """Continue texts with the model.

        Args:
            prompts: Texts to continue.
            max_new_tokens: Most tokens of a continuation.
            temperature: Sampling temperature; 0: the likeliest token each time.
            top_k: Number of likeliest tokens to sample from; None: all.
            top_p: Joint probability of the likeliest tokens to sample from; None: all tokens.
            seed: Seed of the draws; the same seed gives the same text.
            draft: Smaller model that proposes tokens, which this model checks: greedy text stays the same, sampled text
                keeps its distribution. A loaded run of the same tokenizer; a number: that many first layers of this
                model; None: plain decoding.
            draft_tokens: Tokens that the draft proposes per round; None: 4.

        Returns:
            The continuation of each prompt, without the prompt.

        Raises:
            UsageError: If a number is out of range, or the draft does not fit.

        Collective: All ranks that share the experts.
        """
        from moe_train.distributed.collectives import world_group
        from moe_train.infer.decode import DecodePlan
        from moe_train.infer.generate import generate
        from moe_train.infer.sampling import Sampling

        _check_sampling(max_new_tokens, temperature, top_k, top_p)
        proposer = self._draft(draft, draft_tokens)
        if not prompts:
            return []
        mark = self.tokenizer.end_of_document
        plan = DecodePlan(
            max_new_tokens=max_new_tokens,
            vocab_size=self.tokenizer.vocab_size,
            sampling=Sampling(temperature, top_k, top_p, seed),
            end_of_document=self._isolation_mark,
        )
        ids = [[mark, *self.tokenizer.encode_known(prompt)] for prompt in prompts]
        found = generate(self.model, self.tokenizer, ids, plan, group=world_group(), draft=proposer)
        return [completion.text for completion in found.completions]

    @property
    def _isolation_mark(self) -> int | None:
        return self.tokenizer.end_of_document if self.config.model.isolate_documents else None

    def _draft(self, draft: "LoadedRun | int | None", num_tokens: int | None) -> "Draft | None":
        from moe_train.infer.draft import DRAFT_TOKENS, check_own_layers, check_same_tokenizer, first_layers
        from moe_train.infer.speculative import Draft

        if draft is None:
            if num_tokens is not None:
                raise UsageError(f"draft_tokens ({num_tokens}) has no effect without draft")
            return None
        num_tokens = DRAFT_TOKENS if num_tokens is None else num_tokens
        if num_tokens < 1:
            raise UsageError(f"draft_tokens ({num_tokens}) must be 1 or more")
        if isinstance(draft, int):
            check_own_layers(draft, self.config.model, f"draft ({draft})")
            return Draft(first_layers(self.model, draft), num_tokens, self._isolation_mark, shares_cache=True)
        check_same_tokenizer(draft.tokenizer, self.tokenizer, f"draft (a run of {draft.step} steps)")
        return Draft(draft.model, num_tokens, draft._isolation_mark)


def load_run(
    run: str | Path,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    expert_parallel_size: int | None = None,
) -> LoadedRun:
    """Load a trained model; the layout of its training does not matter.

    Args:
        run: Folder of a run, whose newest checkpoint is loaded, or folder of a checkpoint.
        device: Device; auto: cuda if there is one.
        precision: Precision of weights and activations; auto: that of training, or fp32 if the device lacks it.
        expert_parallel_size: Ranks that share the experts; None: as many as divide experts and ranks of a host.

    Returns:
        The model and its tokenizer. Experts take all their tokens: a capacity is for training.

    Raises:
        UsageError: If there is no checkpoint, or its tokenizer is missing.
        DamagedCheckpoint: If a file is damaged.

    Collective: All ranks of a launcher.
    """
    from moe_train.config.moe import DROPLESS
    from moe_train.distributed.bootstrap import discover_world
    from moe_train.infer.trained import Use, load_model, open_trained

    use = Use(device, precision, expert_parallel_size)
    trained = open_trained(str(run), discover_world(), use, {"model": {"moe": DROPLESS}}, option="run")
    return LoadedRun(load_model(trained), trained.tokenizer, trained.config, trained.manifest.step)


def _check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    for name, value, is_right, words in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("temperature", temperature, 0.0 <= temperature < math.inf, "0 or more"),
        ("top_k", top_k, top_k is None or top_k >= 1, "1 or more"),
        ("top_p", top_p, top_p is None or 0.0 < top_p <= 1.0, "above 0 and at most 1"),
    ):
        if not is_right:
            raise UsageError(f"{name} ({value}) must be {words}")
