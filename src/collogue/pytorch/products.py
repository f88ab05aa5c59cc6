"""Products of codes that PyTorch has on GPUs: which pair of formats has one, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import ScalingType

from collogue.calls.product import ScaledProduct
from collogue.contract.quant import FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.weight import FP8Block, WeightFormat
from collogue.errors import ShapeError
from collogue.ops import is_traced, register
from collogue.planning.plan import MAX_HIDDEN_SIZE

if TYPE_CHECKING:
    from collogue.pytorch.scaled import Linear

#: Most rows of a per-token product that is made of one with scales of 1, whose float32 result a kernel scales. That takes 8 bytes a row
#: and feature, written and read, beside the weight's I bytes a feature: a quarter of them, of 4096 inputs. Up to so many rows the four
#: products of a layer of Llama-3.1-8B take less time together than PyTorch's row-wise ones (docs/evidence.md; scripts/products.py).
FEW_ROWS = 128

Product = Callable[[Tensor, Any, Any, Any, torch.dtype], Tensor]


def find_product(activation: Quant | None, weight: WeightFormat, device: torch.device) -> Product | str:
    """The hardware's product for this pair of formats, or why there is none."""
    if device.type != "cuda":
        return f"a {device.type} has no such product"
    if activation is None:
        return "the activations are not quantized"
    for kinds, least, most, product in _PRODUCTS:
        if (type(activation), type(weight)) == kinds:
            if isinstance(activation, FP8Group) and (activation.group_size, activation.scale_format) != (128, "float32"):
                return "the product takes groups of 128 with float32 scales"
            found = torch.cuda.get_device_capability(device)
            return product if least <= found <= most else f"sm_{found[0]}{found[1]} has no product of these formats"
    return "PyTorch has no product of these formats that is used here"


def has_product(activation: Quant | None, weight: WeightFormat, device: torch.device) -> bool:
    """Whether ``device`` multiplies this pair of formats without decoding them."""
    return not isinstance(find_product(activation, weight, device), str)


def how(product: Product, width: int) -> str:
    """What ``product`` does, in words. ``width``: O."""
    few = f", of up to {FEW_ROWS} rows with scales of 1 and a float32 result, which one kernel scales and rounds"
    return "torch.nn.functional.scaled_mm" + few * (product is _row_wise and _scaled_by_a_kernel(1, width))


def _tensor_wise(codes: Tensor, scales: None, layer: Linear, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert layer.input_factor is not None
    assert layer.weight_factor is not None
    of_x, of_weight = layer.input_factor, layer.weight_factor
    return _scaled_mm(codes, layer.weight, of_x, of_weight, ScalingType.TensorWise, ScalingType.TensorWise, bias, dtype)


def _row_wise(codes: Tensor, scales: Tensor, layer: Linear, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    given = codes, scales, layer.weight.detach(), layer.weight_scale, bias, dtype
    if not is_traced():
        return per_token(*given)  # type: ignore[arg-type]
    result: Tensor = torch.ops.collogue.per_token_product.default(*given)[0]
    return result


def per_token(codes: Tensor, scales: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of codes ``[T, I]`` and ``[O, I]`` with scales ``[T, 1]`` and ``[O, 1]``: how, the number of rows decides."""
    if not _scaled_by_a_kernel(codes.shape[0], weight.shape[0]):
        return _scaled_mm(codes, weight, scales, weight_scale.t(), ScalingType.RowWise, ScalingType.RowWise, bias, dtype)
    if (scales.shape, scales.dtype) != ((codes.shape[0], 1), torch.float32):  # the kernel reads as many as there are rows
        raise ShapeError(
            f"scales are {scales.dtype} {list(scales.shape)}; expected float32 [{codes.shape[0]}, 1], one for each row of the codes",
            hint="pass codes and scales of one call",
        )
    from collogue.gpu.alone import engine_of

    exact = dtype if bias is None else torch.promote_types(dtype, bias.dtype)  # a float32 bias is added before rounding to bfloat16
    engine = engine_of(codes.device, exact)
    by_tensor = ScalingType.TensorWise
    product = F.scaled_mm(codes, weight.t(), engine.one, by_tensor, engine.one, by_tensor, output_dtype=torch.float32)
    return engine.scale(ScaledProduct(product, scales, weight_scale, None if bias is None else bias.to(exact), exact)).to(dtype)


def _scaled_by_a_kernel(rows: int, width: int) -> bool:
    """Wider rows than kernels do are left to the row-wise product."""
    return 0 < rows <= FEW_ROWS and width % 8 == 0 and width <= MAX_HIDDEN_SIZE


def _fake_per_token(codes: Tensor, scales: Tensor, weight: Tensor, of_weight: Tensor, bias: Any, dtype: torch.dtype) -> list[Tensor]:
    return [codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)]


register(
    "per_token_product",
    "Tensor codes, Tensor scales, Tensor weight, Tensor weight_scale, Tensor? bias, ScalarType dtype",
    {"scales": 1, "weight_scale": 3, "bias": 4},
    lambda *given: [per_token(*given)],
    _fake_per_token,
)


def _block_wise(codes: Tensor, scales: Tensor, layer: Linear, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product takes a multiple of 4 rows with scales column by column, and weight scales in rows of a multiple of 4."""
    assert layer.weight_scale is not None
    padded, by_columns = _in_fours(codes, scales)
    weights = layer.weight_scale.detach()
    if weights.shape[1] % 4:
        weights = F.pad(weights, (0, -weights.shape[1] % 4))
    kinds = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return _scaled_mm(padded, layer.weight, by_columns, weights.t(), *kinds, bias, dtype)[: codes.shape[0]]


def _in_fours(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[T, I]`` and scales ``[T, I / 128]`` with T rounded up to a multiple of 4, the scales with strides ``(1, T)``.

    What stands in the rows that are added does not matter. Scales of ``FP8Group(layout="column")`` lie so already.
    """
    tokens, blocks = scales.shape
    rows = -(-tokens // 4) * 4
    if scales.stride() == (1, rows):  # their memory has the rows that are added
        by_columns = scales.as_strided((rows, blocks), (1, rows))
    else:
        by_columns = scales.new_empty(blocks, rows).t()
        by_columns[:tokens].copy_(scales)
    if rows == tokens:
        return codes, by_columns
    padded = codes.new_empty(rows, codes.shape[1])
    padded[:tokens].copy_(codes)
    return padded, by_columns


def _scaled_mm(
    codes: Tensor,
    weight: Tensor,
    of_x: Tensor,
    of_weight: Tensor,
    x_scaling: ScalingType,
    weight_scaling: ScalingType,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    exact = dtype if dtype != torch.float16 else torch.bfloat16
    inside = bias if bias is not None and bias.dtype == exact == torch.bfloat16 else None  # the product takes no other
    result: Tensor = F.scaled_mm(codes, weight.t(), of_x, x_scaling, of_weight, weight_scaling, bias=inside, output_dtype=exact)
    return (result if bias is None or bias is inside else result.float() + bias).to(dtype)


_ANY = (99, 9)
_PRODUCTS: tuple[tuple[tuple[type, type], tuple[int, int], tuple[int, int], Product], ...] = (
    ((FP8Static, FP8Static), (8, 9), _ANY, _tensor_wise),
    ((FP8PerToken, FP8PerToken), (9, 0), _ANY, _row_wise),
    ((FP8Group, FP8Block), (9, 0), (9, 0), _block_wise),
)
