"""A sum over ranks that is taken when it is needed: the tensor that stands for it until then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


def _uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


#: What :func:`_uses` counts for a tensor that shares its memory with no other.
_ALONE = _uses(torch.empty(1))


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether no other tensor (a buffer that is used again, say) has this memory: then nothing writes it until it is read."""
    return type(tensor) is Tensor and _uses(tensor) == _ALONE


@dataclass(eq=False)
class _Source:
    """What all names of one sum share."""

    term: Tensor
    reduce: Callable[[Tensor], Tensor]
    sum: Tensor | None = None


class Deferred(Tensor):
    """This rank's term of a sum that is not taken yet, in the place of the sum. It has the sum's shape, dtype and device.

    It has no memory. Every operator that gets it (also from C++, in place, or as ``out=``) gets the sum instead, which is taken by
    ``reduce`` at that moment; code that goes past PyTorch's operators to the memory finds none and fails. So nothing can read the
    term for the sum. A fused call takes :attr:`term` and never takes the sum; where it makes the sum by the way, it keeps it here.

    Synchronization:
        Taking the sum is collective: like all of a model's code, it happens on every rank in the same place.
    """

    _source: _Source

    @staticmethod
    def __new__(cls, term: Tensor, reduce: Callable[[Tensor], Tensor]) -> Deferred:
        return cls._of(_Source(term, reduce))

    def __init__(self, term: Tensor, reduce: Callable[[Tensor], Tensor]) -> None: ...

    @classmethod
    def _of(cls, source: _Source) -> Deferred:
        term = source.term
        made: Deferred = torch.Tensor._make_wrapper_subclass(
            cls, term.shape, strides=term.stride(), dtype=term.dtype, device=term.device, requires_grad=False
        )
        torch._C._set_throw_on_mutable_data_ptr(made)
        made._source = source
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def term(self) -> Tensor:
        """What this rank adds."""
        return self._source.term

    @property
    def pending(self) -> bool:
        """Whether the sum has not been taken."""
        return self._source.sum is None

    def keep(self, summed: Tensor) -> None:
        """``summed`` is the sum: something has taken it by the way."""
        self._source.sum = summed

    def sum_now(self) -> Tensor:
        """The sum, taken now if it has not been."""
        source = self._source
        if source.sum is None:
            source.sum = source.reduce(source.term)
        return source.sum

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Deferred) and _changes_nothing(func, first, args):
            return cls._of(first._source)
        given = func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))
        if func._schema.is_mutable:
            for each in (*args, *(kwargs or {}).values()):
                if isinstance(each, Deferred) and _form(each.sum_now()) != _form(each):
                    raise RuntimeError(f"{func} has changed the shape of a deferred sum in place; set the engine's switch of Collogue to 0")
        return given

    # What Python code reads past the operators.
    def data_ptr(self) -> int:
        return self.sum_now().data_ptr()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.sum_now().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.sum_now().tolist()

    def untyped_storage(self) -> Any:
        return self.sum_now().untyped_storage()

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sum_now().__array__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.sum_now().__dlpack__(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        return self.sum_now().__deepcopy__(memo)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.sum_now().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Reads nothing: a log line on one rank alone must not wait for the others."""
        return f"Deferred({list(self.shape)}, {self.dtype}, {'not yet taken' if self.pending else 'taken'})"


def _plain(value: Any) -> Any:
    return value.sum_now() if isinstance(value, Deferred) else value


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _changes_nothing(func: Any, first: Deferred, args: tuple[Any, ...]) -> bool:
    """Whether the operator is a view of the whole as it is: engines write them where another model's shape needs one."""
    if func is aten.view.dtype:
        return bool(args[1] == first.dtype)
    if func in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        asked, own = list(args[1]), list(first.shape)
        return len(asked) == len(own) and all(a in (o, -1) for a, o in zip(asked, own, strict=True))
    return False
