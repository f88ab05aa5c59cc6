"""The forward passes of decoder layers that end attention and MLP in one fused call each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.prologue import Gated
from collogue.errors import ArgumentError, CapacityError, DTypeError
from collogue.pytorch.cut import Cut
from collogue.pytorch.forms import Form
from collogue.pytorch.nn import FusedRMSNorm, finish, gather_columns
from collogue.pytorch.plain import changes_what_runs, home, own_ways


class Untouched:
    """The modules inside a decoder layer that must stay as they are: between them run parts of sums, or parts of features.

    Hooks there would see, and act on, what the unsharded model does not have. ``free``: the names of those that get whole tensors; they
    may be replaced as well where not ``held``. ``codes``: of those, the norms that return codes, whose scales a hook would not see.
    """

    def __init__(self, layer: nn.Module, free: Iterable[str], codes: Iterable[str] = (), *, held: bool) -> None:
        self._codes = [module for name, module in layer.named_modules() if name in codes]
        self._places = [(*place, place[1] in free) for place in _places(layer, "") if held or place[1] not in free]
        self._lists = [(name, each, len(each)) for name, each in layer.named_modules() if isinstance(each, nn.ModuleDict)]

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


def check_use(layers: list[Untouched], comm: Communicator, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` for uses of a parallel model that would show, or be changed by, one rank's part.

    :class:`CapacityError` for more tokens than it was made for, :class:`DTypeError` where products have another dtype than sums.
    """
    asked = kwargs.get("output_attentions")
    if getattr(base.config, "output_attentions", False) if asked is None else asked:
        raise ArgumentError("output_attentions=True: each rank has the attention weights of its own heads", hint="use the unsharded model")
    if torch.compiler.is_compiling():
        return
    check_attention(base.config)
    _check_tokens(comm, kwargs.get("inputs_embeds"), args[0] if args else kwargs.get("input_ids"))
    _check_dtype(comm, base)
    everywhere = torch.nn.modules.module
    if changes_what_runs(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        _reject("a forward hook was registered on all modules")
    for layer in layers:
        layer.check()


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


def _reject(problem: str) -> None:
    raise ArgumentError(
        f"{problem} after parallelize",
        hint="put hooks on whole decoder layers, model.norm or lm_head; for others use the unsharded model",
    )


class Boundaries:
    """What a decoder layer's forward pass needs. ``following``: the next layer, if there is one; ``next_norm``: what it
    begins with, or the last norm.
    """

    def __init__(self, layer: Any, form: Form, comm: Communicator, following: Any, next_norm: FusedRMSNorm | None) -> None:
        self.layer, self.comm, self.following, self.next_norm = layer, comm, following, next_norm
        self._attention_in = form.attention_in
        norms: list[Any] = [form.attention_out, form.mlp_in, form.mlp_out]
        self.attention_out, self.mlp_in, self.mlp_out = (name and getattr(layer, name) for name in norms)

    @property
    def attention_in(self) -> Any:
        """The norm that the layer begins with, as it is now: it gets a whole stream, so another may take its place."""
        return self._attention_in and getattr(self.layer, self._attention_in)

    @property
    def _hands_over(self) -> bool:
        """Whether no hook can change the stream between here and the norm: not every change in place is counted."""
        between = self.layer._forward_hooks, *(each._forward_pre_hooks for each in (self.following, self.next_norm) if each is not None)
        changed = any(between) if torch.compiler.is_compiling() else changes_what_runs(*between)
        return self.next_norm is not None and not changed

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention and MLP, each ended by one call: the branch's norm if there is one, the new stream, and the norm that reads it."""
        given = hidden_states if self.attention_in is None else self.attention_in(hidden_states)
        attention = partial_of(self.layer.self_attn(given, *args, **kwargs))
        middle = finish(self.comm, attention, residual=hidden_states, norm=self.mlp_in, branch_norm=self.attention_out)
        given = middle.residual if self.mlp_in is None else self.mlp_in.result(middle, hidden_states.shape[:-1])
        mlp = partial_of(self.layer.mlp(given))
        out = finish(self.comm, mlp, residual=middle.residual, norm=self.next_norm, branch_norm=self.mlp_out, hand_over=self._hands_over)
        assert out.residual is not None
        return out.residual


class GatedMLP:
    """``down(silu(gate) * up)``, where the input of ``down`` is quantized: in the kernel that computes it.

    ``names``: of the MLP's layers: gate and up, or both in one, and down.
    """

    def __init__(self, mlp: nn.Module, names: Sequence[str], comm: Communicator) -> None:
        self.mlp, self.names, self.comm = mlp, names, comm

    def forward(self, x: Tensor) -> Tensor:
        *columns, down = (getattr(self.mlp, name) for name in self.names)
        parts = [column(x) for column in columns]
        leading, rows = parts[0].shape[:-1], [part.reshape(-1, part.shape[-1]) for part in parts]
        given = Gated.of(*rows) if len(rows) == 1 else Gated(*rows)
        partial: Tensor = down(self.comm.finish(given, quant=down.activation))
        return partial.view(*leading, partial.shape[-1])


def partial_of(returned: Any) -> Tensor:
    """What a branch returned, without attention weights or router scores."""
    partial: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return partial


class WholeNorm:
    """A norm over the features of all heads, of which each rank has its own: gathered, normed whole, and cut again."""

    def __init__(self, norm: nn.Module, comm: Communicator, cut: Cut) -> None:
        (section,) = cut.sections
        self.norm, self.comm, self.parts, self.width = norm, comm, section.parts, section.size // section.parts

    def forward(self, x: Tensor) -> Tensor:
        world_size = self.comm.world_size
        every = gather_columns(x, self.comm).view(*x.shape[:-1], world_size, self.width)[..., :: world_size // self.parts, :]
        whole: Tensor = type(self.norm).forward(self.norm, every.flatten(-2))
        return whole.narrow(-1, self.comm.rank * self.parts // world_size * self.width, self.width)
