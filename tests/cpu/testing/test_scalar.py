"""The scalar version against the definitions, and the reference against the scalar version."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from collogue.contract.quant import NVFP4, FP8Group, FP8Static, Quant, describe, parse
from collogue.contract.spec import RMSNorm
from collogue.testing import scalar
from collogue.testing.compare import compare
from collogue.testing.inputs import KINDS, make_inputs, make_partials
from collogue.testing.oracle import by_reference, by_scalar

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_LAYOUTS = ("128x4", "8x4", "linear")
GROUP_LAYOUTS = ("row", "column")
LABELS = [
    "none",
    *(f"nvfp4/{layout}" for layout in BLOCK_LAYOUTS),
    *("/".join(parts) for parts in itertools.product(("mxfp4", "mxfp8"), ("floor", "ceil"), BLOCK_LAYOUTS)),
    "fp8_static",
    "fp8_per_token",
    *(
        "/".join(parts)
        for parts in itertools.product(("fp8_group16", "fp8_group64", "fp8_group128"), ("float32", "ue8m0"), ("row", "column"))
    ),
]


def both(
    kind: str,
    quant: Quant | None,
    *,
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    norm: bool = True,
    world_size: int = 3,
    **options: Any,
) -> list[str]:
    """First differences between the reference's and the scalar version's outputs of one call."""
    partials = make_partials(kind, world_size, tokens=tokens, hidden_size=hidden_size, dtype=dtype)
    made = make_inputs(kind, rank=0, tokens=tokens, hidden_size=hidden_size, dtype=dtype, weight_dtype=options.pop("weight_dtype", None))
    layer = RMSNorm(made.weight, **options) if norm else None
    arguments = (partials, made.residual, layer, quant, norm and quant is not None)
    return [d.first for d in compare(by_reference(*arguments), by_scalar(*arguments)).values() if d.count]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_scalar(kind: str, dtype: torch.dtype) -> None:
    for (tokens, hidden_size), norm, label in itertools.product([(1, 128), (3, 1152), (5, 640), (0, 128)], (True, False), LABELS):
        quant = parse(label, global_scale=537.6, static_scale=5 / 448)
        if quant is None or not quant.block or hidden_size % quant.block == 0:
            assert both(kind, quant, tokens=tokens, hidden_size=hidden_size, dtype=dtype, norm=norm) == [], (
                label,
                tokens,
                hidden_size,
                norm,
            )


@pytest.mark.parametrize(("tokens", "hidden_size"), [(131, 8), (3, 24), (127, 264), (7, 2880), (1, 5120), (2, 16384)])
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_reference_equals_scalar_at_odd_shapes(tokens: int, hidden_size: int, world_size: int) -> None:
    for dtype in DTYPES:
        options = {"weight_dtype": torch.float32, "weight_offset": 1.0, "eps": 1e-5}
        assert (
            both("normal", parse("fp8_per_token"), tokens=tokens, hidden_size=hidden_size, dtype=dtype, world_size=world_size, **options)
            == []
        )


@pytest.mark.parametrize("g", [-537.6, 0.0, -0.0, float("nan"), float("inf"), float("-inf"), 1e-45, 3e38])
@pytest.mark.parametrize("kind", ["normal", "nan", "inf", "zeros"])
def test_scales_that_only_a_cuda_tensor_could_hold(kind: str, g: float) -> None:
    """The formats refuse such numbers; in a CUDA tensor they are not read, and the contract still defines the output."""
    nvfp4, static = NVFP4(1.0), FP8Static(1.0)
    object.__setattr__(nvfp4, "global_scale", g)
    object.__setattr__(static, "scale", g)
    for quant, dtype in itertools.product((nvfp4, static), DTYPES):
        assert both(kind, quant, tokens=3, hidden_size=96, dtype=dtype, norm=False) == [], describe(quant)


@pytest.mark.parametrize("smallest", [2.0**-126, 2.0**-120, 2.0**-100, 0.75, 1.0])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_other_smallest_scales(smallest: float, scale_format: str) -> None:
    quant = FP8Group(16, scale_format=scale_format, smallest=smallest)
    for kind, dtype in itertools.product(("zeros", "subnormal", "normal"), DTYPES):
        assert both(kind, quant, tokens=3, hidden_size=96, dtype=dtype, norm=False) == []


def test_tables_of_small_formats() -> None:
    assert scalar.E2M1.values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert [scalar.E4M3.values[c] for c in (0, 1, 7, 8, 0x38, 0x7E)] == [0, 2**-9, 7 * 2**-9, 2**-6, 1, 448]
    codes = np.array([0x7F, 0xFF])
    assert np.isnan(scalar.E4M3.decode(codes)).all()


@pytest.mark.parametrize("table", [scalar.E2M1, scalar.E4M3], ids=["e2m1", "e4m3"])
def test_encoder_at_every_midpoint(table: scalar.MiniFloat) -> None:
    """Just below a midpoint rounds down, just above up, on it to the even code; what lies beyond saturates."""
    low, high = table.values[:-1].astype(np.float32), table.values[1:].astype(np.float32)
    middle = ((low + high) / 2).astype(np.float32)
    index = np.arange(len(low))
    infinity = np.float32(np.inf)
    assert (table.encode(np.nextafter(middle, np.float32(0))) == index).all()
    assert (table.encode(np.nextafter(middle, infinity)) == index + 1).all()
    assert (table.encode(middle) == index + index % 2).all()
    assert (table.encode(-high) == index + 1 + table.sign_bit).all()
    largest = len(table.values) - 1
    assert table.encode(np.array([infinity, -infinity, 1e30, np.nan, -0.0, -1e-30], np.float32)).tolist() == [
        largest,
        largest + table.sign_bit,
        largest,
        table.nan,
        0,
        0,
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """Every value of D, the midpoint to its neighbor, and one step to either side. torch's casts differ in NaN and -0 only."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    near = [values, middles, *(torch.nextafter(middles, torch.tensor(x)) for x in (torch.inf, -torch.inf)), torch.tensor([3e38, -3e38])]
    x = torch.cat(near)
    wanted = x.to(dtype).view(torch.int16).numpy().view(np.uint16)
    wanted = np.where(wanted == 0x8000, 0, wanted)
    assert (scalar.narrow(x.numpy(), str(dtype).removeprefix("torch.")) == wanted).all()  # type: ignore[arg-type]


