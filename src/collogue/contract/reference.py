"""The numerical contract, in PyTorch, on any device.

Every result of Collogue equals these functions bit for bit. All arithmetic is IEEE float32, rounded to nearest even, each
operation by itself: no fused multiply-add, no flush to zero, no reduction whose order is not written here. No output holds
a negative zero, and NaN is stored as one pattern.

    s = sum of the partials in rank order, from +0          y = round_D(s + residual)
    s = sum of the islands' sums, each in rank order        (where ranks lie on several islands)
    n = round_D((y * rstd) * w)                             codes, scales = quantize(n)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from collogue.contract.formats import (
    INTEGER_VIEW,
    canonical_nan,
    code_spec,
    e2m1_decode,
    e2m1_encode,
    e4m3_decode,
    e4m3_encode,
    e8m0_decode,
    nan_mask,
    pack_nibbles,
    place_scales,
    read_scales,
    round_up,
    round_value,
    scales_per_row,
    unpack_nibbles,
)
from collogue.contract.number import check_local
from collogue.contract.prologue import ExpertCombine, ExpertReduce, Gated, Prologue
from collogue.contract.quant import (
    E2M1_MAX,
    E4M3_MAX,
    MXFP4,
    MXFP8,
    NVFP4,
    FP8Group,
    FP8PerToken,
    FP8Static,
    Quant,
    check_format,
    check_wire,
    describe,
)
from collogue.contract.spec import VALUE_DTYPES, Operation, Output, RMSNorm, Wanted, as_islands, as_rows, check_split, owned_rows
from collogue.errors import ArgumentError, DTypeError, FormatError, LayoutError, PlatformError, ShapeError

#: Shape of the mean square: a lane adds 8 elements, 32 lanes are folded by halves into the sum of one block.
LANE = 8
LANES = 32
BLOCK = LANE * LANES

#: E8M0: exponent of the largest binade of the elements, and the largest float32 mantissa field that "ceil" does not round up
#: (the fraction of 448 = 1.75 * 2**8 and of 6 = 1.5 * 2**2).
_MX_EXPONENT = {"e4m3": (8, 0x600000), "e2m1": (2, 0x400000)}
_LARGEST_FINITE = torch.finfo(torch.float32).max


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A float32 tensor without dimensions. Division needs one: by a Python number, PyTorch may multiply by a reciprocal instead.

    A number is filled in on the device: a copy from the host could not be captured in a CUDA graph.
    """
    if isinstance(value, Tensor):
        return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(())
    return torch.full((), value, dtype=torch.float32, device=device)


def expert_combine(given: ExpertCombine) -> Tensor:
    """The term [T, H] of :class:`collogue.ExpertCombine`: ``a = +0; a = a + x[index[t, k]] * w[t, k]``, ``a * scaling``, ``a + shared``.

    Examples:
        >>> index = torch.tensor([[0, 1]], dtype=torch.int32)
        >>> collogue.reference.expert_combine(collogue.ExpertCombine(partial, index, torch.ones(1, 2)))[:, 0]
        tensor([2.], dtype=torch.bfloat16)
    """
    total = torch.zeros(given.tokens, given.hidden_size, dtype=torch.float32, device=given.expert_output.device)
    for k in range(given.count):
        rows = given.index[:, k].long()
        named = ((rows >= 0) & (rows < len(given.expert_output))).nonzero()[:, 0]
        term = given.expert_output[rows[named]].float()
        if given.weights is not None:
            term *= given.weights[named, k].float()[:, None]
        total[named] += term
    if given.scaling != 1:
        total *= _scalar(given.scaling, total.device)
    if given.shared_expert is not None:
        total += given.shared_expert.float()
    return round_value(total, given.expert_output.dtype)


