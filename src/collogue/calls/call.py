"""One call, checked: what the user gave, and that it can be right. Nothing here launches anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd import forward_ad

from collogue.calls.capacity import Capacity, check_hidden_size, check_kinds, check_norm_kind, raise_capacity
from collogue.calls.product import ScaledProduct
from collogue.calls.request import Signature, make_request
from collogue.calls.terms import Terms
from collogue.contract.number import check_local
from collogue.contract.prologue import PROLOGUES, ExpertCombine, Gated, Prologue
from collogue.contract.quant import Quant
from collogue.contract.spec import OWNING, Operation, Output, RMSNorm, Wanted, check_split, owned_rows
from collogue.errors import ArgumentError, DeviceError, DTypeError, GradError, IndexRangeError, LayoutError, ShapeError

#: Bytes to which rows and tensors must be aligned: kernels move 16 bytes at a time.
ALIGNMENT = 16


@dataclass(slots=True, eq=False)
class Call:
    """The arguments of one call, as the user gave them. :func:`check_call` checks them and sets ``signature``.

    ``partial``: this rank's term [T, H], or what it is computed from, or, in a step of the host path, all terms; of ``finish``, y; of
    ``all_gather``, a tensor without memory (meta) that only says the shape and dtype of gathered values. ``shard``: what is gathered.
    ``rows``: how many each rank owns, as :func:`.spec.as_rows` returns them. ``write_padding``: of the scales; without it ``out=`` has
    what an earlier call has written there. A new argument of a call is a field here and a field of :class:`Request`.
    """

    partial: torch.Tensor | Prologue | Terms | ScaledProduct
    residual: torch.Tensor | None = None
    norm: RMSNorm | None = None
    quant: Quant | None = None
    keep_norm: bool = False
    operation: Operation = "all_reduce"
    shard: Output | None = None
    branch_norm: RMSNorm | None = None
    rows: tuple[int, ...] | None = None
    write_padding: bool = True
    signature: Signature = None  # type: ignore[assignment]  # set by check_call

    @property
    def tokens(self) -> int:
        """T: the rows of the whole, on every rank."""
        return self.signature.request.tokens

    @property
    def hidden_size(self) -> int:
        return self.signature.request.hidden_size

    @property
    def wanted(self) -> Wanted:
        return self.signature.request.wanted

    @property
    def owned(self) -> range | None:
        """Which of the T rows this rank owns, where it gives or gets a shard."""
        return self.signature.owned

    @property
    def bindable(self) -> bool:
        """Whether the next call like it may take the short way (``gpu/bound.py``), which knows the arguments of most calls only."""
        return self.shard is None and self.branch_norm is None and isinstance(self.partial, (torch.Tensor, Gated))

    def wants(self) -> Wanted:
        """Which outputs the call has, of a call that has not been checked. Raises :class:`ArgumentError` where there would be none."""
        if self.shard is not None:
            return Wanted.held(self.shard)
        return Wanted.of(
            has_residual=self.residual is not None,
            has_norm=self.norm is not None,
            quant=self.quant,
            keep_norm=self.keep_norm,
            operation=self.operation,
        )

    def inputs(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor that the call reads, by name."""
        if self.shard is not None:
            yield from ((f"shard.{name}", tensor) for name, tensor in self.shard.items())
            return
        if isinstance(self.partial, (*PROLOGUES, Terms, ScaledProduct)):
            yield from self.partial.tensors()
        else:
            yield "partial" if self.operation != "finish" else "y", self.partial
        if self.residual is not None:
            yield "residual", self.residual
        if self.norm is not None:
            yield "RMSNorm.weight", self.norm.weight
        if self.branch_norm is not None:
            yield "branch_norm.weight", self.branch_norm.weight
        if self.quant is not None and isinstance(self.quant.given_scale, torch.Tensor):
            yield "the scale", self.quant.given_scale


