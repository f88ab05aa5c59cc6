"""`collogue.Calibration`: amax, conventions, and scales that are right or refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from collogue import NVFP4, Calibration, FP8Static, reference
from collogue.contract.calibration import CONVENTIONS, convention_of, document, write
from collogue.contract.number import is_scale
from collogue.errors import ArgumentError, CollogueError, FormatError, ScaleError
from collogue.tools.accuracy.measure import sqnr

F32 = torch.float32
#: The least float32 that is a scale, and the one before it, whose inverse is infinite.
LEAST, TOO_SMALL = 2.0**-128 + 2.0**-149, 2.0**-128
MOST = 2.0**128 - 2.0**104


def test_a_calibration_keeps_the_amax() -> None:
    found = Calibration()
    found.observe("a", torch.tensor([1.0, -3.0, float("nan")]))
    found.observe("a", torch.tensor([[2.0]], dtype=torch.bfloat16))
    found.observe("a", torch.empty(0))
    found.observe("b", torch.tensor([0.5]))
    assert found.amax == {"a": 3.0, "b": 0.5}


@pytest.mark.parametrize(
    ("convention", "format", "name", "value"),
    [
        ("collogue", "fp8_static", "a.scale", 21.0 / 448),
        ("collogue", "nvfp4", "a.global_scale", 448 * 6 / 21.0),
        ("modelopt", "fp8_static", "a.input_scale", 21.0 / 448),
        ("modelopt", "nvfp4", "a.input_scale", 21.0 / (448 * 6)),
        ("compressed-tensors", "fp8_static", "a.input_scale", 21.0 / 448),
        ("compressed-tensors", "nvfp4", "a.input_global_scale", 448 * 6 / 21.0),
        ("torchao", "nvfp4", "a.per_tensor_scale", 21.0 / (448 * 6)),
    ],
)
def test_conventions(convention: str, format: str, name: str, value: float) -> None:
    found = Calibration({"a": 21.0}).scales(format, convention)
    assert found == {name: float(torch.tensor(value, dtype=torch.float32))}


def test_the_scales_of_this_library_decode_what_was_seen() -> None:
    """Direction, checked by use: the amax comes back, and the next format step below it too."""
    n = torch.tensor([[3.5, -7.0, 0.25, 1.0] * 4], dtype=torch.float32)
    found = Calibration()
    found.observe("x", n)
    for format, kind in (("fp8_static", FP8Static), ("nvfp4", NVFP4)):
        quant = kind(next(iter(found.scales(format).values())))  # type: ignore[operator]
        decoded = reference.dequantize(*reference.quantize(n, quant), quant, hidden_size=16)
        assert decoded[0, 1] == pytest.approx(-7.0, rel=1e-6)
        assert sqnr(n, quant) > 20


def test_conventions_that_are_not_there_and_dead_tensors() -> None:
    with pytest.raises(FormatError, match="no static scale for fp8_static"):
        Calibration({"a": 1.0}).scales("fp8_static", "torchao")
    with pytest.raises(FormatError, match="unknown convention 'mine'"):
        convention_of("nvfp4", "mine")
    for dead in (0.0, math.inf):
        with pytest.raises(ScaleError, match="has amax"):
            Calibration({"a": dead}).scales("nvfp4")


def test_a_scale_and_its_inverse_are_finite_in_float32() -> None:
    """The bounds, compared with what float32 says of numbers on both sides of them."""
    near = [TOO_SMALL, LEAST, TOO_SMALL + 2.0**-150, TOO_SMALL + 2.0**-150 + 2.0**-190, MOST, MOST + 2.0**103 - 2.0**80, MOST + 2.0**103]
    for value in (*near, 0.0, -1.0, 1.0, 2.9e-39, 3e-39, 1e-45, 3.4e38, 3.5e38, math.inf, -math.inf, math.nan):
        scale = torch.tensor(value, dtype=F32)
        pair = (scale, 1.0 / scale)
        assert is_scale(value) == all(bool(x.isfinite() and x > 0) for x in pair), value
    for value in (2.0**119, 2.0**119 - 2.0**94, 2.0**119 - 2.0**94 - 2.0**70, 2.0**119 - 2.0**95):
        assert is_scale(value, 119) == bool((torch.tensor(value, dtype=F32) / 2.0**-9).isfinite()), value


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("format", ["fp8_static", "nvfp4"])
@pytest.mark.parametrize("amax", [1e-45, 1e-42, 7e-36, 1e-33, 1.3e-36, 1e-30, 1.0, 3e38, 2.0**128 - 2.0**104])
def test_scales_are_usable_or_refused(convention: str, format: str, amax: float) -> None:
    """What comes out, its inverse and the arguments of the formats are finite and not zero."""
    if format not in CONVENTIONS[convention].formats:
        pytest.skip("no such scale")
    _, direction = convention_of(format, convention)
    try:
        [scale] = Calibration({"a": amax}).scales(format, convention).values()
    except ScaleError:
        assert amax < 1e-32
        return
    assert amax > 1e-36
    assert all(0 < float(x) < math.inf for x in (torch.tensor(scale, dtype=F32), 1 / torch.tensor(scale, dtype=F32)))
    as_divisor = scale if direction == "divisor" else float(1 / torch.tensor(scale, dtype=F32))
    quant: Any = FP8Static(as_divisor) if format == "fp8_static" else NVFP4(float(1 / torch.tensor(as_divisor, dtype=F32)))
    decoded = reference.dequantize(*reference.quantize(torch.zeros(1, 16), quant), quant, hidden_size=16)
    assert torch.equal(decoded, torch.zeros(1, 16))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    ("kind", "least", "most"), [(FP8Static, LEAST, MOST), (NVFP4, LEAST, 2.0**119 - 2.0**95)], ids=["FP8Static", "NVFP4"]
)
def test_formats_refuse_what_turns_zeros_into_other_numbers(kind: Any, least: float, most: float, as_tensor: bool) -> None:
    """Also with ``validate=True``, and of every shape of one element."""

    def made(value: float) -> list[Any]:
        if not as_tensor:
            return [lambda: kind(value), lambda: kind(value, validate=True)]
        tensor = torch.tensor(value, dtype=F32)
        return [lambda: kind(tensor), lambda: kind(tensor[None], validate=True), lambda: kind(tensor[None, None])]

    for wrong in (TOO_SMALL, 2.9e-39, 1e-45, most * 1.001):
        for make in made(wrong):
            with pytest.raises(ScaleError, match="must be positive and finite, above 2"):
                make()
    for right in (least, 1.0, most):
        for make in made(right):
            quant = make()
            # A small block beside zeros: the block scale of NVFP4 is then the smallest there is, or zero.
            for small in (0.0, 2.0**-149, 2.0**-130, 1e-36):
                n = torch.zeros(1, 16)
                n[0, 0] = small
                decoded = reference.dequantize(*reference.quantize(n, quant), quant, hidden_size=16)
                assert torch.equal(decoded[0, 1:], torch.zeros(15)), (right, small)


def test_parts_are_merged() -> None:
    first, second = Calibration({"a": 1.0, "b": 2.0}), Calibration({"b": 3.0, "c": 0.5})
    first.merge(second)
    assert first.amax == {"a": 1.0, "b": 3.0, "c": 0.5}


def test_the_inputs_of_linear_layers_are_observed_while_asked_for() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    seen = Calibration()
    with torch.no_grad(), seen.observing(model):
        model(torch.tensor([[1.0, -5.0, 2.0, 0.0]]))
    with torch.no_grad():
        model(torch.full((1, 4), 100.0))
    assert seen.amax["0"] == 5.0
    assert set(seen.amax) == {"0", "2"}


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize(("convention", "format"), [(name, format) for name, each in CONVENTIONS.items() for format in each.formats])
def test_a_file_comes_back(convention: str, format: str, suffix: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    found = Calibration({f"layer.{index}": float(value) for index, value in enumerate(torch.rand(200, generator=generator) * 50)})
    path = tmp_path / f"scales{suffix}"
    write(document(found, format, convention, model="m"), path)
    loaded = Calibration.load(path)
    assert loaded.amax == pytest.approx(found.amax, rel=1e-7)
    assert loaded.scales(format, convention) == found.scales(format, convention)


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (None, ArgumentError, "there is no file"),
        ("{", ArgumentError, "is not a file of collogue calibrate"),
        ("{}", ArgumentError, "KeyError: 'format'"),
        ('{"format": "nvfp4", "convention": "x", "scales": {}}', FormatError, "unknown convention 'x'"),
        ('{"format": "nvfp4", "convention": "modelopt", "scales": {"a.scale": 1.0}}', ArgumentError, r"a\.scale, which does not end in"),
        ('{"format": "nvfp4", "convention": "modelopt", "scales": {"a.input_scale": 0.0}}', ScaleError, r"a\.input_scale in .* is 0\.0"),
        ('{"format": "nvfp4", "convention": "modelopt", "scales": {"a.input_scale": "1"}}', ScaleError, "is '1'"),
    ],
)
def test_files_that_are_none(text: str | None, error: type[CollogueError], match: str, tmp_path: Path) -> None:
    path = tmp_path / "scales.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=match) as caught:
        Calibration.load(path)
    assert caught.value.hint


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("change", [{"direction": "multiplier"}, {"suffix": "input_global_scale"}, {"divisor": "amax / 2688"}])
def test_a_file_that_says_something_else_than_its_convention(change: dict[str, str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scales{suffix}"
    write(document(Calibration({"a": 3.0}), "fp8_static", "modelopt") | change, path)
    [(key, value)] = change.items()
    with pytest.raises(ScaleError, match=f"says {key} {value!r}, where fp8_static in the convention modelopt has") as caught:
        Calibration.load(path)
    assert caught.value.hint


def test_an_amax_that_is_no_number() -> None:
    later: Any = Calibration({"b": 1.0})
    later.amax["a"] = "3.5"
    for make in (lambda: Calibration({"a": "3.5"}), lambda: later.scales("fp8_static")):  # type: ignore[dict-item]
        with pytest.raises(ScaleError, match=r"a has amax '3\.5', a str"):
            make()
    with pytest.raises(ArgumentError, match="amax is a list"):
        Calibration([3.0])  # type: ignore[arg-type]
