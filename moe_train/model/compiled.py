"""torch.compile for the dense parts of a model in training: attention, norms, dense SwiGLUs, shared experts.

What is not compiled, and why:
- The MoE layer's route, dispatch, experts and combine: collectives, and sizes that the data decide. A router's draws
  are hashes of 64 bits that every layout must find alike, and C++ promises nothing of signed integers that overflow.
- Evaluation and decoding: a module in evaluation mode runs its own forward, so that nothing is compiled for caches,
  prompts of any length and held-out sequences.

Parameters, their names and the state dict do not change. Layers of the same kind share the compiled code, so that the
time to compile does not grow with their number.
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
        model: Model, changed in place: its dense parts get another forward, nothing else. Not for ZeRO-3: its hooks
            gather the weights of every linear map, and cut the parts into pieces that compiling makes slower.
        backend: Backend of torch.compile.
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
    """Check that torch can compile for a device: compile a small function, which takes seconds.

    Args:
        device: Device that the model will be on.

    Raises:
        UsageError: If compiling fails.
    """
    # Without the cache of graphs: code that was compiled earlier does not show that there is a compiler now.
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
        # Computed here, because in the compiled code the first layer, which computes them for all, would differ.
        context.rotary_angles(mixer.head_dim, mixer.rope_theta, x_BSD.dtype)
        if context.tokens.copies is not None:
            context.hidden_blocks()
        if context.tokens.is_whole:
            context.attention_blocks(mixer.window, mixer.head_dim, x_BSD.dtype)
        if context.tokens.document_starts is not None:
            # The compiled code finds the blocks. What it depends on must not change with the documents of a batch.
            context = replace(context, tokens=replace(context.tokens, document_starts=()))
        if mixer.key is None:
            return forward(x_BSD, context)
        # Without what the layers below hand up, so that the first owner, which gets nothing, shares the compiled code.
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
    # The formula of `SwiGLU.forward` without its own gradient function. That function writes into halves of one tensor,
    # at which dynamo (torch 2.13) breaks the graph; the compiler does the same from the plain formula.
    gate, up = module.gate_up(x).chunk(2, dim=-1)
    return module.down(F.silu(gate) * up)


def _compiled_in_training(
    module: nn.Module, plain: Callable[..., Any], function: Callable[..., Any], backend: str
) -> Callable[..., Any]:
    """Make a function for a module that runs compiled code in training mode, and plain code in evaluation mode.

    If activations are recomputed, the first pass of a block records no gradient. It still runs the code of the second
    pass, and frees what that code keeps. The same code gives the same numbers, so the router makes the same choices.

    Args:
        module: Module whose training mode decides.
        plain: Function for evaluation mode.
        function: Function to compile, called with the module first; modules with the same object share its code.
        backend: Backend of torch.compile.
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
    # Code for inputs that carry a gradient would be compiled again for inputs that do not.
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
