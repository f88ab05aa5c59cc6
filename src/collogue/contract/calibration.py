"""Calibration: the amax of activations over some text, and static scales from it under the names that checkpoints use.

A checkpoint's scale is either the number that values are divided by before they are encoded (**divisor**) or the number they are
multiplied by (**multiplier**); its name does not tell which. :data:`CONVENTIONS` says it for each kind of checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from collogue.contract.number import check_local, is_number, is_scale
from collogue.contract.quant import E2M1_MAX, E4M3_MAX, GLOBAL_SCALE_BITS
from collogue.errors import ArgumentError, FormatError, ScaleError

Direction = Literal["divisor", "multiplier"]
#: Largest value that the codes (and for NVFP4 the block scales) of a format reach: ``divisor = amax / LARGEST``.
LARGEST = {"fp8_static": E4M3_MAX, "nvfp4": E4M3_MAX * E2M1_MAX}


@dataclass(frozen=True)
class Convention:
    """How one kind of checkpoint stores the static scale of an activation, by format: tensor's name behind the module, and direction."""

    what: str
    formats: dict[str, tuple[str, Direction]]


CONVENTIONS: dict[str, Convention] = {
    "collogue": Convention(
        "the arguments of collogue.FP8Static and collogue.NVFP4",
        {"fp8_static": ("scale", "divisor"), "nvfp4": ("global_scale", "multiplier")},
    ),
    "modelopt": Convention(
        "TensorRT Model Optimizer's checkpoints", {"fp8_static": ("input_scale", "divisor"), "nvfp4": ("input_scale", "divisor")}
    ),
    "compressed-tensors": Convention(
        "llm-compressor's checkpoints",
        {"fp8_static": ("input_scale", "divisor"), "nvfp4": ("input_global_scale", "multiplier")},
    ),
    "torchao": Convention("torchao's NVFP4Tensor", {"nvfp4": ("per_tensor_scale", "divisor")}),
}


