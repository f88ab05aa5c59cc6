"""What stands in the place of a partial: this rank's term is computed in the kernel that sums it.

Plain data that checks itself when it is made, and knows nothing of devices or kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from collogue.contract.number import check_local, is_finite, is_number
from collogue.contract.spec import VALUE_DTYPES
from collogue.errors import ArgumentError, DTypeError, LayoutError, ScaleError, ShapeError

#: Most slots of a token, and most experts whose outputs lie one below the other.
MAX_TOP_K, MAX_EXPERTS = 16, 64

Kind = Literal["expert_combine", "expert_reduce", "gated"]
#: The dtype of the weights: none are given, the communicator's, or float32.
WeightKind = Literal["none", "value", "float32"]


@dataclass(frozen=True)
class PrologueForm:
    """What kernels are compiled for: a prologue without its tensors and numbers. ``prepare``, ``empty`` and ``explain`` take it too.

    ``weights``: ``"value"`` are of the communicator's dtype. ``shared``: a shared expert is given (of ``expert_reduce``, always).
    ``PrologueForm("gated", "none")`` has neither.

    Examples:
        >>> form = collogue.PrologueForm.parse("expert_combine/float32/shared")
        >>> print(form)
        expert_combine, float32 weights, shared expert
        >>> comm.prepare(4, prologue=form)
    """

    kind: Kind
    weights: WeightKind = "value"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.weights not in get_args(WeightKind):
            raise ArgumentError(
                f"unknown prologue {self.kind!r} with weights {self.weights!r}",
                hint='kinds are "expert_combine", "expert_reduce" and "gated", weights "none", "value" and "float32"',
            )
        if self.kind == "gated" and (self.weights != "none" or self.shared):
            raise ArgumentError("gated has neither weights nor a shared expert", hint='PrologueForm("gated", "none")')
        if self.kind == "expert_reduce" and (self.weights == "none" or not self.shared):
            raise ArgumentError("expert_reduce has weights and a token input", hint='PrologueForm("expert_reduce", "float32", shared=True)')

    @classmethod
    def parse(cls, label: str) -> PrologueForm:
        """The form of a kind and its options, each after a ``/``: ``"gated"``, ``"expert_combine/float32/shared"``, ``"expert_reduce"``.

        Without a word for the weights those are of the communicator's dtype. Raises :class:`ArgumentError` for words that are not known.
        """
        kind, *options = label.split("/")
        weights = [word for word in options if word in get_args(WeightKind)]
        if len(weights) > 1 or sorted(options) != sorted([*weights, *["shared"] * ("shared" in options)]):
            raise ArgumentError(
                f"unknown options of a prologue in {label!r}", hint='options are "none", "value" or "float32", and "shared", each after a /'
            )
        without: WeightKind = "none" if kind == "gated" else "value"
        return cls(kind, weights[0] if weights else without, "shared" in options or kind == "expert_reduce")  # type: ignore[arg-type]

    def __str__(self) -> str:
        """``expert_combine, float32 weights, shared expert``."""
        if self.kind == "gated":
            return self.kind
        weights = {"none": "no weights", "value": "weights", "float32": "float32 weights"}[self.weights]
        return ", ".join([self.kind, weights, *["shared expert"] * (self.shared and self.kind == "expert_combine")])


@dataclass(frozen=True, eq=False)
class ExpertCombine:
    """The term of a rank whose experts' outputs are still permuted: each token's rows are gathered, weighted and added in the kernel.

    ``a = +0; for k in order: a = a + float(expert_output[index[t, k]]) * float(weights[t, k]); a = a * scaling; a = a + shared_expert``

    Args:
        expert_output: ``[P, H]``, the communicator's dtype, row-contiguous, 16-byte aligned. P may be anything, 0 too. Rows that no index
            names are not read.
        index: ``[T, K]`` int32, contiguous, K from 1 to 16: the row of each slot. -1: no contribution (the expert is another rank's). So is
            every other value outside of ``[0, P)``: nothing outside of the tensor is ever read. With ``COLLOGUE_DEBUG`` set such a value
            is an :class:`IndexRangeError`. Several slots may name one row.
        weights: ``[T, K]``, the communicator's dtype or float32, contiguous; ``None``: 1.
        shared_expert: ``[T, H]``, the communicator's dtype: this rank's partial of it, added last.
        scaling: multiplies the sum over k once, before the shared expert is added. Rounded to float32.
    Order and rounding:
        Each operation is rounded to float32, and the term once to the communicator's dtype; -0 becomes +0. From there on it is a row of
        ``partial``. Without scaling, or with 1, nothing is multiplied.
    Synchronization:
        All tensors are read with the inputs: the preceding kernel may have written them. Ranks agree about K; P, the weights' dtype, the
        shared expert and scaling are each rank's own, as the values of a partial are.
    Raises:
        ShapeError, DTypeError, LayoutError, ScaleError, ArgumentError.
    Examples:
        >>> expert_output = torch.ones(6, 64).bfloat16()  # rows of this rank's experts
        >>> index = torch.tensor([[0, 1], [2, 3], [4, 5], [0, -1]], dtype=torch.int32)  # -1: on another rank
        >>> term = collogue.ExpertCombine(expert_output, index, torch.ones(4, 2))
        >>> comm.all_reduce(term, residual=residual).residual[:, 0]
        tensor([2., 2., 2., 1.], dtype=torch.bfloat16)
    """

    expert_output: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor | None = None
    shared_expert: torch.Tensor | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        _check_values("ExpertCombine.expert_output", self.expert_output, "[P, H]", "give the experts' rows, H columns each")
        index = self.index
        if not isinstance(index, torch.Tensor) or index.ndim != 2:
            raise ShapeError(f"ExpertCombine.index must be a tensor of shape [T, K], got {_shown(index)}", hint="one row for each token")
        if index.dtype != torch.int32:
            raise DTypeError(f"ExpertCombine.index has dtype {index.dtype}; expected torch.int32", hint="pass index.int()")
        check_local("ExpertCombine.index", index)
        tokens, slots = index.shape
        if not 1 <= slots <= MAX_TOP_K:
            raise ShapeError(f"ExpertCombine.index has {slots} slots for each token", hint=f"K is 1 to {MAX_TOP_K}")
        if self.weights is not None:
            _check_weights("ExpertCombine.weights", self.weights, (tokens, slots), self.expert_output.dtype, "index")
        if self.shared_expert is not None:
            _check_shared(
                "ExpertCombine.shared_expert", self.shared_expert, (tokens, self.expert_output.shape[1]), self.expert_output.dtype
            )
        if not is_number(self.scaling) or not is_finite(self.scaling):
            raise ScaleError(
                f"ExpertCombine.scaling is {self.scaling!r}; expected a number that is finite in float32",
                hint="pass a Python number, such as a routed_scaling_factor",
            )

    @property
    def main(self) -> torch.Tensor:
        """What says the dtype, and stands in the place of a partial among an operator's arguments."""
        return self.expert_output

    @property
    def tokens(self) -> int:
        """T."""
        return self.index.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.expert_output.shape[1]

    @property
    def count(self) -> int:
        """K."""
        return self.index.shape[1]

    @property
    def form(self) -> PrologueForm:
        """What it has in common with all prologues that one kernel does."""
        return PrologueForm("expert_combine", _weight_kind(self.weights, self.expert_output), self.shared_expert is not None)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by name."""
        for name in ("expert_output", "index", "weights", "shared_expert"):
            tensor = getattr(self, name)
            if tensor is not None:
                yield f"ExpertCombine.{name}", tensor

    def rows(self, start: int, stop: int) -> ExpertCombine:
        """The terms of tokens ``start`` to ``stop - 1``."""
        weights, shared = self.weights, self.shared_expert
        return ExpertCombine(
            self.expert_output,
            self.index[start:stop],
            None if weights is None else weights[start:stop],
            None if shared is None else shared[start:stop],
            self.scaling,
        )


@dataclass(frozen=True, eq=False)
class ExpertReduce:
    """The term of a rank on which every local expert has seen every token (small batches): the experts' rows are weighted and added.

    ``a = +0; for e in order: a = a + float(expert_output[e, t]) * float(weights[e, t]); a = a + token_input[t]``

    Args:
        expert_output: ``[E, T, H]``, the communicator's dtype, contiguous, 16-byte aligned; E from 1 to 64.
        weights: ``[E, T]``, the communicator's dtype or float32, contiguous. An expert whose weight is 0 is skipped: its row is not read.
        token_input: ``[T, H]``, the communicator's dtype: this rank's further term (a shared expert), added last.
    Order and rounding:
        As :class:`ExpertCombine`.
    Synchronization:
        As :class:`ExpertCombine`; E is each rank's own.
    Raises:
        ShapeError, DTypeError, LayoutError.
    Examples:
        >>> expert_output = torch.ones(2, 4, 64).bfloat16()  # two experts, four tokens
        >>> term = collogue.ExpertReduce(expert_output, torch.ones(2, 4), token_input=torch.zeros(4, 64).bfloat16())
        >>> comm.all_reduce(term, residual=residual).residual[:, 0]
        tensor([2., 2., 2., 2.], dtype=torch.bfloat16)
    """

    expert_output: torch.Tensor
    weights: torch.Tensor
    token_input: torch.Tensor

    def __post_init__(self) -> None:
        _check_values("ExpertReduce.expert_output", self.expert_output, "[E, T, H]", "give the experts' rows, H columns each")
        experts, tokens, hidden_size = self.expert_output.shape
        if not 1 <= experts <= MAX_EXPERTS:
            raise ShapeError(f"ExpertReduce.expert_output has {experts} experts", hint=f"E is 1 to {MAX_EXPERTS}")
        _check_weights("ExpertReduce.weights", self.weights, (experts, tokens), self.expert_output.dtype, "expert_output")
        _check_shared("ExpertReduce.token_input", self.token_input, (tokens, hidden_size), self.expert_output.dtype)

    @property
    def main(self) -> torch.Tensor:
        """What says the dtype, and stands in the place of a partial among an operator's arguments."""
        return self.expert_output

    @property
    def tokens(self) -> int:
        """T."""
        return self.expert_output.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.expert_output.shape[2]

    @property
    def count(self) -> int:
        """E."""
        return self.expert_output.shape[0]

    @property
    def form(self) -> PrologueForm:
        """What it has in common with all prologues that one kernel does."""
        return PrologueForm("expert_reduce", _weight_kind(self.weights, self.expert_output), shared=True)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by name."""
        for name in ("expert_output", "weights", "token_input"):
            yield f"ExpertReduce.{name}", getattr(self, name)

    def rows(self, start: int, stop: int) -> ExpertReduce:
        """The terms of tokens ``start`` to ``stop - 1``."""
        return ExpertReduce(
            self.expert_output[:, start:stop].contiguous(), self.weights[:, start:stop].contiguous(), self.token_input[start:stop]
        )


@dataclass(frozen=True, eq=False)
class Gated:
    """A gated unit (SwiGLU), computed in the kernel that uses it: what an MLP gives its last layer.

    ``round_D(silu(gate) * up)``, ``silu(g) = g / (1 + e(-g))``. :meth:`collogue.Communicator.finish` quantizes it, without a sum;
    :func:`collogue.nn.gated` needs no communicator.

    Args:
        gate: ``[T, H]``, the communicator's dtype, 16-byte aligned. The elements of a row lie beside each other; rows may lie further
            apart, by a multiple of 8 elements.
        up: the same, with the strides of ``gate``. :meth:`of` takes both from one tensor.
    Order and rounding:
        ``e`` is the exponential by a fixed polynomial, each operation rounded to float32 (docs/contract.md gives every constant). It is
        within 1.2 units in the last place, and silu within 2.5, down to ``g = -88``; below, silu is 0. The product is rounded once to
        the communicator's dtype; -0 becomes +0. NaN stays NaN.
    Synchronization:
        Both are read with the inputs: the preceding kernel may have written them.
    Raises:
        ShapeError, DTypeError, LayoutError.
    Examples:
        >>> gate_up = torch.ones(4, 128).bfloat16()
        >>> comm.finish(collogue.Gated.of(gate_up), quant=collogue.FP8PerToken())
        Output(codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
    """

    gate: torch.Tensor
    up: torch.Tensor

    def __post_init__(self) -> None:
        _check_values("Gated.gate", self.gate, "[T, H]", "give the gate's rows, H columns each")
        _check_values("Gated.up", self.up, "[T, H]", "give the rows that the gate multiplies")
        if self.up.shape != self.gate.shape:
            raise ShapeError(
                f"Gated.up has shape {_shown(self.up)}, Gated.gate {_shown(self.gate)}", hint="give one element of up for each of gate"
            )
        if self.up.dtype != self.gate.dtype:
            raise DTypeError(f"Gated.up has dtype {self.up.dtype}, Gated.gate {self.gate.dtype}", hint=f"pass up.to({self.gate.dtype})")
        if self.tokens == 0 or self.hidden_size == 0:
            return
        for name, tensor in self.tensors():
            if tensor.stride(1) != 1:
                raise LayoutError(f"{name} has strides {tensor.stride()}; expected (S, 1)", hint=f"pass {name}.contiguous()")
        if self.tokens > 1 and self.up.stride(0) != self.gate.stride(0):
            raise LayoutError(
                f"rows of Gated.gate lie {self.gate.stride(0)} elements apart, of Gated.up {self.up.stride(0)}",
                hint="pass both contiguous, or both halves of one tensor: Gated.of(gate_up)",
            )

    @classmethod
    def of(cls, gate_up: torch.Tensor) -> Gated:
        """Of one tensor ``[T, 2 H]``: the gate's columns first. Nothing is copied."""
        if not isinstance(gate_up, torch.Tensor) or gate_up.ndim != 2 or gate_up.shape[1] % 2:
            raise ShapeError(f"gate_up must be a tensor of shape [T, 2 H], got {_shown(gate_up)}", hint="the gate's columns come first")
        return cls(*gate_up.chunk(2, dim=1))

    @property
    def main(self) -> torch.Tensor:
        """What says the dtype, and stands in the place of a partial among an operator's arguments."""
        return self.gate

    @property
    def tokens(self) -> int:
        """T."""
        return self.gate.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.gate.shape[1]

    @property
    def row_stride(self) -> int:
        """Elements from one row to the next, of both tensors."""
        return self.gate.stride(0) if self.tokens > 1 else self.hidden_size

    @property
    def form(self) -> PrologueForm:
        """What it has in common with all prologues that one kernel does."""
        return PrologueForm("gated", "none")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, by name."""
        yield from (("Gated.gate", self.gate), ("Gated.up", self.up))

    def rows(self, start: int, stop: int) -> Gated:
        """The terms of tokens ``start`` to ``stop - 1``."""
        return Gated(self.gate[start:stop], self.up[start:stop])


Prologue: TypeAlias = ExpertCombine | ExpertReduce | Gated
#: For ``isinstance``.
PROLOGUES = (ExpertCombine, ExpertReduce, Gated)


def form_of(prologue: Prologue | PrologueForm | None) -> PrologueForm | None:
    """The form of what ``prepare``, ``empty`` and ``explain`` take as ``prologue=``. Raises :class:`ArgumentError` for anything else."""
    if prologue is None or isinstance(prologue, PrologueForm):
        return prologue
    if not isinstance(prologue, PROLOGUES):
        raise ArgumentError(
            f"prologue is a {type(prologue).__name__}; expected ExpertCombine, ExpertReduce, Gated or PrologueForm",
            hint='pass collogue.PrologueForm("expert_combine", weights="float32", shared=True), or what the call itself will take',
        )
    return prologue.form


def _shown(tensor: object) -> str:
    return str(list(tensor.shape)) if isinstance(tensor, torch.Tensor) else type(tensor).__name__


def _check_values(name: str, tensor: torch.Tensor, shape: str, hint: str) -> None:
    check_local(name, tensor)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != shape.count(",") + 1:
        raise ShapeError(f"{name} must be a tensor of shape {shape}, got {_shown(tensor)}", hint=hint)
    if tensor.dtype not in VALUE_DTYPES:
        raise DTypeError(f"{name} has dtype {tensor.dtype}", hint="pass bfloat16, float16 or float32; to a communicator, its dtype")


def _check_weights(name: str, weights: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype, like: str) -> None:
    check_local(name, weights)
    if not isinstance(weights, torch.Tensor) or tuple(weights.shape) != shape:
        raise ShapeError(f"{name} has shape {_shown(weights)}; expected {list(shape)}", hint=f"one weight for each entry of {like}")
    if weights.dtype not in (dtype, torch.float32):
        raise DTypeError(
            f"{name} has dtype {weights.dtype}; expected {dtype} or torch.float32", hint=f"pass weights.to({dtype}) or weights.float()"
        )
    if not weights.is_contiguous():
        raise LayoutError(f"{name} has strides {weights.stride()}, not contiguous", hint="pass weights.contiguous()")


def _check_shared(name: str, tensor: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_local(name, tensor)
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
        raise ShapeError(f"{name} has shape {_shown(tensor)}; expected {list(shape)}", hint="give one row of H elements for each token")
    if tensor.dtype != dtype:
        raise DTypeError(f"{name} has dtype {tensor.dtype}, the experts' output {dtype}", hint=f"pass it as {dtype}")


def _weight_kind(weights: torch.Tensor | None, values: torch.Tensor) -> WeightKind:
    return "none" if weights is None else "value" if weights.dtype == values.dtype else "float32"