def expert_reduce(given: ExpertReduce) -> Tensor:
    """The term [T, H] of :class:`collogue.ExpertReduce`: ``a = +0; a = a + x[e, t] * w[e, t]`` where ``w != 0``, ``a + token_input``.

    Examples:
        >>> given = collogue.ExpertReduce(torch.ones(2, 4, 64).bfloat16(), torch.ones(2, 4), partial)
        >>> collogue.reference.expert_reduce(given)[:, 0]
        tensor([3., 3., 3., 3.], dtype=torch.bfloat16)
    """
    total = torch.zeros(given.tokens, given.hidden_size, dtype=torch.float32, device=given.expert_output.device)
    for rows, weights in zip(given.expert_output, given.weights, strict=True):
        used = (weights != 0).nonzero()[:, 0]
        total[used] += rows[used].float() * weights[used].float()[:, None]
    return round_value(total + given.token_input.float(), given.expert_output.dtype)


#: ``e(x)``: 1 / ln 2, ln 2 in two parts of which the first times a whole number is exact, and the polynomial's constants from the last to
#: the first.
_PER_LN2, _LN2_HIGH, _LN2_LOW = float.fromhex("0x1.715476p+0"), float.fromhex("0x1.62e4p-1"), float.fromhex("0x1.7f7d1cp-20")
_POLYNOMIAL = tuple(
    map(float.fromhex, ("0x1.6a23cep-10", "0x1.123a2p-7", "0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2", "0x1p+0", "0x1p+0"))
)
#: Below, silu is 0; above, ``1 + e(-g)`` is 1.
_SILU_LEAST, _SILU_MOST = -88.0, 32.0


def silu(g: Tensor) -> Tensor:
    """``g / (1 + e(-g))`` in float32, 0 where ``g < -88``. ``e(x)`` is within 1.2 units in the last place of the exponential.

    Order and rounding:
        ``x = max(-g, -32)``, ``n = rint(x * log2e)``, ``r = (x - n * ln2_high) - n * ln2_low``; ``p = c6; p = p * r + c5; ..; p = p * r +
        c0``; ``e = p * 2**n``. Each operation is rounded by itself.
    Examples:
        >>> collogue.reference.silu(torch.tensor([-100.0, 0.0, 40.0]))
        tensor([ 0.,  0., 40.])
    """
    x = (-g).clamp_(min=-_SILU_MOST)
    n = (x * _PER_LN2).round_()
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _POLYNOMIAL[0])
    for constant in _POLYNOMIAL[1:]:
        p = p.mul_(r).add_(constant)
    power = ((n.clamp(-126, 127).nan_to_num_().int() + 127) << 23).view(torch.float32)
    return (g / (1.0 + p * power)).masked_fill_(g < _SILU_LEAST, 0.0)


def gated(given: Gated) -> Tensor:
    """The term [T, H] of :class:`collogue.Gated`: ``silu(gate) * up``, rounded once.

    Examples:
        >>> collogue.reference.gated(collogue.Gated(partial, partial)).shape
        torch.Size([4, 64])
    """
    return round_value(silu(given.gate.float()) * given.up.float(), given.gate.dtype)


def term_of(given: Tensor | Prologue) -> Tensor:
    """A rank's term [T, H]: a partial as it is, a prologue computed.

    Examples:
        >>> collogue.reference.term_of(partial) is partial
        True
    """
    if isinstance(given, ExpertCombine):
        return expert_combine(given)
    if isinstance(given, Gated):
        return gated(given)
    return expert_reduce(given) if isinstance(given, ExpertReduce) else given


def _terms(given: Sequence[Tensor | Prologue]) -> list[Tensor]:
    """Every rank's term. Raises :class:`ArgumentError` where ranks give what a communicator calls different calls."""
    kinds = {_kind_of(one): rank for rank, one in reversed(list(enumerate(given)))}
    if len(kinds) > 1:
        said = ", ".join(f"rank {rank} {kind}" for kind, rank in sorted(kinds.items(), key=lambda found: found[1]))
        raise ArgumentError(
            f"ranks give different terms: {said}", hint="pass a tensor on every rank, or the same prologue with the same K on every rank"
        )
    return [term_of(one) for one in given]


def _kind_of(given: Tensor | Prologue) -> str:
    """What ranks agree about."""
    kind = "tensor" if isinstance(given, Tensor) else type(given).__name__
    return f"{kind} with K = {given.count}" if isinstance(given, ExpertCombine) else kind


