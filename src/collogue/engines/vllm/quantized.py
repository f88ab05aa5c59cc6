"""The quantizations that vLLM puts behind a norm in its graphs, as formats of Collogue's."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from collogue.contract.formats import round_up
from collogue.contract.quant import E4M3_MAX, MXFP8, NVFP4, SMALLEST_SCALE, FP8Group, FP8PerToken, Quant, parse


@dataclass
class Operators:
    """vLLM's operators, ``None`` where its build has none.

    ``static_fp8(.., input, scale)``, ``token_fp8(.., input, scale)``, ``group_fp8(input, output_q, output_s, ..)`` and
    ``nvfp4(input, input_scale, ..)`` write their results and are functionalized in graphs; ``mxfp8(x, swizzled, alignment)`` returns them.
    """

    static_fp8: Any = None
    token_fp8: Any = None
    group_fp8: Any = None
    nvfp4: Any = None
    mxfp8: Any = None


@dataclass(frozen=True)
class Quantization:
    """What a node does to a norm: the format's label, its scale, the lower bound of its scales, and where its results are."""

    label: str
    scale: Node | None = None
    smallest: float = SMALLEST_SCALE
    codes: int = 1
    scales: int | None = None


def quantization(user: Node, normed: Node, known: Operators) -> Quantization | None:
    """The format, if ``user`` quantizes ``normed`` as a fused call can."""
    if known.mxfp8 is not None and user.target is known.mxfp8:
        found = _mxfp8(user) if user.args and user.args[0] is normed else None
    elif user.target is torch.ops.higher_order.auto_functionalized and user.kwargs.get("input") is normed:
        found = _written(user, known)
    else:
        found = None
    value = normed.meta.get("val")
    if found is None or not isinstance(value, Tensor) or any(reader.target is not operator.getitem for reader in user.users):
        return None
    quant = format_of(found.label, None, found.smallest)
    return found if not quant.block or int(value.shape[1]) % quant.block == 0 else None


def _written(user: Node, known: Operators) -> Quantization | None:
    writes, given = user.args[0], user.kwargs
    if writes is None:
        return None
    if writes is known.token_fp8:
        return Quantization("fp8_per_token", scales=2) if given.get("scale_ub") is None else None
    if writes is known.static_fp8:
        whole = given.get("group_shape") in (None, [-1, -1])
        return Quantization("fp8_static", _one(given.get("scale"))) if whole and _one(given.get("scale")) else None
    if writes is known.group_fp8:
        return _group(given)
    if writes is known.nvfp4:
        scale, codes = _one(given.get("input_scale")), _value(given.get("output"))
        rows = _value(given.get("input"))
        exact = codes is not None and rows is not None and 2 * codes.shape[-1] == rows.shape[-1]
        layout = "128x4" if given.get("is_sf_swizzled_layout") else "linear"
        return Quantization(f"nvfp4/{layout}", scale, scales=2) if scale is not None and exact else None
    return None


def _group(given: Any) -> Quantization | None:
    """Float32 scales of groups, row-major, or column-major with aligned columns. Not powers of two in float32: no format has them."""
    column, aligned = bool(given.get("dummy_is_scale_transposed")), bool(given.get("dummy_is_tma_aligned"))
    codes, size = _value(given.get("output_q")), given.get("group_size")
    served = isinstance(size, int) and size >= 16 and size % 16 == 0 and not given.get("scale_ue8m0")
    if not served or column != aligned or given.get("fp8_max") != E4M3_MAX or codes is None or codes.dtype != torch.float8_e4m3fn:
        return None
    return Quantization(f"fp8_group{size}/float32/{'column' if column else 'row'}", smallest=given["eps"] / E4M3_MAX, scales=2)


def _mxfp8(user: Node) -> Quantization | None:
    """Not where rows are padded to an ``alignment``."""
    given: tuple[Any, ...] = (*user.args, *(False, 0)[len(user.args) - 1 :])
    rows, swizzled, alignment = given
    value = _value(rows)
    if user.kwargs or value is None or (alignment and int(value.shape[-1]) % alignment):
        return None
    return Quantization(f"mxfp8/ceil/{'128x4' if swizzled else 'linear'}", codes=0, scales=1)


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _one(node: Any) -> Node | None:
    """A node that is one float32."""
    value = _value(node)
    return node if value is not None and value.dtype == torch.float32 and value.numel() == 1 else None


def format_of(label: str, scale: Tensor | None, smallest: float) -> Quant:
    """The format of a label, with its scale."""
    given = 1.0 if scale is None else scale
    made = parse(label, global_scale=given, static_scale=given, smallest=smallest)
    assert made is not None
    return made


def scale_form(quant: Quant, tokens: int, hidden_size: int) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None:
    """Shape, strides and dtype of vLLM's scale tensor: the bytes are those of Collogue's, padding included."""
    if isinstance(quant, FP8PerToken):
        return (tokens, 1), (1, 1), torch.float32
    if isinstance(quant, FP8Group):
        groups = hidden_size // quant.group_size
        strides = (groups, 1) if quant.layout == "row" else (1, round_up(tokens, 4))
        return (tokens, groups), strides, torch.float32
    if not isinstance(quant, NVFP4 | MXFP8):
        return None
    blocks = hidden_size // quant.block
    if quant.layout == "linear":
        return (tokens, blocks), (blocks, 1), torch.uint8
    rows, columns = round_up(tokens, 128), round_up(blocks, 4)
    if isinstance(quant, NVFP4):
        return (rows, columns // 4), (columns // 4, 1), torch.int32
    return (rows * columns,), (1,), torch.uint8