def check_call(capacity: Capacity, call: Call) -> Call:
    """Check a call, other than an ``all_gather``, against ``capacity`` and its arguments against each other; sets its signature.

    Raises :class:`ArgumentError` (its subclasses). The first thing that is wrong is the error.
    """
    partial, residual, norm, quant = call.partial, call.residual, call.norm, call.quant
    assert not isinstance(partial, Terms | ScaledProduct)
    if not isinstance(call.keep_norm, bool):
        raise ArgumentError(f"keep_norm is {call.keep_norm!r}; expected True or False", hint="pass keep_norm=True to also get the norm")
    name = "partial" if call.operation != "finish" else "y"
    if isinstance(partial, PROLOGUES):
        tokens, hidden_size = _check_prologue(partial, call.operation, capacity)
        name = type(partial).__name__
    else:
        check_values(name, partial, capacity)
        tokens, hidden_size = partial.shape
    if not capacity.holds(call.operation, tokens, hidden_size):
        raise_capacity(name, tokens, hidden_size, capacity)
    check_hidden_size(hidden_size)
    check_split(call.operation, tokens, call.rows)  # before the residual's shape, which follows from them
    if residual is not None:
        check_values("residual", residual, capacity)
        _check_residual(residual, name, (tokens, hidden_size), capacity, call)
    check_kinds(norm, quant)
    branch = call.branch_norm
    check_norm_kind("branch_norm", branch)
    for norm_name, each in (("RMSNorm", norm), ("branch_norm", branch)):
        if each is not None:
            _check_norm(norm_name, each, hidden_size, capacity)
    if quant is not None:
        _check_quant(quant, hidden_size, capacity)
    if torch.is_grad_enabled():
        terms = partial.tensors() if isinstance(partial, PROLOGUES) else ((name, partial),)
        check_no_grad(*terms, ("residual", residual), ("RMSNorm.weight", None if norm is None else norm.weight))
        check_no_grad(("branch_norm.weight", None if branch is None else branch.weight))
    request = make_request(
        tokens,
        hidden_size,
        capacity.dtype,
        residual=residual is not None,
        norm=norm is not None,
        wide_weight=norm is not None and norm.weight.dtype != capacity.dtype,
        quant=quant,
        keep_norm=call.keep_norm,
        operation=call.operation,
        late_weight=norm is not None and not norm.prefetch,
        prologue=partial.form if isinstance(partial, PROLOGUES) else None,
        branch=branch is not None,
        wide_branch=branch is not None and branch.weight.dtype != capacity.dtype,
        rows=call.rows,
        write_padding=call.write_padding,
    )
    call.signature = capacity.signature(request)
    return call


def check_alone(y: torch.Tensor | Gated, quant: Quant | None) -> None:
    """Check a call without a communicator as far as the reference does not: raises as :func:`collogue.quantize` says."""
    check_kinds(None, quant)
    named = [("n", y)] if isinstance(y, torch.Tensor) else list(y.tensors())
    first, main = named[0]
    for name, tensor in named:
        check_ordinary(name, tensor)
        if tensor.device != main.device:
            raise DeviceError(f"{name} is on {tensor.device}, {first} on {main.device}", hint=f"move it: {name}.to('{main.device}')")
    if torch.is_grad_enabled():
        check_no_grad(*named)


def _check_prologue(given: Prologue, operation: Operation, capacity: Capacity) -> tuple[int, int]:
    """T and H. What fits what inside of a prologue it has checked itself."""
    name = type(given).__name__
    if operation == "finish" and not isinstance(given, Gated):
        raise ArgumentError(f"y is a collogue.{name}, and finish sums nothing", hint="pass it to all_reduce or reduce_scatter")
    for each, tensor in given.tensors():
        check_ordinary(each, tensor)
        (check_device if isinstance(given, Gated) else check_rows)(each, tensor, capacity.device)
        if each.rpartition(".")[2] not in ("index", "weights"):
            check_alignment(each, tensor)
    if isinstance(given, Gated) and given.row_stride % 8 and given.hidden_size % 8 == 0:
        raise LayoutError(
            f"rows of {name}.gate and {name}.up lie {given.row_stride} elements apart, not a multiple of 8", hint="pass both contiguous"
        )
    if given.main.dtype != capacity.dtype:
        raise DTypeError(
            f"{next(given.tensors())[0]} has dtype {given.main.dtype}; the communicator was made for {capacity.dtype}",
            hint="make one communicator per dtype, or convert the tensors",
        )
    return given.tokens, given.hidden_size


def check_indices(given: torch.Tensor | Prologue | Terms | ScaledProduct) -> None:
    """Raise :class:`IndexRangeError` where an index is neither -1 nor a row. Waits for the device: for ``COLLOGUE_DEBUG``."""
    if not isinstance(given, ExpertCombine) or not given.index.numel():
        return
    least, most = (int(value) for value in given.index.aminmax())
    rows = len(given.expert_output)
    if least < -1 or most >= rows:
        raise IndexRangeError(
            f"ExpertCombine.index holds {least if least < -1 else most}; expert_output has {rows} rows",
            hint="indices are rows of expert_output, or -1; without COLLOGUE_DEBUG such a slot contributes nothing",
        )


def _check_residual(residual: torch.Tensor, name: str, shape: tuple[int, int], capacity: Capacity, call: Call) -> None:
    tokens, hidden_size = shape
    if call.operation in OWNING:
        rows = owned_rows(tokens, capacity.world_size, capacity.rank, call.rows)
        if residual.shape != (len(rows), hidden_size):
            raise ShapeError(
                f"residual has shape {list(residual.shape)}; rank {capacity.rank} of {capacity.world_size} owns {len(rows)} rows of "
                f"{name} {list(shape)}",
                hint=f"give the rows that this rank owns: comm.shard(residual{', rows=rows' * (call.rows is not None)})",
            )
    elif residual.shape != shape:
        raise ShapeError(
            f"residual has shape {list(residual.shape)}, {name} {list(shape)}",
            hint="give the residual rows of the same tokens as the partial",
        )


