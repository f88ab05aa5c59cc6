"""What needs no communicator: quantization and gated units, by the reference on the CPU and a kernel on GPUs."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from collogue.contract.prologue import Gated
from collogue.contract.quant import Quant
from collogue.contract.spec import Output
from collogue.errors import ArgumentError, FormatError, LayoutError, ShapeError
from collogue.ops import alone, finish_alone, is_traced


def quantize(n: Tensor, quant: Quant) -> tuple[Tensor, Tensor | None]:
    """Quantize ``n`` to ``(codes, scales)``; scales are ``None`` for :class:`collogue.FP8Static`.

    Args:
        n: ``[T, H]``, bfloat16, float16 or float32.
        quant: a format, as calls take it.
    Order and rounding:
        Those of :func:`collogue.reference.quantize`, bit for bit, on every device.
    Synchronization:
        None. On GPUs it is one kernel on the current stream, for H a multiple of 8 up to 32768 (16384 before sm_90, and for an ``FP8Group``
        whose size is not a power of two up to 256); wider rows, and a scale that lies elsewhere, are left to PyTorch operations. The
        kernel may be captured in a CUDA graph once the same call has been made; PyTorch operations may not.
    Raises:
        ShapeError, DTypeError, LayoutError, FormatError, ArgumentError: a wrapper around other tensors. GradError: ``n`` requires grad, in
        grad mode. NotPrepared: under graph capture, and no such call was made before.
    Examples:
        >>> codes, scales = collogue.quantize(partial, collogue.FP8PerToken())
        >>> (codes.dtype, list(scales.shape))
        (torch.float8_e4m3fn, [4, 1])
    """
    if not isinstance(n, Tensor):
        raise ShapeError(f"n must be a tensor of shape [T, H], got {type(n).__name__}", hint="pass torch.as_tensor(n)")
    out = (alone if is_traced() else finish_alone)(n, quant)
    if out.codes is None:
        raise FormatError("quant is None; expected a format", hint="pass a format such as collogue.FP8PerToken()")
    return out.codes, out.scales


@overload
def gated(gate_up: Tensor | tuple[Tensor, Tensor], quant: None = None) -> Tensor: ...
@overload
def gated(gate_up: Tensor | tuple[Tensor, Tensor], quant: Quant) -> Output: ...
def gated(gate_up: Tensor | tuple[Tensor, Tensor], quant: Quant | None = None) -> Tensor | Output:
    """A gated unit (SwiGLU), quantized in the same kernel: ``silu(gate) * up``, what an MLP gives its last layer.

    Args:
        gate_up: ``[.., 2 I]``, the gate's features first, or the pair ``(gate, up)``, ``[.., I]`` each; bfloat16, float16 or float32.
            Where the elements of a row do not lie beside each other, or gate and up lie differently, they are copied.
        quant: the format of the next layer's input; ``None``: values.
    Returns:
        :class:`collogue.Output` with ``codes`` and ``scales`` of ``[T, I]`` rows, T the product of the leading dimensions; without
        ``quant`` the values, ``[.., I]``.
    Order and rounding:
        Those of :class:`collogue.Gated`: the values are rounded once to their dtype, and quantized as :func:`collogue.quantize` does. The
        same bits on every device.
    Synchronization:
        As :func:`collogue.quantize`: one kernel, no communication.
    Raises:
        ArgumentError, ShapeError, DTypeError, LayoutError: not strided. FormatError. GradError: a tensor requires grad, in grad mode.
        NotPrepared: under graph capture, and no such call was made before.
    Examples:
        >>> out = collogue.nn.gated(torch.ones(4, 128), collogue.FP8PerToken())
        >>> (out.codes.shape, out.scales.shape)
        (torch.Size([4, 64]), torch.Size([4, 1]))
    """
    if isinstance(gate_up, Tensor):
        check_strided("gate_up", gate_up)
        if gate_up.ndim == 0 or not gate_up.shape[-1] or gate_up.shape[-1] % 2:
            raise ShapeError(f"gate_up has shape {list(gate_up.shape)}; expected [.., 2 I]", hint="the gate's features come first")
        if gate_up.stride(-1) != 1:
            gate_up = gate_up.contiguous()
        pair = tuple(gate_up.reshape(-1, gate_up.shape[-1]).chunk(2, dim=1))
        shape = *gate_up.shape[:-1], gate_up.shape[-1] // 2
    elif isinstance(gate_up, tuple | list) and len(gate_up) == 2 and all(isinstance(each, Tensor) and each.ndim for each in gate_up):
        if gate_up[0].shape != gate_up[1].shape:
            raise ShapeError(
                f"gate has shape {list(gate_up[0].shape)}, up {list(gate_up[1].shape)}", hint="give one element of up for each of gate"
            )
        shape = tuple(gate_up[0].shape)
        if not shape[-1]:
            raise ShapeError(f"gate has shape {list(shape)}; expected [.., I]", hint="pass rows of at least one element")
        check_strided("gate", gate_up[0])
        check_strided("up", gate_up[1])
        pair = tuple(each.reshape(-1, each.shape[-1]) for each in gate_up)
        if pair[0].stride() != pair[1].stride() or pair[0].stride(1) != 1:
            pair = tuple(each.contiguous() for each in pair)
    else:
        kind = type(gate_up).__name__
        raise ArgumentError(f"gate_up is a {kind}; expected a tensor [.., 2 I] or a pair", hint="pass gate_up, or (gate, up)")
    out = (alone if is_traced() else finish_alone)(Gated(*pair), quant)
    return out if out.reduced is None else out.reduced.view(shape)


def check_strided(name: str, tensor: Tensor) -> None:
    """Raise :class:`LayoutError` for sparse and other layouts."""
    if tensor.layout is not torch.strided:
        raise LayoutError(f"{name} has layout {tensor.layout}; expected torch.strided", hint=f"pass {name}.to_dense()")