def sum_partials(partials: Sequence[Tensor], islands: Sequence[Sequence[int]] | None = None) -> Tensor:
    """``s = +0; s = s + x_r`` for rank 0, 1, ...: float32, same shape. With ``islands``: so for each island, then so for their sums.

    Examples:
        >>> collogue.reference.sum_partials([partial, partial])[0, :2]
        tensor([2., 2.])
    """
    if islands is not None:
        partials = [sum_partials([partials[rank] for rank in island]) for island in islands]
    total = torch.zeros_like(partials[0], dtype=torch.float32)
    for partial in partials:
        total += partial.float()
    return total


def mean_square(y: Tensor) -> Tensor:
    """Mean of the squares of each row of ``y`` [T, H]: float32 [T].

    Order and rounding:
        A lane adds the squares of 8 consecutive elements, one after the other. 32 lane sums are folded by halves
        (``v[i] += v[i + 16]``, then 8, 4, 2, 1). The sums of the blocks of 256 are added in index order, from +0. A short
        last block is padded with zeros. The total is divided by H.
    Examples:
        >>> collogue.reference.mean_square(2 * partial)
        tensor([4., 4., 4., 4.])
    """
    tokens, hidden_size = y.shape
    blocks = round_up(hidden_size, BLOCK) // BLOCK
    squares = y.float().square()
    if hidden_size % BLOCK:
        squares = torch.nn.functional.pad(squares, (0, blocks * BLOCK - hidden_size))
    squares = squares.view(tokens, blocks, LANES, LANE)
    lanes = squares[..., 0].clone()
    for i in range(1, LANE):
        lanes += squares[..., i]
    half = LANES // 2
    while half:
        lanes = lanes[..., :half] + lanes[..., half:]
        half //= 2
    total = torch.zeros(tokens, dtype=torch.float32, device=y.device)
    for block in range(blocks):
        total += lanes[:, block, 0]
    return total / _scalar(float(hidden_size), y.device)


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded. PyTorch's float32 square root may be one unit off on a CPU; float64's has enough bits to round once more."""
    return x.double().sqrt().float()


def rms_norm(y: Tensor, norm: RMSNorm) -> Tensor:
    """``n = round_D((y * rstd) * w)``, ``rstd = 1 / sqrt(mean_square + eps)``, ``w = float(weight) + weight_offset``.

    Examples:
        >>> collogue.reference.rms_norm(partial, collogue.RMSNorm(weight, eps=0.0))[0, :2]
        tensor([1., 1.], dtype=torch.bfloat16)
    """
    _check_values([("y", y)], norm)
    rstd = _scalar(1.0, y.device) / _sqrt(mean_square(y) + _scalar(norm.eps, y.device))
    weight = norm.weight.float() + _scalar(norm.weight_offset, y.device)
    return round_value((y.float() * rstd[:, None]).mul_(weight), y.dtype)


def _amax(n: Tensor) -> Tensor:
    """Largest absolute value along the last dimension, as float32. Ignores NaN: 0 where there is nothing else."""
    # Without the sign, bit patterns are in the order of their values.
    integer, _ = INTEGER_VIEW[n.dtype]
    bits = nan_mask(n).bitwise_not_().bitwise_and_(n.view(integer)).bitwise_and_(torch.iinfo(integer).max)
    return bits.amax(dim=-1).view(n.dtype).float()


def _inverse_power_of_two(code: Tensor) -> Tensor:
    """``1 / 2**k`` of E8M0 codes 0 to 253, exactly: all are normal float32 numbers."""
    return ((254 - code.int()) << 23).view(torch.float32)


def _mx_scale(amax: Tensor, quant: MXFP4 | MXFP8) -> Tensor:
    """E8M0 codes (uint8) of 32-element blocks, from the bits of ``amax``. Infinity counts as ``2**128``, so 253 is the largest."""
    exponent, mantissa = _MX_EXPONENT[quant.element]
    bits = amax.view(torch.int32)
    code = (bits >> 23) - exponent
    if quant.rounding == "ceil":
        code += (bits & 0x7FFFFF) > mantissa
    return code.clamp_(min=0).to(torch.uint8)


def _e8m0_ceil(scale: Tensor) -> Tensor:
    """E8M0 codes (uint8) of the smallest power of two not below ``scale``, a normal float32 up to ``2**126``."""
    return ((scale.view(torch.int32) + 0x7FFFFF) >> 23).to(torch.uint8)


def quantize(n: Tensor, quant: Quant) -> tuple[Tensor, Tensor | None]:
    """Quantize ``n`` [T, H] (bfloat16, float16 or float32) to ``(codes, scales)``; scales are ``None`` for :class:`FP8Static`.

    Order and rounding:
        As each format's class says, every operation rounded to float32. amax ignores NaN. Elements that are NaN become
        E4M3 0x7F or E2M1 code 7, infinities saturate. Where an NVFP4 or MX block's scale is zero or its amax is zero,
        all its codes are 0, also of NaN. An infinite amax gives FP8PerToken and FP8Group an infinite float32 scale, MX
        blocks the exponent 128 of its bits, and UE8M0 groups the scale of the largest finite number.
    Raises:
        ShapeError, DTypeError, LayoutError: not rows of values. FormatError: no format, or a block that does not divide H.
    Examples:
        >>> codes, scales = collogue.reference.quantize(partial, collogue.MXFP8("ceil", layout="linear"))
        >>> (codes.dtype, list(scales.shape))
        (torch.float8_e4m3fn, [4, 2])
    """
    _check_rows(n)
    check_format("quant", quant)
    _check_arithmetic()
    n = n.contiguous()
    tokens, hidden_size = n.shape
    shape, dtype = code_spec(quant, tokens, hidden_size)
    if isinstance(quant, FP8Static):
        inverse = _scalar(1.0, n.device) / _scalar(quant.scale, n.device)
        return e4m3_encode(n.float() * inverse).view(dtype), None

    blocks = n.reshape(tokens, scales_per_row(quant, hidden_size), quant.block or hidden_size)
    values, amax = blocks.float(), _amax(blocks)
    if isinstance(quant, NVFP4):
        g = _scalar(quant.global_scale, n.device)
        scale = e4m3_encode(g * (amax * _scalar(1.0 / E2M1_MAX, n.device)))
        codes = e2m1_encode(values * (g / e4m3_decode(scale))[..., None])
        codes *= (scale != 0)[..., None].view(torch.uint8)
    elif isinstance(quant, MXFP4 | MXFP8):
        scale = _mx_scale(amax, quant)
        encode = e2m1_encode if isinstance(quant, MXFP4) else e4m3_encode
        codes = encode(values * _inverse_power_of_two(scale)[..., None])
        codes *= (amax != 0)[..., None].view(torch.uint8)
    else:
        assert isinstance(quant, FP8PerToken | FP8Group)  # no other format is left
        ue8m0 = isinstance(quant, FP8Group) and quant.scale_format == "ue8m0"
        if ue8m0:
            amax = amax.clamp(max=_LARGEST_FINITE)
        scale = torch.maximum(amax / _scalar(E4M3_MAX, n.device), _scalar(quant.smallest, n.device))
        if ue8m0:
            scale = _e8m0_ceil(scale)
            codes = e4m3_encode(values * _inverse_power_of_two(scale)[..., None])
        else:
            codes = e4m3_encode(values / scale[..., None])
    codes = codes.view(tokens, hidden_size)
    packed = pack_nibbles(codes) if quant.element == "e2m1" else codes
    return packed.view(dtype).view(shape), place_scales(scale, quant, tokens, hidden_size)


def _check_rows(n: Tensor) -> None:
    """Raise unless ``n`` is ``[T, H]`` of values."""
    if not isinstance(n, Tensor) or n.ndim != 2:
        found = list(n.shape) if isinstance(n, Tensor) else type(n).__name__
        raise ShapeError(f"n must be a tensor of shape [T, H], got {found}", hint="flatten leading dimensions: x.view(-1, H)")
    check_local("n", n)
    if n.dtype not in VALUE_DTYPES:
        raise DTypeError(
            f"n has dtype {n.dtype}; expected bfloat16, float16 or float32",
            hint="pass the values that are to be quantized, in one of these",
        )
    if n.layout is not torch.strided:
        raise LayoutError(f"n has layout {n.layout}; expected torch.strided", hint="pass n.to_dense()")
    if n.shape[1] == 0:
        raise ShapeError(f"n has shape {list(n.shape)}: rows without elements", hint="pass rows of at least one element")


def dequantize(codes: Tensor, scales: Tensor | None, quant: Quant, *, hidden_size: int) -> Tensor:
    """Decode to float32 [T, H]: ``code * scale``, and for NVFP4 ``(code * scale) / global_scale``.

    Raises:
        ShapeError: codes or scales that are not those of this format, scales that are missing or one too many. FormatError: no format.
    Examples:
        >>> quant = collogue.FP8PerToken()
        >>> codes, scales = collogue.quantize(partial, quant)
        >>> collogue.dequantize(codes, scales, quant, hidden_size=64)[0, :2]
        tensor([1., 1.])
    """
    check_format("quant", quant)
    for name, tensor in (("codes", codes), ("scales", scales)):
        if not isinstance(tensor, Tensor) and (name == "codes" or tensor is not None):
            raise ShapeError(f"{name} are a {type(tensor).__name__}; expected a tensor", hint=f"pass out.{name}")
        check_local(name, tensor)
    if codes.ndim == 0:
        raise ShapeError("codes have no dimensions; expected [T, H]", hint="pass the codes as they were returned")
    tokens = codes.shape[0]
    shape, dtype = code_spec(quant, tokens, hidden_size)
    if tuple(codes.shape) != shape or codes.dtype != dtype:
        raise ShapeError(
            f"codes are {codes.dtype} {list(codes.shape)}, {quant.name} has {dtype} {list(shape)} at hidden size {hidden_size}",
            hint="pass the codes as they were returned, and the same format",
        )
    raw = codes.contiguous().view(torch.uint8)
    values = e2m1_decode(unpack_nibbles(raw)) if quant.element == "e2m1" else e4m3_decode(raw)
    if isinstance(quant, FP8Static):
        if scales is not None:
            raise ShapeError(
                "FP8Static has no scales beside its own, but some are given", hint="pass the format that the codes were made with"
            )
        return canonical_nan(values * _scalar(quant.scale, codes.device))
    if scales is None:
        raise ShapeError(f"{quant.name} has scales", hint="pass out.scales")
    stored = read_scales(scales, quant, tokens, hidden_size)
    if stored.dtype == torch.uint8:
        stored = e4m3_decode(stored.contiguous()) if quant.scale_dtype == torch.float8_e4m3fn else e8m0_decode(stored)
    values = values.view(tokens, stored.shape[1], quant.block or hidden_size) * stored[..., None]
    if isinstance(quant, NVFP4):
        values /= _scalar(quant.global_scale, codes.device)
    return canonical_nan(values.view(tokens, hidden_size))


def finished(y: Tensor, norm: RMSNorm | None, quant: Quant | None, wanted: Wanted) -> Output:
    """What follows the prenorm ``y`` [T, H]: norm and quantization, each output where it was asked for.

    Examples:
        >>> from collogue.contract.spec import Wanted
        >>> wanted = Wanted.of(has_residual=False, has_norm=True, quant=None, keep_norm=True)
        >>> collogue.reference.finished(partial, collogue.RMSNorm(weight), None, wanted)
        Output(residual=bfloat16[4, 64], norm=bfloat16[4, 64] on cpu)
    """
    _check_arithmetic()
    n = y if norm is None else rms_norm(y, norm)
    codes, scales = (None, None) if quant is None else quantize(n, quant)
    return Output(
        reduced=y if wanted.reduced else None,
        residual=y if wanted.residual else None,
        norm=n if wanted.norm else None,
        codes=codes,
        scales=scales,
    )


def _check_arithmetic() -> None:
    """Raise :class:`PlatformError` where this thread's floating point flushes subnormal numbers to zero."""
    if sys.float_info.min * 0.5 == 0.0:
        raise PlatformError(
            "floating point flushes subnormal numbers to zero in this thread; bits would differ from those of other ranks and of GPUs",
            hint="call torch.set_flush_denormal(False); a library built with -ffast-math may have set it, too",
        )


