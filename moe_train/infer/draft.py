"""Opening of a draft model for speculative decoding: another run's model, or the first layers of the target."""

import copy
import re
from dataclasses import dataclass, replace

from torch import nn

from moe_train.config.errors import UsageError
from moe_train.config.model import ModelConfig
from moe_train.config.moe import DROPLESS
from moe_train.data import Tokenizer
from moe_train.infer.speculative import Draft
from moe_train.infer.trained import Trained, Use, load_model, open_trained
from moe_train.model.transformer import Transformer

DRAFT_TOKENS = 4  # tokens that a draft proposes per round, if none are given
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
    what = f"{option} ({setting})"
    if found := _OWN_LAYERS.fullmatch(setting):
        num_layers = int(found[1]) if found[1].isdecimal() else 0
        check_own_layers(num_layers, target.config.model, what)
        return DraftSource(num_tokens, None, num_layers, _mark(target))
    trained = _open(setting, target, use, option)
    check_same_tokenizer(trained.tokenizer, target.tokenizer, what)
    return DraftSource(num_tokens, trained, 0, _mark(trained))


def check_same_tokenizer(draft: Tokenizer, target: Tokenizer, what: str) -> None:
    """Check that a draft's tokens mean what the target's do.

    Args:
        draft: Tokenizer of the draft.
        target: Tokenizer of the target.
        what: Setting of the draft with its value, for the message.

    Raises:
        UsageError: If they do not.
    """
    if draft.fingerprint != target.fingerprint:
        raise UsageError(
            f"{what} has another tokenizer ({draft.vocab_size} tokens) than the model ({target.vocab_size} tokens): "
            "train the draft with the model's data.tokenizer"
        )


def check_own_layers(num_layers: int, model: ModelConfig, what: str) -> None:
    """Check that the first layers of a model can be its draft: they must cover whole groups of one owner's readers.

    Args:
        num_layers: Number of first layers.
        model: Model section of the configuration.
        what: Setting of the draft with its value, for the message.

    Raises:
        UsageError: If there are no such layers, or a layer above them reads keys and values of a layer among them.
    """
    right = [number for number in range(1, model.num_layers) if _is_whole(model, number)]
    if num_layers in right:
        return
    if not 1 <= num_layers < model.num_layers:
        raise UsageError(f"{what} must have 1 to {model.num_layers - 1} layers: the model has {model.num_layers}")
    ways = f"they may be {', '.join(map(str, right))}" if right else "this model has no such draft"
    raise UsageError(
        f"{what} parts layers that share keys and values (model.kv_layers, owners {list(model.kv_owner_layers)}): "
        + ways
    )


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


def _is_whole(model: ModelConfig, num_layers: int) -> bool:
    """Return whether no layer from this one on reads keys and values of a layer below it."""
    readers = [layer for layer in model.attention_layers if layer >= num_layers]
    return not readers or readers[0] in model.kv_owner_layers