def test_one_nan_and_no_negative_zero() -> None:
    x = np.array([np.nan, -np.nan, -0.0, 0.0], np.float32)
    assert scalar.narrow(x, "float32").tolist() == [0x7FFFFFFF, 0x7FFFFFFF, 0, 0]
    assert scalar.narrow(x, "float16").tolist() == [0x7FFF, 0x7FFF, 0, 0]
    assert scalar.narrow(x, "bfloat16").tolist() == [0x7FFF, 0x7FFF, 0, 0]


def test_mean_square_order_element_by_element() -> None:
    """The same sum with one float32 at a time."""
    y = make_inputs("outlier", rank=0, tokens=1, hidden_size=576, dtype=torch.float32).partial.numpy()
    f = np.float32
    total = f(0)
    for start in range(0, 768, 256):
        sums = []
        for lane in range(start, start + 256, 8):
            squares = [f(y[0, i] * y[0, i]) if i < 576 else f(0) for i in range(lane, lane + 8)]
            sums.append(squares[0])
            for square in squares[1:]:
                sums[-1] = f(sums[-1] + square)
        for half in (16, 8, 4, 2, 1):
            for i in range(half):
                sums[i] = f(sums[i] + sums[i + half])
        total = f(total + sums[0])
    wanted = f(total / f(576))
    assert scalar.mean_square(y)[0].view(np.uint32) == wanted.view(np.uint32)
    assert wanted != np.square(y[0, ::-1].astype(np.float32)).cumsum(dtype=np.float32)[-1] / f(576), "this input must tell orders apart"


def test_order_of_ranks_shows() -> None:
    """The input named "order" tells every order of three ranks from rank order."""
    partials = make_partials("order", 3, tokens=1, hidden_size=6, dtype=torch.float32)
    arrays = [p.numpy() for p in partials]
    right = scalar.sum_in_rank_order(arrays)
    for order in itertools.permutations(range(3)):
        same = (scalar.sum_in_rank_order([arrays[i] for i in order]) == right).all()
        assert same == (order[2] == 2), "only the first two terms may change places"


@pytest.mark.parametrize(
    ("label", "tokens", "columns", "places", "size"),
    [
        (
            "nvfp4/128x4",
            130,
            6,
            {(0, 0): 0, (1, 0): 16, (32, 0): 4, (127, 3): 511, (0, 4): 512, (128, 0): 1024, (129, 5): 1553},
            2048,
        ),
        ("nvfp4/8x4", 9, 6, {(0, 0): 0, (1, 0): 4, (7, 3): 31, (0, 4): 32, (8, 0): 64, (8, 5): 97}, 128),
        ("nvfp4/linear", 3, 5, {(0, 0): 0, (1, 0): 5, (2, 4): 14}, 15),
        ("fp8_group16/ue8m0/row", 3, 5, {(1, 0): 5, (2, 4): 14}, 15),
        ("fp8_group16/ue8m0/column", 5, 6, {(0, 0): 0, (0, 3): 3, (1, 0): 4, (4, 1): 17, (0, 4): 32, (4, 5): 49}, 64),
    ],
)
def test_places_of_scale_bytes(label: str, tokens: int, columns: int, places: dict[tuple[int, int], int], size: int) -> None:
    quant = parse(label)
    assert quant is not None
    for place, index in places.items():
        scale = np.zeros((tokens, columns), np.uint8)
        scale[place] = 9
        storage = scalar.lay_out(scale, quant).storage
        assert storage.size == size
        assert np.flatnonzero(storage).tolist() == [index], place