def _check_values(named: Sequence[tuple[str, Tensor | None]], norm: RMSNorm | None) -> None:
    """All tensors are ``[T, H]`` of the first one's shape and dtype, and the norm fits them."""
    _check_arithmetic()
    name, first = named[0]
    assert first is not None
    if norm is not None and not isinstance(norm, RMSNorm):
        raise ArgumentError(f"norm is a {type(norm).__name__}; expected a collogue.RMSNorm", hint="pass collogue.RMSNorm(weight, eps)")
    for each, tensor in named:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ShapeError(f"{each} is a {type(tensor).__name__}; expected a tensor of shape [T, H]", hint="pass a tensor")
        check_local(each, tensor)
    if first.ndim != 2 or first.dtype not in VALUE_DTYPES:
        raise DTypeError(f"{name} is {first.dtype} {list(first.shape)}", hint="pass [T, H] in bfloat16, float16 or float32")
    for other, tensor in named[1:]:
        if tensor is not None and (tensor.shape != first.shape or tensor.dtype != first.dtype):
            raise ShapeError(
                f"{other} is {tensor.dtype} {list(tensor.shape)}, {name} is {first.dtype} {list(first.shape)}",
                hint="every rank's partial and the residual have one shape and dtype",
            )
    if norm is not None and (norm.weight.shape != first.shape[1:] or norm.weight.dtype not in (first.dtype, torch.float32)):
        raise ShapeError(
            f"the norm's weight is {norm.weight.dtype} {list(norm.weight.shape)}, the rows have {first.shape[1]} elements of {first.dtype}",
            hint="the weight has one element per column, in the partials' dtype or float32",
        )


