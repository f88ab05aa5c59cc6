"""Whose code runs in a decoder layer: what is cut, or left out, must be transformers' own, and norms must be what they seem."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract import reference
from collogue.contract.spec import RMSNorm
from collogue.errors import ArgumentError
from collogue.pytorch.checkpoints import check_compressed, is_quantized
from collogue.pytorch.forms import Form
from collogue.pytorch.plain import functions_of, home, own_ways, runs
from collogue.pytorch.schemes import CACHE_HOOKS

#: What models call the activation of their MLP.
ACTIVATIONS = ("act_fn", "activation_fn")
_OF_SEVERAL = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU, nn.MultiheadAttention)

#: Where transformers has the classes that it puts in the place of experts, and of what holds them, in quantized models.
INTEGRATIONS = "transformers.integrations."
#: The library that quantized a layer computes its product in its own way; here the layer is replaced.
_LIBRARY = ("compressed_tensors.quantization.", "compressed_tensors.compressors.")
#: PyTorch's modules that do the same to every head, or hold others.
_OF_TORCH = (nn.Linear, nn.Identity, nn.Dropout, nn.RMSNorm, nn.LayerNorm, nn.ModuleList, nn.ModuleDict, nn.ParameterDict)


def _is_elementwise(activation: nn.Module) -> bool:
    """Whether it is one of transformers' or PyTorch's that acts on each element alone, whichever features it is given."""
    known = type(activation).__module__ in ("transformers.activations", "torch.nn.modules.activation")
    own = runs(type(activation).forward, ("transformers.activations", "torch.nn.modules.activation"))
    return known and own and not isinstance(activation, _OF_SEVERAL) and all(tensor.numel() == 1 for tensor in activation.parameters())


def check_code(base: Any, layer: nn.Module, name: str, form: Form, fuse: bool) -> None:
    """Whether the layer and what it holds run transformers' own code for this type, and nothing beside it.

    Linear layers are looked at where they are cut, and norms that fused calls take are tried.
    """
    blocks = form.blocks(layer)
    cut = {f"{name}.{each}" for block in blocks for each in (*block.columns, *block.rows)}
    whole = {f"{name}.{each}" for each in form.norms} | {f"{name}.self_attn.{each}" for each in form.whole_norms}
    ours = {name} | {f"{name}.{each}" for block in blocks for each in block.modules}
    homes = (f"transformers.models.{base.config.model_type.removesuffix('_text')}.", INTEGRATIONS, "collogue.")
    for inner, module in layer.named_modules(prefix=name):
        if inner.rpartition(".")[2] in ACTIVATIONS:
            if not _is_elementwise(module):
                _reject_activation(inner, f"a {type(module).__module__}.{type(module).__qualname__}")
        elif (
            inner not in cut | whole
            and not inner.startswith(tuple(f"{each}." for each in cut))
            and not is_quantized(module)
            and not type(module).__module__.startswith(CACHE_HOOKS)  # called by the hook alone, which is taken out
        ):
            _check_class(module, inner, homes if inner in ours else (*homes, "peft.tuners."))
        check_compressed(module, inner)
        known = _LIBRARY if is_quantized(module) else (CACHE_HOOKS,) if inner == f"{name}.self_attn" else ()
        problem = "has a forward of its own" * ("forward" in vars(module)) if module is layer else own_ways(module, known)
        if problem:
            hint = "parallelize the model without it" + "; fuse=False lets hooks on attention, MLP and norms see whole tensors" * fuse
            raise ArgumentError(f"{inner} {problem}", hint=hint + "; hooks on a decoder layer are fine")


def _reject_activation(name: str, what: str) -> None:
    raise ArgumentError(
        f"{name} is {what}, not an activation known to act on each element alone",
        hint="each rank has a part of the features: use an activation of transformers or PyTorch, or collogue.nn",
    )


def _check_class(module: nn.Module, name: str, homes: tuple[str, ...]) -> None:
    """Whether every function of the module's class, and every one it holds as an attribute, is known."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    known = (*homes, "torch.nn.modules.module") if type(module) not in _OF_TORCH else ("torch.",)
    functions = functions_of(type(module))
    functions.sort(key=lambda each: each[0] not in ("forward", "__call__"))  # what matters most is named
    odd = next((each for each, function in functions if not runs(function, (*known, "transformers.modeling_layers"))), None)
    if odd is None and type(module).forward is nn.Module.forward and type(module) not in _OF_TORCH:
        odd = "forward"
    if odd is not None:
        raise ArgumentError(
            f"{name} is a {kind} with a {odd} that is not transformers'",
            hint="pass the model as transformers made it; use collogue.nn or collogue.compile for layers of your own",
        )
    for each, value in vars(module).items():
        if each in ACTIVATIONS:
            _reject_activation(f"{name}.{each}", f"the function {getattr(value, '__qualname__', value)} of {home(value)}")
        if isinstance(value, FunctionType) and each != "forward" and not home(value).startswith(("transformers.", "torch.", "collogue.")):
            raise ArgumentError(
                f"{name}.{each} is a function of {home(value)}, not transformers'", hint="parallelize the model as transformers made it"
            )


#: What norms call their eps.
_EPS = ("variance_epsilon", "eps", "epsilon")


def check_norm(module: Any, name: str) -> tuple[float, float]:
    """Eps and weight offset. What the module computes is tried: on a row that tells the offset, and on one of eps' size."""
    weight = module._parameters.get("weight")
    problem = "has no weight of its own" if not isinstance(weight, Tensor) else own_ways(module)
    named = [getattr(module, each) for each in _EPS if hasattr(module, each)]
    if not problem and not named:
        problem = f"is a {type(module).__name__} without {', '.join(_EPS[:-1])} or {_EPS[-1]}: its eps is not known"
    if problem:
        raise ArgumentError(f"{name} {problem}", hint="parallelize the model as transformers made it, or with fuse=False")
    weight = weight.detach()
    row = torch.linspace(-2.0, 3.0, len(weight), device=weight.device)
    # PyTorch's None is the eps of the type that it computes in.
    for eps in [torch.finfo(dtype).eps for dtype in (torch.float32, weight.dtype)] if named[0] is None else [float(named[0])]:
        probe = torch.stack((row, row * max(eps, 1e-12) ** 0.5)).to(weight.dtype)
        with torch.no_grad():
            found = module(probe).float()
        for offset in (0.0, 1.0):
            expected = reference.rms_norm(probe, RMSNorm(weight, eps, offset)).float()
            if torch.allclose(found, expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5):
                return eps, offset
    raise ArgumentError(f"{name}: {type(module).__name__} is not an RMSNorm that Collogue knows", hint="use collogue.compile instead")
