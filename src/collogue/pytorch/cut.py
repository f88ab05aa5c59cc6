"""How a weight is cut among ranks, and what checkpoints do with a model that is: whole names and whole tensors, in and out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from collogue.communicator import Communicator
from collogue.errors import ArgumentError, ShapeError


@dataclass(frozen=True)
class Section:
    """``size`` features in ``parts`` equal parts. With fewer parts than ranks, neighboring ranks hold the same part."""

    size: int
    parts: int


@dataclass(frozen=True)
class Cut:
    """A tensor of the sections' sizes along ``dim``, one after the other. Each rank has its part of every section."""

    dim: int
    sections: tuple[Section, ...]

    @classmethod
    def even(cls, size: int, dim: int, world_size: int, what: str) -> Cut:
        """One section, a part for each rank. Raises :class:`ShapeError` where it does not divide."""
        if size % world_size:
            raise ShapeError(f"{what}: {size} features do not divide among {world_size} ranks", hint="use a world size that divides it")
        return cls(dim, (Section(size, world_size),))

    @property
    def size(self) -> int:
        """Of the whole tensor along ``dim``."""
        return sum(section.size for section in self.sections)

    def in_units(self, unit: int, what: str) -> Cut:
        """The same cut of a tensor with one element for every ``unit`` features; where nothing is cut, the last unit may be smaller.

        Raises :class:`ShapeError` where a part ends inside a unit.
        """
        if all(section.parts == 1 for section in self.sections):
            return Cut(self.dim, (Section(-(-self.size // unit), 1),))
        for section in self.sections:
            if section.size % (section.parts * unit):
                raise ShapeError(
                    f"{what}: {section.size} features in {section.parts} parts do not end at blocks of {unit}",
                    hint="use a world size whose parts are whole blocks, or load the checkpoint dequantized",
                )
        return Cut(self.dim, tuple(Section(section.size // unit, section.parts) for section in self.sections))

    def part(self, whole: Tensor, rank: int, world_size: int) -> Tensor:
        """What ``rank`` holds of ``whole``, in contiguous memory of its own."""
        pieces, start = [], 0
        for section in self.sections:
            step = section.size // section.parts
            pieces.append(whole.detach().narrow(self.dim, start + rank * section.parts // world_size * step, step))
            start += section.size
        return torch.cat(pieces, self.dim) if len(pieces) > 1 else pieces[0].clone(memory_format=torch.contiguous_format)

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The tensor from every rank's part."""
        pieces, start = [], 0
        for section in self.sections:
            step, copies = section.size // section.parts, len(parts) // section.parts
            pieces += [part.narrow(self.dim, start, step) for part in parts[::copies]]
            start += step
        return torch.cat(pieces, self.dim)

    def shape(self, part: Tensor) -> list[int]:
        """Of the whole tensor that ``part`` is of."""
        return [self.size if dim == self.dim else size for dim, size in enumerate(part.shape)]


@dataclass(frozen=True)
class OnFirst:
    """A tensor that rank 0 has and the others have zeros for: a bias behind a row-parallel product inside other code."""

    def part(self, whole: Tensor, rank: int, world_size: int) -> Tensor:
        """What ``rank`` holds of ``whole``, in memory of its own."""
        return whole.detach().clone() if rank == 0 else torch.zeros_like(whole.detach())

    def whole(self, parts: list[Tensor]) -> Tensor:
        """The tensor from every rank's part."""
        return parts[0]

    def shape(self, part: Tensor) -> list[int]:
        """Of the whole tensor."""
        return [*part.shape]


_gathering = threading.local()


class Checkpoint:
    """What a cut module does with state dictionaries. ``cuts``: of its parameters, by name."""

    def __init__(self, module: nn.Module, comm: Communicator, cuts: Mapping[str, Cut | OnFirst]) -> None:
        self.comm, self.cuts = comm, cuts
        module.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(self._load)  # type: ignore[no-untyped-call]

    def _load(self, module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Cut what a whole checkpoint holds for this module. ``rest`` ends with PyTorch's list of error messages."""
        for name, cut in self.cuts.items():
            given = state.get(prefix + name)
            if not isinstance(given, Tensor):
                continue
            own = getattr(module, name)
            expected = cut.shape(own)
            if list(given.shape) != expected:
                rest[-1].append(
                    f"size mismatch for {prefix}{name}: {list(given.shape)} in the checkpoint, {expected} in the unsharded model"
                )
                state[prefix + name] = own  # without it, PyTorch would call the name missing as well
                continue
            state[prefix + name] = cut.part(given, self.comm.rank, self.comm.world_size).to(own.device)

    def whole(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What takes the place of the module's ``own`` tensors in a state dictionary, by name, on the CPU. Collective."""
        return {name: gathered(self.comm, self.cuts.get(name), tensor) for name, tensor in own.items()}


class Whole(Protocol):
    """What puts parts together: :class:`Cut`, :class:`OnFirst`."""

    def whole(self, parts: list[Tensor]) -> Tensor: ...


def gathered(comm: Communicator, cut: Whole | None, own: Tensor) -> Tensor:
    """The whole tensor, on the CPU, from every rank's part; ``None``: every rank has all of it. Collective where it is cut."""
    if cut is None or comm.world_size == 1:
        return own.detach().cpu()
    part = own.detach().contiguous()
    part = part.view(torch.uint8) if part.element_size() == 1 else part
    every = part.new_empty(comm.world_size, *part.shape)
    comm._group.all_gather(every, part)
    return cut.whole(list(every.cpu().unbind(0))).view(own.dtype)


def no_checkpoint(module: nn.Module, what: str) -> nn.Module:
    """Make state dictionaries of a quantized part an error, in and out: its tensors are not those of any checkpoint."""

    def refuse(*rest: Any) -> None:
        raise ArgumentError(
            f"state dictionaries of a quantized parallel model are not known where it has {what}",
            hint="keep the checkpoint that the model was loaded from; to load other weights, load them unsharded and parallelize again",
        )

    module.register_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    module.register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call]
    vars(module)["check_state"] = refuse
    return module


def check_first(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A hook before ``module`` loads a state: its parts check theirs (``check_state``), and where one raises nothing is loaded."""
    for name, part in module.named_modules():
        if check := vars(part).get("check_state"):
            check(state, f"{prefix}{name}.")


def _refuse(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not getattr(_gathering, "now", False):
        raise ArgumentError(
            "state_dict() of a parallel model: each rank holds a part of the weights",
            hint="call collogue.full_state_dict(model) on every rank, and pass what it returns, e.g. save_pretrained(path, state_dict=); "
            "an adapter's weights are loaded by load_state_dict(weights, strict=False), by the names that full_state_dict has",
        )


def save_pretrained(model: Any, directory: Any, is_main_process: bool = True, state_dict: Any = None, **rest: Any) -> None:
    """``save_pretrained`` of the model's class; where ``state_dict()`` raises, nothing is written, the configuration neither."""
    if state_dict is None:
        model.state_dict()
    type(model).save_pretrained(model, directory, is_main_process, state_dict, **rest)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dictionary of the unsharded model, from one that :func:`collogue.parallelize` has cut.

    Args:
        model: what ``parallelize`` returned, or a part of it.
    Returns:
        The names and shapes of the model before it was cut, on every rank, tensors on the CPU. What was never cut shares the model's
        memory where that is on the CPU. ``model.save_pretrained(path, state_dict=...)`` and ``load_state_dict`` of an unsharded model,
        or of one at another world size, take it. Quantized layers have the names and dtypes of their checkpoint; where ``quant=`` has
        quantized them, those of compressed-tensors, and of fine-grained FP8 for blocks.
    Synchronization:
        Collective: every rank calls it, also where only one saves.
    Raises:
        ArgumentError: ``model`` is not a module, or has quantized weights that were decoded, quantized experts, or scales that hold a
            factor of the model (Granite). CollectiveError.
    Examples:
        >>> names = set(model.state_dict())
        >>> whole = collogue.full_state_dict(collogue.parallelize(model, group, max_tokens=16))
        >>> set(whole) == names
        True
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"expected a module, got {type(model).__name__}", hint="pass the model that parallelize returned")
    _gathering.now = True
    try:
        state: dict[str, Tensor] = model.state_dict()
    finally:
        _gathering.now = False
    owners: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        owner, _, name = key.rpartition(".")
        owners.setdefault(owner, {})[name] = tensor
    for prefix, module in model.named_modules(remove_duplicate=False):  # one module may have several names
        checkpoint = getattr(module, "checkpoint", None)
        if isinstance(checkpoint, Checkpoint):
            owners[prefix] = checkpoint.whole(owners[prefix])
    whole = ((f"{owner}.{name}" if owner else name, tensor) for owner, own in owners.items() for name, tensor in own.items())
    return type(state)((key, tensor.cpu() if isinstance(tensor, Tensor) else tensor) for key, tensor in whole)
