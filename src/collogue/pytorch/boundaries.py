"""The forward passes of decoder layers that end attention and MLP in one fused call each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.errors import ArgumentError
from collogue.pytorch.nn import FusedRMSNorm, changes_what_runs, finish, own_ways


class Untouched:
    """The modules inside a decoder layer that must stay as they are: between them run parts of sums, or parts of features.

    Hooks there would see, and act on, what the unsharded model does not have.
    """

    def __init__(self, layer: nn.Module, *, fused: bool) -> None:
        outside = ("input_layernorm", "pre_feedforward_layernorm")  # called as modules, with whole tensors
        free = outside if fused else tuple(layer._modules)
        self._places = [place for place in _places(layer, "") if place[1] not in free]

    def check(self) -> None:
        """Raise :class:`ArgumentError` where one was replaced, patched, or given hooks."""
        for modules, name, module in self._places:
            if modules.get(name.rpartition(".")[2]) is not module:
                problem = "was replaced"
            elif module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                problem = own_ways(module)
            else:
                continue
            if problem:
                _reject(f"{name} of a decoder layer {problem}")


def check_use(layers: list[Untouched], config: Any, kwargs: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` for uses of a parallel model that would show, or be changed by, one rank's part."""
    asked = kwargs.get("output_attentions")
    if getattr(config, "output_attentions", False) if asked is None else asked:
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
    """What a decoder layer's forward pass needs. ``following``: the next layer, if there is one; ``next_norm``: its norm, or the last."""

    def __init__(self, layer: Any, comm: Communicator, following: Any, next_norm: FusedRMSNorm) -> None:
        self.layer, self.comm, self.following, self.next_norm = layer, comm, following, next_norm

    def _hands_over(self, stream: Tensor) -> bool:
        """Whether nobody can change the stream between here and the norm without being noticed: not every tensor counts its changes."""
        if not (torch.compiler.is_compiling() or stream.is_inference()):
            return True
        return not (self.layer._forward_hooks or (self.following is not None and self.following._forward_pre_hooks))

    def two_norms(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A layer whose branches are added to the stream as they are: the norm of each boundary is the one that reads the new stream."""
        layer = self.layer
        attention, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
        middle = finish(self.comm, attention, residual=hidden_states, norm=layer.post_attention_layernorm)
        mlp = layer.mlp(middle.norm)
        out = finish(self.comm, mlp, residual=middle.residual, norm=self.next_norm, hand_over=self._hands_over(mlp))
        assert out.residual is not None
        return out.residual

    def four_norms(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """A layer whose branches are normed before they are added: the sum and that norm are one call, the addition follows."""
        layer = self.layer
        attention, _ = layer.self_attn(layer.input_layernorm(hidden_states), *args, **kwargs)
        first = finish(self.comm, attention, norm=layer.post_attention_layernorm).norm
        assert first is not None
        stream = hidden_states + first
        mlp = layer.mlp(layer.pre_feedforward_layernorm(stream))
        second = finish(self.comm, mlp, norm=layer.post_feedforward_layernorm).norm
        assert second is not None
        return stream + second
