"""What must stay as it is in a parallel model, and uses of it that would show, or be changed by, one rank's part."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.errors import ArgumentError, CapacityError, DTypeError
from collogue.pytorch.plain import changes_what_runs, functions_of, home, own_ways


class Kept:
    """A module that was put in by parallelize: its class, and the shapes of its parameters."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name, self._class = module, name, type(module)
        self._shapes = [(each, parameter.shape) for each, parameter in module._parameters.items() if parameter is not None]

    def check(self) -> None:
        """Raise :class:`ArgumentError` where it is of another class, or a parameter of another shape."""
        if type(self._module) is not self._class:
            _reject(f"{self._name} was made a {type(self._module).__qualname__}")
        held = self._module._parameters
        for name, shape in self._shapes:
            parameter = held.get(name)
            if parameter is None or parameter.shape != shape:
                now = None if parameter is None else [*parameter.shape]
                raise ArgumentError(
                    f"{name} of {self._name} is {now} after parallelize; this rank's part is {[*shape]}",
                    hint="use load_state_dict, which cuts whole tensors, or change the model before parallelize",
                )


class Code:
    """The functions that the classes of a model's layers and norms had; the parallel model leaves some of them out."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        kinds = {type(each) for module in modules for each in module.modules()}
        self._functions = [(kind, name, function) for kind in kinds for name, function in functions_of(kind)]

    def check(self) -> None:
        """Raise :class:`ArgumentError` where one was patched."""
        for kind, name, function in self._functions:
            found = getattr(kind, name, None)
            if getattr(found, "__func__", found) is not getattr(function, "__func__", function):
                raise ArgumentError(
                    f"{kind.__qualname__}.{name} was patched after parallelize",
                    hint="patch nothing that runs inside layers; use forward hooks on whole decoder layers, model.norm or lm_head",
                )


class Untouched:
    """The modules inside a decoder layer that must stay as they are: between them run parts of sums, or parts of features.

    Hooks there would see, and act on, what the unsharded model does not have. ``free``: the names of those that get whole tensors; they
    may be replaced as well where not ``held``. ``codes``: of those, the norms that return codes, whose scales a hook would not see.
    """

    def __init__(self, layer: nn.Module, free: Iterable[str], codes: Iterable[str] = (), *, held: bool) -> None:
        self._codes = [module for name, module in layer.named_modules() if name in codes]
        self._places = [(*place, place[1] in free) for place in _places(layer, "") if held or place[1] not in free]
        self._lists = [(name, each, len(each)) for name, each in layer.named_modules() if isinstance(each, nn.ModuleDict)]
        self._kept = [Kept(module, f"{name} of a decoder layer") for _, name, module, free in self._places if not free]
        self._layer, self._numbers = layer, _numbers(layer) if held else {}
        self._dropouts = [
            (name, module, kind)
            for name, module in layer.named_modules()
            for kind in (("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",))
            if hasattr(module, kind)
        ]

    def check(self) -> None:
        """Raise :class:`ArgumentError` where one was replaced, patched, or given hooks."""
        for modules, name, module, free in self._places:
            if modules.get(name.rpartition(".")[2]) is not module:
                problem = "was replaced"
            elif free:
                continue
            elif module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                problem = own_ways(module)
            else:
                continue
            if problem:
                _reject(f"{name} of a decoder layer {problem}")
        for kept in self._kept:
            kept.check()
        for name, number in self._numbers.items():
            if (now := vars(self._layer).get(name)) != number:
                raise ArgumentError(
                    f"{name} of a decoder layer was {number!r} and is now {now!r}", hint="change it before parallelize, which has read it"
                )
        for name, module, kind in self._dropouts:
            if module.training and (share := getattr(module, kind)):
                raise ArgumentError(
                    f"{name or 'the layer'} of a decoder layer would drop {share} of its elements: the model is in training mode",
                    hint="call model.eval(): a parallel model is for inference, and each rank would drop others",
                )
        for name, each, size in self._lists:
            if len(each) > size:
                raise ArgumentError(
                    f"{name} of a decoder layer has {len(each)} modules, {', '.join(each)}, after parallelize; it had {size}",
                    hint="add adapters before parallelize: those added later are not cut",
                )
        for module in self._codes:
            if changes_what_runs(module._forward_hooks):
                raise ArgumentError(
                    "a norm in front of quantized layers has a forward hook after parallelize: it returns codes, without their scales",
                    hint="put the hook on the decoder layer, or a forward pre-hook on the norm",
                )


def check_use(
    kept: Sequence[Kept | Code | Untouched], comm: Communicator, heads: int | None, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise :class:`ArgumentError` for uses of a parallel model that would show, or be changed by, one rank's part.

    :class:`CapacityError` for more tokens than it was made for, :class:`DTypeError` where products have another dtype than sums.
    """
    asked = kwargs.get("output_attentions")
    if getattr(base.config, "output_attentions", False) if asked is None else asked:
        raise ArgumentError("output_attentions=True: each rank has the attention weights of its own heads", hint="use the unsharded model")
    if torch.compiler.is_compiling():
        return
    check_attention(base.config)
    _check_heads(heads, kwargs.get("past_key_values"), args[1] if len(args) > 1 else kwargs.get("attention_mask"))
    _check_tokens(comm, kwargs.get("inputs_embeds"), args[0] if args else kwargs.get("input_ids"))
    _check_dtype(comm, base)
    everywhere = torch.nn.modules.module
    if changes_what_runs(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        _reject("a forward hook was registered on all modules")
    for each in kept:
        each.check()


def check_owner(base: nn.Module, args: tuple[Any, ...]) -> None:
    """A hook: raise :class:`ArgumentError` where a model that is not parallel samples text with its parallel ``base``."""
    frame = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            owner, config = frame.f_locals.get("self"), frame.f_locals.get("generation_config")
            samples = getattr(config, "do_sample", True)  # without it, the same logits give the same tokens
            if samples and isinstance(owner, nn.Module) and any(module is base for module in owner.modules()):
                raise ArgumentError(
                    f"generate of a {type(owner).__name__} whose base model alone is parallel: ranks may sample different tokens",
                    hint="pass do_sample=False, or parallelize the whole model, whose generate follows rank 0",
                )
        frame = frame.f_back


def check_attention(config: Any) -> None:
    """Raise :class:`ArgumentError` where the model's attention is a function of the user's: it sees the heads of one rank alone."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = getattr(config, "_attn_implementation", None)
    function = ALL_ATTENTION_FUNCTIONS.get(name) if isinstance(name, str) else None
    if function is not None and not home(function).startswith("transformers."):
        raise ArgumentError(
            f"attn_implementation={name!r} is a function of {home(function)}: it would see the heads of one rank alone",
            hint='use one of transformers\': model.set_attn_implementation("sdpa")',
        )


def _check_heads(heads: int | None, cache: Any, mask: Any) -> None:
    """``heads``: of keys and values on this rank, where what is cached is cut."""
    for layer in getattr(cache, "layers", ()) if heads is not None else ():
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[1] != heads:
            raise ArgumentError(
                f"past_key_values has {keys.shape[1]} heads, this rank {heads}",
                hint="pass what the parallel model has returned, or an empty cache",
            )
        break
    planes = [each for each in (mask.values() if isinstance(mask, dict) else (mask,)) if isinstance(each, Tensor) and each.ndim == 4]
    for plane in planes:
        if plane.shape[1] != 1:
            raise ArgumentError(
                f"attention_mask {list(plane.shape)} has a plane for each head: each rank has its own heads",
                hint="pass a mask with one plane, [batch, 1, queries, keys], or [batch, keys]",
            )


def _check_tokens(comm: Communicator, *inputs: Tensor | None) -> None:
    """``inputs``: embeddings ``[.., H]`` and token numbers; the first that is there counts."""
    embeddings, numbers = inputs
    shape = embeddings.shape[:-1] if embeddings is not None else numbers.shape if isinstance(numbers, Tensor) else (0,)
    if math.prod(shape) > comm.max_tokens:
        raise CapacityError(
            f"{math.prod(shape)} tokens in one forward pass, {list(shape)}; the model was parallelized for {comm.max_tokens}",
            hint="pass parallelize a larger max_tokens=, or give the model fewer at once",
        )


def _check_dtype(comm: Communicator, base: Any) -> None:
    kind = comm.device.type
    found = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else base.dtype
    if found != comm.dtype:
        what = "torch.autocast makes products in" if torch.is_autocast_enabled(kind) else "the model's weights are now in"
        raise DTypeError(
            f"{what} {found}; the model was parallelized in {comm.dtype}", hint="load the model in the dtype it shall run in, and run it so"
        )


def _places(module: nn.Module, prefix: str) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield module._modules, prefix + name, child
            yield from _places(child, f"{prefix}{name}.")


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in vars(module).items() if isinstance(each, int | float) and not isinstance(each, bool)}


def _reject(problem: str) -> None:
    raise ArgumentError(
        f"{problem} after parallelize",
        hint="put hooks on whole decoder layers, model.norm or lm_head; for others use the unsharded model",
    )


_BATCHES = ("its cache would be of all heads", "call generate, with padded rows and their attention_mask")
_ADAPTER = ("it would not be cut", "add adapters before parallelize")
#: Methods of transformers' models that a parallel one has not: why, and what to do.
REFUSED = {
    "resize_token_embeddings": ("lm_head is cut", "resize the embeddings before parallelize"),
    **dict.fromkeys(("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"), _BATCHES),
    **dict.fromkeys(("add_adapter", "load_adapter"), _ADAPTER),
}


def refuse(name: str, why: str, instead: str, *args: Any, **kwargs: Any) -> None:
    """What takes the place of such a method."""
    raise ArgumentError(f"{name} of a parallel model: {why}", hint=instead)
