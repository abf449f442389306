"""torch.compile for the dense parts of a model in training: attention, norms, dense SwiGLUs, shared experts.

What stays as it is, and why:
- The MoE layer's route, dispatch, experts and combine: collectives, and sizes that the data decide. A router's draws
  are hashes of 64 bits that every layout must find alike, and C++ promises nothing of signed integers that overflow.
- Evaluation and decoding: a module in evaluation mode runs its own forward, so that nothing is compiled for caches,
  prompts of any length and held-out sequences.

Parameters, their names and the state dict stay too. Layers of the same make share what is compiled: the time that it
takes does not grow with their number.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_train.config.errors import UsageError
from moe_train.model.feed_forward import DenseSwiGLU
from moe_train.model.layers import LayerNorm, RMSNorm, SwiGLU
from moe_train.model.mixers.attention import AttentionMixer, without_key_value
from moe_train.model.mixers.base import MixerContext, Shared


def compile_dense_parts(model: nn.Module, backend: str = "inductor") -> None:
    """Let the dense parts of a model run compiled in training mode; each is compiled when it first runs.

    Args:
        model: Changed in place: the parts get another forward, nothing else. ZeRO-3's hooks, which gather the weights
            of every linear map within these parts, cut them to pieces that compiling makes slower.
        backend: Of torch.compile.
    """
    mixers = [module for module in model.modules() if isinstance(module, AttentionMixer)]
    within = {inner for mixer in mixers for inner in mixer.modules() if inner is not mixer}
    for module in model.modules():
        if module in within:  # traced as a part of its mixer: norms of queries and keys
            continue
        if isinstance(module, AttentionMixer):
            _compile_attention(module, backend)
        elif isinstance(module, SwiGLU):
            _compile_swiglu(module, backend)
        elif isinstance(module, RMSNorm | LayerNorm):
            _replace(module, "forward", _compiled_in_training(module, module.forward, type(module).forward, backend))


def check_compiler(device: torch.device) -> None:
    """Compile something small for a device: the one sure test of all that compiling needs. It takes seconds.

    Args:
        device: That the model will be on.

    Raises:
        UsageError: If that fails.
    """
    # Without the cache of graphs: what was compiled when there was a compiler says nothing of now.
    probe = torch.compile(_twice, options={"fx_graph_cache": False})
    try:
        probe(torch.ones(64, device=device))
    except (RuntimeError, OSError, ImportError) as error:  # torch's own are RuntimeErrors
        needed = "triton and a C++ compiler" if device.type == "cuda" else "a C++ compiler (g++, or the one CXX names)"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UsageError(
            f"train.compile (True) needs {needed}, and torch cannot compile for {device.type} here: {reason}"
        ) from error


def _twice(x: Tensor) -> Tensor:
    return x + x


def _compile_attention(mixer: AttentionMixer, backend: str) -> None:
    forward = _compiled_in_training(mixer, mixer.forward, AttentionMixer.forward, backend)

    def call(x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, Shared]:
        # Formed here, or the first layer, which forms them for all, would be compiled apart from the others.
        context.rotary_angles(mixer.head_dim, mixer.rope_theta)
        if mixer.key is None:
            return forward(x_BSD, context)
        # Without what the layers below hand up: the first owner, below which is nothing, is compiled as the others.
        y_BSD, own = forward(x_BSD, replace(context, shared={}))
        return y_BSD, without_key_value(context.shared) | own

    _replace(mixer, "forward", call)


def _compile_swiglu(module: SwiGLU, backend: str) -> None:
    forward = _compiled_in_training(module, partial(SwiGLU.forward, module), _swiglu_forward, backend)
    if not isinstance(module, DenseSwiGLU):  # shared experts
        _replace(module, "forward", forward)
        return

    def call(x_BSD: Tensor, context: MixerContext) -> tuple[Tensor, None]:
        del context
        return forward(x_BSD), None

    _replace(module, "forward", call)


def _swiglu_forward(module: SwiGLU, x: Tensor) -> Tensor:
    # As `SwiGLU.forward`, without its own gradient function: that writes into halves of one tensor, at which dynamo
    # (torch 2.13) gives up the graph, and the compiler makes of the plain formula what that function does by hand.
    gate, up = module.gate_up(x).chunk(2, dim=-1)
    return module.down(F.silu(gate) * up)


def _compiled_in_training(
    module: nn.Module, plain: Callable[..., Any], function: Callable[..., Any], backend: str
) -> Callable[..., Any]:
    """A module's function: compiled in training mode, as it is in evaluation mode.

    The first pass of a block whose activations are computed again records no gradient. It runs what the second pass
    runs, and lets go of what that keeps: the same code gives the same numbers, and the router makes the same choices.

    Args:
        module: Its training mode decides.
        plain: What it does in evaluation mode.
        function: What is compiled, called with the module first; the same object for all modules that are to share it.
        backend: Of torch.compile.
    """
    # dynamic None: the first shape is compiled for itself, and the first that differs for all that follow.
    compiled = torch.compile(function, dynamic=None, backend=backend)

    def call(*arguments: Tensor | MixerContext) -> Any:
        if not module.training:
            return plain(*arguments)
        if torch.is_grad_enabled():
            return compiled(module, *arguments)
        with torch.enable_grad():
            result = compiled(module, *map(_recorded, arguments))
        return _detached(result)

    return call


def _recorded(argument: Tensor | MixerContext) -> Tensor | MixerContext:
    # What was compiled for inputs that carry a gradient is compiled anew for those that do not.
    if isinstance(argument, Tensor):
        return argument.detach().requires_grad_()
    shared = {
        name: tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in argument.shared.items()
    }
    return replace(argument, shared=shared)


def _detached(result: Tensor | tuple[Tensor, Shared]) -> Any:
    if isinstance(result, Tensor):
        return result.detach()
    return result[0].detach(), {name: tensor.detach() for name, tensor in result[1].items()}


def _replace(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    setattr(module, name, function)  # an attribute of the instance is found before the class's method
