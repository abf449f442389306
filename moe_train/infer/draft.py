"""Opening of a draft model for speculative decoding: another run's model, or the first layers of the target."""

import copy
import re
from dataclasses import dataclass, replace

from torch import nn

from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.moe import DROPLESS
from moe_train.infer.speculative import Draft
from moe_train.infer.trained import Trained, Use, load_model, open_trained
from moe_train.model.transformer import Transformer

_OWN_LAYERS = re.compile(r"self:(.*)")


@dataclass(frozen=True)
class DraftSource:
    """A draft that can be loaded: its settings are checked.

    Attributes:
        num_tokens: Tokens that it proposes per round.
        trained: Opened checkpoint of the draft; None: it is the first layers of the target.
        num_layers: Number of these layers; 0 with a checkpoint of its own.
        end_of_document: Id of the end-of-document token, where the draft isolates documents; None: it does not.
    """

    num_tokens: int
    trained: Trained | None
    num_layers: int
    end_of_document: int | None

    def load(self, target: Transformer) -> Draft:
        """Load the draft's weights, or take the target's.

        Args:
            target: Target, loaded.

        Raises:
            UsageError: If the checkpoint has other tensors than its model.
            DamagedCheckpoint: If a file is damaged.

        Collective: All ranks.
        """
        if self.trained is None:
            model = first_layers(target, self.num_layers)
            return Draft(model, self.num_tokens, self.end_of_document, shares_cache=True)
        return Draft(load_model(self.trained), self.num_tokens, self.end_of_document)


def open_draft(setting: str, num_tokens: int, target: Trained, use: Use, option: str = "--draft") -> DraftSource:
    """Find a draft and check that it fits the target; no weights are read.

    Args:
        setting: Folder of a run or checkpoint; or self:K, for the first K layers of the target.
        num_tokens: Tokens that it proposes per round, at least 1.
        target: Opened checkpoint of the target.
        use: Settings of the use of the target.
        option: Name of the option for the setting, for messages.

    Raises:
        UsageError: If there is no such draft, or it has another tokenizer than the target.
    """
    if found := _OWN_LAYERS.fullmatch(setting):
        num_layers = _check_own_layers(found[1], target.config.model, f"{option} ({setting})")
        return DraftSource(num_tokens, None, num_layers, _mark(target))
    trained = _open(setting, target, use, option)
    if trained.manifest.tokenizer != target.manifest.tokenizer:
        raise UsageError(
            f"{option} ({setting}) was trained with another tokenizer ({trained.tokenizer.vocab_size} tokens) than "
            f"{target.manifest.folder} ({target.tokenizer.vocab_size}): train it with the target's data.tokenizer"
        )
    return DraftSource(num_tokens, trained, 0, _mark(trained))


def first_layers(model: Transformer, num_layers: int) -> Transformer:
    """Make a model of the first layers of another one, its embedding, final norm and head; all weights are shared."""
    shorter = copy.copy(model)
    shorter._modules = {**model._modules, "blocks": nn.ModuleList(list(model.blocks)[:num_layers])}
    return shorter


def _open(run: str, target: Trained, use: Use, option: str) -> Trained:
    """Open another run's checkpoint: its experts are spread as the target's if they divide, else all on each rank."""
    changes = {"model": {"moe": DROPLESS}}

    def opened(size: int) -> Trained:
        return open_trained(run, target.world, replace(use, expert_parallel_size=size), changes, option=option)

    size, whole = target.config.parallel.expert_parallel_size, opened(1)
    model = whole.config.model
    return opened(size) if size > 1 and model.moe_layer_indices and model.moe.num_experts % size == 0 else whole


def _mark(trained: Trained) -> int | None:
    return trained.tokenizer.end_of_document if trained.config.model.isolate_documents else None


def _check_own_layers(text: str, model: ModelConfig, what: str) -> int:
    """Return the number of first layers; keys and values that they own must not be read by layers above them."""
    right = [number for number in range(1, model.num_layers) if _is_whole(model, number)]
    if text.isdecimal() and int(text) in right:
        return int(text)
    numbers = ", ".join(map(str, right))
    if not text.isdecimal() or not 1 <= int(text) < model.num_layers:
        raise UsageError(
            f"{what}: must be self:K with K from 1 to {model.num_layers - 1}, layers of {model.num_layers}"
        )
    raise UsageError(
        f"{what} cuts layers that share keys and values (model.kv_layers, owners {list(model.kv_owner_layers)}): "
        + (f"K may be {numbers}" if right else "all layers of this model share one owner's, so it has no such draft")
    )


def _is_whole(model: ModelConfig, num_layers: int) -> bool:
    """Return whether no layer from this one on reads keys and values of a layer below it."""
    readers = [layer for layer in model.attention_layers if layer >= num_layers]
    return not readers or readers[0] in model.kv_owner_layers