def _check_partials(partials: Sequence[Tensor], residual: Tensor | None, norm: RMSNorm | None) -> None:
    if not partials:
        raise ShapeError("there are no partials", hint="pass one tensor per rank")
    _check_values([*((f"partial {rank}", p) for rank, p in enumerate(partials)), ("residual", residual)], norm)


def all_reduce(
    partials: Sequence[Tensor | Prologue],
    *,
    residual: Tensor | None = None,
    norm: RMSNorm | None = None,
    quant: Quant | None = None,
    keep_norm: bool = False,
    branch_norm: RMSNorm | None = None,
    islands: Sequence[Sequence[int]] | None = None,
    wire: Quant | None = None,
) -> Output:
    """What :meth:`collogue.Communicator.all_reduce` returns on every rank.

    Args:
        partials: every rank's partial [T, H], or prologue, in rank order, all of one dtype.
        residual: [T, H] in that dtype, or ``None``.
        norm, quant, keep_norm, branch_norm: as for the communicator.
        islands: which ranks are summed first, as ``comm.islands`` says: ``[[0, 1], [2, 3]]``. ``None``: all, in rank order.
        wire: a format that every term is quantized to and decoded from, in float32, before it is added.
    Order and rounding:
        Adds in float32 from +0, rank 0 first; adds the residual; rounds once to ``y``, which norm and quantization read. With several
        islands: each island's ranks in rank order from +0, then the islands' sums in order from +0.
    Raises:
        ShapeError, DTypeError: tensors that do not fit together. ArgumentError: islands that do not split the ranks, ranks that give terms
        of different kinds or a different K.
    Examples:
        >>> collogue.reference.all_reduce([partial, partial], residual=residual).residual[0, :2]
        tensor([2., 2.], dtype=torch.bfloat16)
    """
    terms = _terms(partials)
    islands = as_islands(islands, len(terms))
    _check_partials(terms, residual, norm)
    wanted = Wanted.of(has_residual=residual is not None, has_norm=norm is not None, quant=quant, keep_norm=keep_norm)
    if branch_norm is not None:
        if residual is None:
            raise ArgumentError("branch_norm without residual=", hint="pass the residual that the normed sum is added to, or use norm=")
        _check_values([("the sum", terms[0])], branch_norm)
    check_wire(wire, terms[0].shape[1])
    added = terms if wire is None else [_over(term, wire) for term in terms]
    y = stream(sum_partials(added, islands), terms[0].dtype, residual, branch_norm)
    return finished(y, norm, quant, wanted)