def check_values(name: str, tensor: torch.Tensor, capacity: Capacity) -> None:
    """Raise unless ``tensor`` is ``[T, H]`` in the communicator's dtype, on its device, row-contiguous and aligned."""
    if isinstance(tensor, torch.Tensor):
        check_ordinary(name, tensor)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 2:
        shape = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ShapeError(f"{name} must be a tensor of shape [T, H], got {shape}", hint="flatten leading dimensions: x.view(-1, H)")
    if tensor.dtype != capacity.dtype:
        raise DTypeError(
            f"{name} has dtype {tensor.dtype}; the communicator was made for {capacity.dtype}",
            hint="make one communicator per dtype, or convert the tensor",
        )
    check_memory(name, tensor, capacity.device)


def check_memory(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` lies on ``device``, row-contiguous and aligned."""
    check_ordinary(name, tensor)
    check_rows(name, tensor, device)
    check_alignment(name, tensor)


def check_rows(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless ``tensor`` lies on ``device``, row-contiguous."""
    check_device(name, tensor, device)
    if not tensor.is_contiguous():
        raise LayoutError(f"{name} has strides {tensor.stride()}, not row-contiguous", hint=f"pass {name}.contiguous()")


def check_ordinary(name: str, tensor: torch.Tensor) -> None:
    """Raise unless ``tensor`` is its memory: strided, and no wrapper whose values lie elsewhere or are yet to be computed."""
    check_local(name, tensor)
    kind = type(tensor)
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        raise ArgumentError(
            f"{name} is a {kind.__name__}, which is a wrapper around other tensors", hint="pass an ordinary tensor that holds the values"
        )
    if torch._C._functorch.maybe_current_level() is not None:
        raise ArgumentError(f"{name} is inside torch.func.vmap, jvp or grad", hint="make the call outside of the transform")
    if torch._C._get_tracing_state() is not None:
        raise ArgumentError(f"{name} is traced by torch.jit.trace", hint="use torch.compile or torch.export, which know collogue's calls")
    if tensor.is_nested:
        raise LayoutError(f"{name} is a nested tensor", hint=f"pass {name}.values(), or rows of one length")
    if tensor.layout is not torch.strided:
        raise LayoutError(f"{name} has layout {tensor.layout}; expected: torch.strided", hint=f"pass {name}.to_dense()")
    if tensor.is_neg():
        raise LayoutError(f"{name} is a lazy negation: its memory holds the opposite sign", hint=f"pass {name}.resolve_neg()")


def check_device(name: str, tensor: torch.Tensor, device: torch.device, whose: str = "the communicator") -> None:
    """Raise :class:`DeviceError` unless ``tensor`` is on ``device``, which is that of ``whose``."""
    if tensor.device != device:
        raise DeviceError(f"{name} is on {tensor.device}, {whose} on {device}", hint=f"move it: {name}.to('{device}')")


def check_alignment(name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`LayoutError` unless ``tensor`` has memory, and starts where kernels can read and write."""
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise LayoutError(f"{name} has no memory: its storage was freed", hint="make the call before untyped_storage().resize_(0)")
    if address % ALIGNMENT:
        raise LayoutError(
            f"{name} starts at an address that is not a multiple of {ALIGNMENT} bytes", hint=f"pass {name}.clone(), or slice at a row"
        )


def _check_norm(name: str, norm: RMSNorm, hidden_size: int, capacity: Capacity) -> None:
    if norm.weight.shape[0] != hidden_size:
        raise ShapeError(
            f"{name}.weight has {norm.weight.shape[0]} elements, the hidden size is {hidden_size}",
            hint="pass the weight of the norm that follows this projection",
        )
    if norm.weight.dtype not in (capacity.dtype, torch.float32):
        raise DTypeError(
            f"{name}.weight has dtype {norm.weight.dtype}, the communicator {capacity.dtype}",
            hint=f"convert the weight to {capacity.dtype} or torch.float32",
        )
    check_memory(f"{name}.weight", norm.weight, capacity.device)


def _check_quant(quant: Quant, hidden_size: int, capacity: Capacity) -> None:
    scale = quant.given_scale
    quant.check_hidden_size(hidden_size)
    if isinstance(scale, torch.Tensor):
        check_ordinary(f"the scale of {quant.name}", scale)
        if scale.device != capacity.device:
            raise DeviceError(
                f"the scale of {quant.name} is on {scale.device}, the communicator on {capacity.device}",
                hint="pass a Python float, or move the tensor once when the model is loaded",
            )


def check_no_grad(*named: tuple[str, torch.Tensor | None]) -> None:
    """Raise :class:`GradError` for the first tensor that requires grad. For grad mode only."""
    for name, tensor in named:
        if tensor is None:
            continue
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise GradError(f"{name} has a forward-mode tangent", hint="Collogue has no derivatives: unpack it first")
        if tensor.requires_grad:
            raise GradError(f"{name} requires grad", hint="call under torch.inference_mode() or torch.no_grad()")
