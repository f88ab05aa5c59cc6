"""The forward passes of decoder layers that end attention and MLP in one fused call each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.prologue import Gated
from collogue.errors import ArgumentError
from collogue.pytorch.cut import Cut
from collogue.pytorch.forms import Form
from collogue.pytorch.nn import FusedRMSNorm, finish, gather_columns
from collogue.pytorch.plain import changes_what_runs, own_ways


class Untouched:
    """The modules inside a decoder layer that must stay as they are: between them run parts of sums, or parts of features.

    Hooks there would see, and act on, what the unsharded model does not have. ``free``: the names of those that get whole tensors; they
    may be replaced as well where not ``held``. ``codes``: of those, the norms that return codes, whose scales a hook would not see.
    """

    def __init__(self, layer: nn.Module, free: Iterable[str], codes: Iterable[str] = (), *, held: bool) -> None:
        self._codes = [module for name, module in layer.named_modules() if name in codes]
        self._places = [(*place, place[1] in free) for place in _places(layer, "") if held or place[1] not in free]

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
        for module in self._codes:
            if changes_what_runs(module._forward_hooks):
                raise ArgumentError(
                    "a norm in front of quantized layers has a forward hook after parallelize: it returns codes, without their scales",
                    hint="put the hook on the decoder layer, or a forward pre-hook on the norm",
                )


def check_use(layers: list[Untouched], base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` for uses of a parallel model that would show, or be changed by, one rank's part."""
    asked = kwargs.get("output_attentions")
    if getattr(base.config, "output_attentions", False) if asked is None else asked:
        raise ArgumentError("output_attentions=True: each rank has the attention weights of its own heads", hint="use the unsharded model")
    if torch.compiler.is_compiling():
        return
    everywhere = torch.nn.modules.module
    if changes_what_runs(everywhere._global_forward_hooks, everywhere._global_forward_pre_hooks):
        _reject("a forward hook was registered on all modules")
    for layer in layers:
        layer.check()


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

    def _hands_over(self, stream: Tensor) -> bool:
        """Whether nobody can change the stream between here and the norm without being noticed: not every tensor counts its changes."""
        if not (torch.compiler.is_compiling() or stream.is_inference()):
            return True
        return not (self.layer._forward_hooks or (self.following is not None and self.following._forward_pre_hooks))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention and MLP, each ended by one call: the branch's norm if there is one, the new stream, and the norm that reads it."""
        given = hidden_states if self.attention_in is None else self.attention_in(hidden_states)
        attention = partial_of(self.layer.self_attn(given, *args, **kwargs))
        middle = finish(self.comm, attention, residual=hidden_states, norm=self.mlp_in, branch_norm=self.attention_out)
        given = middle.residual if self.mlp_in is None else self.mlp_in.result(middle, hidden_states.shape[:-1])
        mlp = partial_of(self.layer.mlp(given))
        hands_over = self.next_norm is not None and self._hands_over(mlp)
        out = finish(self.comm, mlp, residual=middle.residual, norm=self.next_norm, branch_norm=self.mlp_out, hand_over=hands_over)
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