def _over(term: Tensor, wire: Quant) -> Tensor:
    """What comes of ``term`` behind a wire of this format: float32."""
    codes, scales = quantize(term, wire)
    return dequantize(codes, scales, wire, hidden_size=term.shape[1])


def stream(total: Tensor, dtype: torch.dtype, residual: Tensor | None = None, branch_norm: RMSNorm | None = None) -> Tensor:
    """``y`` [T, H] in ``dtype`` from a float32 sum: ``round(total + residual)``, with ``branch_norm`` ``round(residual + its norm)``.

    Examples:
        >>> collogue.reference.stream(partial.float(), torch.bfloat16, residual).dtype
        torch.bfloat16
    """
    _check_arithmetic()
    if branch_norm is not None:
        total = rms_norm(round_value(total, dtype), branch_norm).float()
    return round_value(total if residual is None else total + residual.float(), dtype)


def sharded(
    partials: Sequence[Tensor | Prologue],
    *,
    residual: Tensor | None = None,
    norm: RMSNorm | None = None,
    quant: Quant | None = None,
    keep_norm: bool = False,
    branch_norm: RMSNorm | None = None,
    rows: Sequence[int] | None = None,
    islands: Sequence[Sequence[int]] | None = None,
    wire: Quant | None = None,
) -> list[Output]:
    """What ``comm.all_reduce(.., sharded=True)`` returns, by rank: :func:`all_reduce`, of whose y each rank keeps the rows it owns.

    Arguments and errors are those of :func:`all_reduce`; ``residual`` [T, H] is the shards of all ranks, rank 0 first. ``rows``: how many
    each rank owns, in place of equal blocks; their sum is T. ``islands`` and ``wire`` as there.

    Examples:
        >>> by_rank = collogue.reference.sharded([partial, partial], residual=residual, norm=collogue.RMSNorm(weight))
        >>> [(list(out.residual.shape), list(out.norm.shape)) for out in by_rank]
        [([2, 64], [4, 64]), ([2, 64], [4, 64])]
    """
    terms = _terms(partials)
    epilogue = {"norm": norm, "quant": quant, "keep_norm": keep_norm, "branch_norm": branch_norm, "islands": islands, "wire": wire}
    whole = all_reduce(terms, residual=residual, **epilogue)  # type: ignore[arg-type]
    return [
        replace(
            whole,
            reduced=None if whole.reduced is None else whole.reduced[own],
            residual=None if whole.residual is None else whole.residual[own],
        )
        for own in _owned("sharded", len(terms[0]), len(terms), rows)
    ]