@dataclass
class Calibration:
    """The amax of every activation seen, by name, and static scales from it.

    ``amax = max(|x|)`` over all that was observed; ``divisor = amax / 448`` for FP8Static and ``amax / (448 * 6)`` for NVFP4;
    ``multiplier = 1 / divisor``. ``FP8Static(scale)`` takes a divisor, ``NVFP4(global_scale)`` a multiplier: what the convention
    ``"collogue"``, the default, gives.

    Args:
        amax: what is known already, by name.
    Examples:
        >>> seen = collogue.Calibration()
        >>> for batch in (partial, 2 * partial):  # or, for every layer: with seen.observing(model): model(tokens)
        ...     seen.observe("layers.0.mlp.down_proj", batch)
        >>> seen.scales("fp8_static")
        {'layers.0.mlp.down_proj.scale': 0.004464285913854837}
    """

    amax: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.amax, dict):
            raise ArgumentError(f"amax is a {type(self.amax).__name__}", hint="pass a dict of numbers by name")
        for name, amax in self.amax.items():
            _check(name, amax)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What ``collogue calibrate`` has written, in any convention: ``amax = divisor * 448`` or ``* (448 * 6)``, from ``1 / multiplier``.

        The file's scales are float32, so each amax is rounded so; :meth:`scales` of the file's format gives the file's scales.

        Args:
            path: a ``.json`` or ``.safetensors`` file.
        Raises:
            ArgumentError: no such file, or not one of ``collogue calibrate``. FormatError: a convention or format that is not known.
            ScaleError: a scale that is none, or a file that says another suffix, direction or divisor than its convention has.
        """
        path = Path(path)
        if not path.is_file():
            raise ArgumentError(f"there is no file {path}", hint="pass what collogue calibrate has written")
        try:
            data = _read(path)
            format, convention, scales = str(data["format"]), str(data["convention"]), dict(data["scales"])
        except Exception as error:
            raise ArgumentError(
                f"{path} is not a file of collogue calibrate ({type(error).__name__}: {error})",
                hint="pass a .json or .safetensors file with format, convention and scales",
            ) from None
        suffix, direction = convention_of(format, convention)
        for key, expected in _how(format, convention).items():
            if data.get(key, expected) != expected:
                raise ScaleError(
                    f"{path} says {key} {data[key]!r}, where {format} in the convention {convention} has {expected!r}",
                    hint=f"its scales may be inverted: calibrate again, or set {key} and the convention to what they are",
                )
        amax = {}
        for name, scale in scales.items():
            if not name.endswith(f".{suffix}"):
                raise ArgumentError(f"{path} has {name}, which does not end in .{suffix}", hint="pass the file as it was written")
            if not is_number(scale) or not is_scale(float(scale)):
                raise ScaleError(f"{name} in {path} is {scale!r}", hint="a scale is positive and finite; calibrate again")
            amax[name.removesuffix(f".{suffix}")] = scale * LARGEST[format] if direction == "divisor" else LARGEST[format] / scale
        return cls(amax)

    def observe(self, name: str, tensor: torch.Tensor) -> None:
        """Take ``tensor`` (any shape and dtype) into account. NaN is ignored, as amax ignores it everywhere. Synchronizes: reads it."""
        check_local(name, tensor)
        largest = float(tensor.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()) if tensor.numel() else 0.0
        self.amax[name] = max(self.amax.get(name, 0.0), largest)

    def merge(self, other: Calibration) -> None:
        """Take into account what ``other`` has seen: of another part of the data, or on another rank."""
        for name, amax in other.amax.items():
            self.amax[name] = max(self.amax.get(name, 0.0), amax)

    @contextmanager
    def observing(self, model: nn.Module) -> Iterator[None]:
        """Observe the input of every ``nn.Linear`` of ``model`` under the layer's name while the context lasts.

        >>> with seen.observing(model):
        ...     model(tokens)
        """
        hooks = [
            module.register_forward_pre_hook(lambda _, given, name=name: self.observe(name, given[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def scales(self, format: str, convention: str = "collogue") -> dict[str, float]:
        """``name.SUFFIX`` -> scale of every tensor: the quotient of the class's formula in float64, rounded once to float32.

        Args:
            format: ``"fp8_static"`` or ``"nvfp4"``.
            convention: whose names, and divisors or multipliers: ``"collogue"``, ``"modelopt"``, ``"compressed-tensors"``, ``"torchao"``.
        Raises:
            FormatError: unknown convention, or it has no such format.
            ScaleError: a tensor was all zeros or infinite, or so small or large that the scale or its inverse is 0 or infinite in float32.
        """
        suffix, direction = convention_of(format, convention)
        found = {}
        hint = "calibrate with text that this part of the model sees"
        for name, amax in self.amax.items():
            _check(name, amax)
            if not 0.0 < amax < torch.inf:
                raise ScaleError(f"{name} has amax {amax}", hint=hint)
            divisor, multiplier = amax / LARGEST[format], LARGEST[format] / amax
            if not (is_scale(divisor) and is_scale(multiplier, GLOBAL_SCALE_BITS if format == "nvfp4" else 128)):
                raise ScaleError(f"{name} has amax {amax:g}, whose scale or its inverse is 0 or infinite in float32", hint=hint)
            scale = divisor if direction == "divisor" else multiplier
            found[f"{name}.{suffix}"] = float(torch.tensor(scale, dtype=torch.float32))
        return found


def _check(name: str, amax: object) -> None:
    """Raise :class:`ScaleError` where an amax is not a number."""
    if not is_number(amax):
        raise ScaleError(f"{name} has amax {amax!r}, a {type(amax).__name__}", hint="pass max(|x|) as a float: float(tensor)")


def _read(path: Path) -> dict[str, Any]:
    """What :func:`write` has written."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            return {**(file.metadata() or {}), "scales": {name: float(file.get_tensor(name)) for name in file.keys()}}  # noqa: SIM118
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def convention_of(format: str, convention: str) -> tuple[str, Direction]:
    """Suffix and direction. Raises :class:`FormatError` where there is none."""
    if convention not in CONVENTIONS:
        raise FormatError(f"unknown convention {convention!r}", hint=f"choose from {', '.join(CONVENTIONS)}")
    known = CONVENTIONS[convention].formats
    if format not in known:
        raise FormatError(f"the convention {convention} has no static scale for {format}", hint=f"it has {', '.join(known)}")
    return known[format]


def _how(format: str, convention: str) -> dict[str, str]:
    """What a file says of its scales, so that they are read right."""
    suffix, direction = convention_of(format, convention)
    return {"suffix": suffix, "direction": direction, "divisor": f"amax / {LARGEST[format]:g}"}


def document(calibration: Calibration, format: str, convention: str, **about: Any) -> dict[str, Any]:
    """Scales with what is needed to read them right."""
    return {
        **about,
        "format": format,
        "convention": convention,
        **_how(format, convention),
        "scales": calibration.scales(format, convention),
    }


def write(data: dict[str, Any], path: Path) -> None:
    """To ``.safetensors`` (one float32 number a name, the rest as metadata) or, with any other ending, as JSON."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        tensors = {name: torch.tensor(value, dtype=torch.float32) for name, value in data["scales"].items()}
        save_file(tensors, str(path), metadata={name: str(value) for name, value in data.items() if name != "scales"})
    else:
        path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
