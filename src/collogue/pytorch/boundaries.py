"""The forward passes of decoder layers that end attention and MLP in one fused call each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.contract.prologue import Gated
from collogue.pytorch.cut import Cut
from collogue.pytorch.forms import Form
from collogue.pytorch.nn import FusedRMSNorm, finish, gather_columns
from collogue.pytorch.plain import changes_what_runs


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
        with _counted():
            out = finish(
                self.comm, mlp, residual=middle.residual, norm=self.next_norm, branch_norm=self.mlp_out, hand_over=self._hands_over
            )
        assert out.residual is not None
        return out.residual


def _counted() -> Any:
    """In inference mode, tensors made here are ordinary ones: PyTorch counts their changes in place, also those in inference mode."""
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    return _ordinary() if inference else nullcontext()


@contextmanager
def _ordinary() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


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


class FewerHeads:
    """The model's configuration as it is now, but for the number of heads."""

    def __init__(self, config: Any, heads: int) -> None:
        self._config, self.num_attention_heads = config, heads

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_config"], name) if "_config" in vars(self) else object.__getattribute__(self, name)
