"""What is a plain linear layer: modules whose own code, hooks or parameters do anything else are found, and named."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from collogue.contract.spec import VALUE_DTYPES
from collogue.errors import ArgumentError, DTypeError

#: Modules of hooks that only watch, or choose an adapter, and that this package itself puts on modules.
_HARMLESS = ("torch.utils.", "transformers.utils.output_capturing", "peft.tuners.lora.model", "collogue.")


def home(function: Any) -> str:
    """The module whose code ``function`` runs; a wrapper may bear the name of what it wraps."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__func__", function)
    return str(getattr(code, "__globals__", {}).get("__name__", getattr(code, "__module__", "")))


def runs(function: Any, homes: tuple[str, ...]) -> bool:
    """Whether ``function`` is of one of ``homes``, maybe wrapped in decorators of transformers or PyTorch."""
    wrappers = list[str]()
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        wrappers.append(home(function))
        function = inner
    return home(function).startswith(homes) and all(each.startswith(("transformers.", "torch.", "contextlib")) for each in wrappers)


def functions_of(kind: type) -> list[tuple[str, Any]]:
    """What modules of this class run: its functions, and those it inherits, but for most of ``nn.Module``'s."""
    names = {name for each in kind.__mro__ if each not in (nn.Module, object) for name in vars(each)} | {"forward", "__call__"}
    found = ((name, getattr(kind, name, None)) for name in sorted(names))
    return [(name, each) for name, each in found if isinstance(getattr(each, "__func__", each), FunctionType) or name == "forward"]


def changes_what_runs(*hooks: Mapping[int, Any], harmless: tuple[str, ...] = _HARMLESS) -> bool:
    """Whether there is a hook that may look at, or change, what modules compute."""
    return any(not home(hook).startswith(harmless) for each in hooks for hook in each.values())


def own_ways(module: nn.Module, known: tuple[str, ...] = ()) -> str:
    """What calling ``module`` does beside its class's forward, in words; empty where that is nothing. ``known``: packages that may."""
    forward = vars(module).get("forward")
    if forward is not None and not home(forward).startswith(("collogue.", *known)):
        return "has a forward of its own"
    found = changes_what_runs(module._forward_hooks, module._forward_pre_hooks, harmless=(*_HARMLESS, *known))
    return "has a forward hook" if found else ""


def odd_parameter(parameter: Tensor, *, meta: bool = False) -> str:
    """Why a parameter cannot be cut, in words; empty where it can. ``meta``: it may be without memory."""
    if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
        return f"of another type than Tensor ({type(parameter.data).__name__})"
    plain = parameter.is_floating_point() and parameter.element_size() > 1 and (meta or not parameter.is_meta)
    return "" if plain else f"of {parameter.dtype} on {parameter.device}"


def check_dtype(dtype: torch.dtype) -> None:
    """Raise :class:`DTypeError` for a model in a dtype that calls do not take."""
    if dtype not in VALUE_DTYPES:
        known = "bfloat16, float16 and float32"
        raise DTypeError(f"the model is in {dtype}; known are {known}", hint="load it with dtype=torch.bfloat16, or convert it before")


def check_linear(linear: object, name: str, *, meta: bool = False) -> None:
    """Raise :class:`ArgumentError` for what does anything but ``x W^T + b`` with a plain ``W``: a layer in its place would not."""
    problem = ""
    if (
        not isinstance(linear, nn.Linear)
        or type(linear).forward is not nn.Linear.forward
        or type(linear).__call__ is not nn.Module.__call__
        or not runs(nn.Linear.forward, ("torch.nn.modules.linear",))
    ):
        problem = f"is a {type(linear).__module__}.{type(linear).__qualname__}, not a plain nn.Linear"
    else:
        weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
        if weight is None or bias is not linear.bias:
            problem = "computes its weight or bias"
        else:
            named = {"weight": weight} | ({} if bias is None else {"bias": bias})
            odd = [f"has a {each} {problem}" for each, parameter in named.items() if (problem := odd_parameter(parameter, meta=meta))]
            problem = odd[0] if odd else own_ways(linear)
    if problem:
        raise ArgumentError(
            f"{name} {problem}",
            hint="pass plain nn.Linear layers: merge adapters (merge_and_unload), do not quantize before, add hooks afterwards if at all",
        )