def reduce_scatter(
    partials: Sequence[Tensor | Prologue],
    *,
    residual: Tensor | None = None,
    norm: RMSNorm | None = None,
    quant: Quant | None = None,
    keep_norm: bool = False,
    branch_norm: RMSNorm | None = None,
    rows: Sequence[int] | None = None,
    islands: Sequence[Sequence[int]] | None = None,
    wire: Quant | None = None,
) -> list[Output]:
    """What :meth:`collogue.Communicator.reduce_scatter` returns, by rank: :func:`all_reduce` of the rows that each rank owns.

    Arguments and errors are those of :func:`all_reduce`; ``residual`` [T, H] is the shards of all ranks, rank 0 first. ``rows``: how many
    each rank owns, in place of equal blocks; their sum is T. ``islands`` and ``wire`` as there.

    Examples:
        >>> [list(out.reduced.shape) for out in collogue.reference.reduce_scatter([partial, partial], rows=[1, 3])]
        [[1, 64], [3, 64]]
    """
    terms = _terms(partials)
    _check_partials(terms, residual, norm)
    return [
        all_reduce(
            [p[own] for p in terms],
            residual=None if residual is None else residual[own],
            norm=norm,
            quant=quant,
            keep_norm=keep_norm,
            branch_norm=branch_norm,
            islands=islands,
            wire=wire,
        )
        for own in _owned("reduce_scatter", len(terms[0]), len(terms), rows)
    ]


def _owned(operation: Operation, tokens: int, world_size: int, rows: Sequence[int] | None) -> list[slice]:
    """The rows of each rank. Raises where ``rows`` cannot be."""
    check_split(operation, tokens, as_rows(rows, world_size))
    blocks = (owned_rows(tokens, world_size, rank, rows) for rank in range(world_size))
    return [slice(own.start, own.stop) for own in blocks]


