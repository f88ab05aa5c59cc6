"""Calls of one GPU without a group: rows that are finished where they lie, by the kernel of a world of one (kernels/local.cuh).

They share no memory, so calls on several streams need no order, and any thread may make them: each thread has an engine of its own for
every GPU and dtype, made by its first call. What takes time to find, facts of the GPU and loaded kernels, all threads share.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from collogue.calls.call import ALIGNMENT, Call, check_alone, check_call
from collogue.calls.capacity import Capacity
from collogue.calls.product import ScaledProduct
from collogue.calls.request import make_request
from collogue.contract import reference
from collogue.contract.prologue import Gated
from collogue.contract.quant import FAMILIES, Quant
from collogue.contract.spec import VALUE_DTYPES, Operation, Output
from collogue.errors import NotPrepared
from collogue.gpu.engine import KernelEngine, Nobody
from collogue.gpu.order import AnyOrder
from collogue.planning.plan import MAX_HIDDEN_SIZE, MAX_HIDDEN_SIZE_OF_A_CTA
from collogue.planning.topology import Topology, alone
from collogue.planning.variant import QuantVariant, Variant

#: Rows of one call: kernels count them in 32 bits.
MOST_ROWS = (1 << 31) - 1
_HINT = "make such a call once before the capture"


class Alone(KernelEngine):
    """Of one thread. ``kernels`` that have been loaded are those of all threads, and so is ``one``: a scale of a tensor."""

    how_to_load = _HINT

    def __init__(self, capacity: Capacity, topology: Topology, kernels: dict[Variant, Any], one: torch.Tensor) -> None:
        super().__init__(Nobody(capacity.device), topology, 1.0)
        self._order, self._kernels, self.capacity, self.one = AnyOrder(), kernels, capacity, one

    def takes(self, hidden_size: int, quant: Quant | None) -> bool:
        """Whether there is a kernel for rows of this width."""
        one_cta = not self.topology.has_clusters or QuantVariant.of(quant).needs_one_cta
        return hidden_size % 8 == 0 and 0 < hidden_size <= (MAX_HIDDEN_SIZE_OF_A_CTA if one_cta else MAX_HIDDEN_SIZE)

    def finish(self, y: torch.Tensor | Gated, quant: Quant | None) -> Output | None:
        """Codes and scales, or values as ``reduced``; ``None`` where there is no kernel for such rows."""
        # Without a format the values are the result: the sum of a world of one.
        operation: Operation = "all_reduce" if quant is None else "finish"
        done = self.latest(operation, y, None, None, quant, False, None)
        done = self.quick(Call(y, quant=quant, operation=operation), None) if done is None else done
        if done is not None or not self.takes(y.hidden_size if isinstance(y, Gated) else y.shape[1], quant):
            return done
        check_alone(y, quant)
        return self.run(check_call(self.capacity, Call(_usable(y), quant=quant, operation=operation)), None)

    def scale(self, given: ScaledProduct) -> torch.Tensor:
        """``given.values()``, by one kernel: rows of a width that :meth:`takes`."""
        bias = None if given.bias is None else _aligned(given.bias)
        given = ScaledProduct(given.product, given.rows.contiguous(), _aligned(given.columns), bias, given.dtype)
        plain: dict[str, Any] = {"residual": False, "norm": False, "wide_weight": False, "quant": None, "keep_norm": False}
        request = make_request(given.tokens, given.hidden_size, given.dtype, operation="all_reduce", prologue=given.form, **plain)
        out = self.run(Call(given, signature=self.capacity.signature(request)), None)
        assert out.reduced is not None
        return out.reduced


def _usable(y: torch.Tensor | Gated) -> torch.Tensor | Gated:
    """The same where kernels can read it."""
    if isinstance(y, torch.Tensor):
        return _aligned(y.detach())
    gate, up = (_aligned(tensor.detach(), rows_apart=True) for tensor in (y.gate, y.up))
    return Gated(gate, up) if y.tokens == 1 or gate.stride() == up.stride() else Gated(gate.contiguous(), up.contiguous())


def _aligned(tensor: torch.Tensor, *, rows_apart: bool = False) -> torch.Tensor:
    usable = tensor.is_contiguous() or (rows_apart and tensor.stride(0) % 8 == 0)
    return tensor if usable and tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone(memory_format=torch.contiguous_format)


class _Engines(threading.local):
    """This thread's, by GPU and dtype."""

    def __init__(self) -> None:
        self.by_kind: dict[tuple[torch.device, torch.dtype], Alone] = {}


_engines = _Engines()
_MAKING = threading.Lock()
_shared: dict[tuple[torch.device, torch.dtype], tuple[Topology, dict[Variant, Any], torch.Tensor]] = {}


def engine_of(device: torch.device, dtype: torch.dtype) -> Alone:
    """This thread's engine. Raises :class:`NotPrepared` under graph capture where no thread has made a call of this GPU and dtype."""
    found = _engines.by_kind.get((device, dtype))
    if found is None:
        capacity = Capacity(MOST_ROWS, MAX_HIDDEN_SIZE, dtype, device)
        with _MAKING:
            if (device, dtype) not in _shared:
                if torch.cuda.is_current_stream_capturing():
                    raise NotPrepared(f"no rows of {dtype} have been quantized on {device}, and a CUDA graph is being captured", hint=_HINT)
                with torch.inference_mode(False):
                    one = torch.ones(1, device=device)
                _shared[device, dtype] = alone(capacity), {}, one
            found = _engines.by_kind[device, dtype] = Alone(capacity, *_shared[device, dtype])
    return found


def finish(y: torch.Tensor | Gated, quant: Quant | None) -> Output:
    """:func:`collogue.reference.finish_alone` of tensors on a GPU: by a kernel where there is one for them, else by the reference."""
    main = y.main if isinstance(y, Gated) else y
    scale = getattr(quant, "given_scale", None)
    there = not isinstance(scale, torch.Tensor) or scale.device == main.device
    if there and main.ndim == 2 and main.numel() and main.dtype in VALUE_DTYPES and (quant is None or type(quant) in FAMILIES.values()):
        done = engine_of(main.device, main.dtype).finish(y, quant)
        if done is not None:
            return done
    check_alone(y, quant)
    return reference.finish_alone(y, quant)