def all_gather(shards: Sequence[Output], *, quant: Quant | None = None, rows: Sequence[int] | None = None) -> Output:
    """What :meth:`collogue.Communicator.all_gather` returns on every rank: the rows of all shards, bit for bit as they are.

    Args:
        shards: every rank's, in rank order, all with the same tensors; as many rows on each rank as
            :meth:`collogue.Communicator.owned_rows` says.
        quant: the format of codes and scales. Scales come in the layout of a shard's rows and go into that of all rows.
        rows: how many each rank owns, in place of equal blocks.
    Raises:
        ShapeError, FormatError: shards that do not fit together, codes without a format.
    Examples:
        >>> shards = collogue.reference.reduce_scatter([partial, partial])
        >>> collogue.reference.all_gather(shards).reduced.shape
        torch.Size([4, 64])
    """
    if quant is not None:
        check_format("quant", quant)
    held = [[name for name, _ in shard.items()] for shard in shards]
    if not shards or not held[0] or any(names != held[0] for names in held):
        raise ShapeError(f"the shards hold {held}", hint="pass one shard per rank, all with the same tensors")
    if ("codes" in held[0] or "scales" in held[0]) != (quant is not None):
        raise FormatError(
            f"the shards hold {held[0]}, quant is {describe(quant)}", hint="name the format of codes and scales, and only of those"
        )
    gathered = Output(**{name: torch.cat([getattr(shard, name) for shard in shards]) for name in held[0] if name != "scales"})
    if "scales" in held[0]:
        assert quant is not None
        if gathered.codes is None:
            raise ShapeError("the shards hold scales without codes", hint="pass the codes with their scales")
        tokens, width = gathered.codes.shape
        hidden_size = 2 * width if quant.element == "e2m1" else width
        parts = [read_scales(s.scales, quant, len(s.codes), hidden_size) for s in shards if s.scales is not None and s.codes is not None]
        gathered.scales = place_scales(torch.cat(parts), quant, tokens, hidden_size)
    for name in held[0]:
        held_rows = [len(getattr(shard, name)) for shard in shards]
        if name != "scales" and held_rows != [own.stop - own.start for own in _owned("all_gather", sum(held_rows), len(shards), rows)]:
            raise ShapeError(f"the shards' {name} have {held_rows} rows", hint="cut rows as comm.shard does, or say how: rows=")
    return gathered


def finish_alone(y: Tensor | Gated, quant: Quant | None) -> Output:
    """What :func:`collogue.quantize` and :func:`collogue.nn.gated` return: codes and scales; without a format the values (``reduced``).

    Examples:
        >>> collogue.reference.finish_alone(partial, collogue.FP8PerToken())
        Output(codes=float8_e4m3fn[4, 64], scales=float32[4, 1] on cpu)
    """
    if quant is None:
        return Output(reduced=term_of(y))
    codes, scales = quantize(term_of(y), quant)
    return Output(codes=codes, scales=scales)


def finish(y: Tensor | Gated, *, norm: RMSNorm | None = None, quant: Quant | None = None, keep_norm: bool = False) -> Output:
    """What :meth:`collogue.Communicator.finish` returns: norm and quantization of ``y`` [T, H], which is not returned.

    Raises:
        ArgumentError: experts, which are terms of a sum. ShapeError, DTypeError, FormatError.
    Examples:
        >>> collogue.reference.finish(partial, norm=collogue.RMSNorm(weight))
        Output(norm=bfloat16[4, 64] on cpu)
    """
    if not isinstance(y, Tensor | Gated):
        name = f"{type(y).__module__.partition('.')[0]}.{type(y).__name__}".removeprefix("builtins.")
        raise ArgumentError(f"y is a {name}, and finish sums nothing", hint="pass a tensor or a Gated; experts go to all_reduce")
    y = term_of(y)
    _check_values([("y", y)], norm)
    return finished(
        y, norm, quant, Wanted.of(has_residual=False, has_norm=norm is not None, quant=quant, keep_norm=keep_norm, operation="finish")
    )
