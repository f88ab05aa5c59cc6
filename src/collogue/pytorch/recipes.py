"""How a model that is not quantized becomes one on load: the formats by name, and the static scales of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from collogue.contract.calibration import Calibration
from collogue.contract.quant import E2M1_MAX, E4M3_MAX, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static
from collogue.contract.weight import FP8Block, QuantizedWeight
from collogue.errors import ArgumentError, ScaleError
from collogue.pytorch.checkpoints import QuantizedLinear

#: What ``quant=`` of ``parallelize`` takes.
RECIPES = ("fp8_per_token", "fp8_block", "fp8_static", "mxfp8", "nvfp4")


@dataclass(frozen=True)
class Recipe:
    """What every linear layer inside decoder layers is quantized to.

    ==================  ===================================  =================================
    name                weights                              inputs
    ==================  ===================================  =================================
    ``fp8_per_token``   one scale per output feature         FP8PerToken
    ``fp8_block``       blocks of 128 x 128                  FP8Group(128), scales column by column
    ``fp8_static``      one scale, ``amax / 448``            FP8Static
    ``mxfp8``           MXFP8, rounding "ceil"               MXFP8, the same
    ``nvfp4``           NVFP4, ``g = 448 * 6 / amax``        NVFP4
    ==================  ===================================  =================================

    Args:
        scales: of the inputs of ``fp8_static`` (divisors) and ``nvfp4`` (multipliers), by the layers' names in the model.
    """

    name: str
    scales: Mapping[str, float]

    @classmethod
    def of(cls, name: str | None, calibration: Calibration | None) -> Recipe | None:
        """The recipe of this name; ``None`` for ``None``.

        Raises:
            ArgumentError: an unknown name, or a calibration that is missing or not used. ScaleError.
        """
        if name is None and calibration is None:
            return None
        if name is None:
            raise ArgumentError("calibration= is given without quant=", hint='pass quant="fp8_static" or quant="nvfp4" as well')
        if name not in RECIPES:
            raise ArgumentError(f"unknown quant {name!r}", hint=f"choose from {', '.join(RECIPES)}")
        needed = name in ("fp8_static", "nvfp4")
        if needed != (calibration is not None):
            if needed:
                raise ArgumentError(f"quant={name!r} needs calibration=", hint="run collogue calibrate, or fill a collogue.Calibration")
            raise ArgumentError(f"quant={name!r} takes no calibration", hint="its scales are computed from each input")
        if not isinstance(calibration, Calibration | None):
            raise ArgumentError(
                f"calibration is a {type(calibration).__name__}", hint="pass a collogue.Calibration, or collogue.Calibration.load(path)"
            )
        return cls(name, {} if calibration is None else calibration.scales(name))

    def quantize(self, weight: Tensor, name: str) -> QuantizedLinear:
        """The layer called ``name`` in the model.

        Raises:
            ScaleError: a weight of "fp8_static" or "nvfp4" that is all zeros, or not finite. ArgumentError: no amax of its input.
        """
        if self.name == "fp8_per_token":
            return QuantizedLinear(QuantizedWeight.of(weight, FP8PerToken()), FP8PerToken())
        if self.name == "fp8_block":
            return QuantizedLinear(QuantizedWeight.of(weight, FP8Block()), FP8Group(128, layout="column"))
        if self.name == "mxfp8":
            return QuantizedLinear(QuantizedWeight.of(weight, MXFP8("ceil", "linear")), MXFP8("ceil"))
        amax = float(weight.detach().abs().max())
        if not 0.0 < amax < torch.inf:
            raise ScaleError(f"the weight has amax {amax}", hint="quantize weights that are finite and not all zero")
        if self.name == "fp8_static":
            return QuantizedLinear(QuantizedWeight.of(weight, FP8Static(amax / E4M3_MAX)), FP8Static(self._scale(name, "scale")))
        largest = NVFP4(E4M3_MAX * E2M1_MAX / amax, "linear")
        return QuantizedLinear(QuantizedWeight.of(weight, largest), NVFP4(self._scale(name, "global_scale")))

    def _scale(self, name: str, suffix: str) -> float:
        found: Any = self.scales.get(f"{name}.{suffix}")
        if found is None:
            known = (each.removesuffix(f".{suffix}") for each in self.scales)
            other = next((each for each in known if f".{each}".endswith(f".{name}") or name.endswith(f".{each}")), None)
            if other is None:
                raise ArgumentError(f"the calibration has no amax of {name}", hint="calibrate every linear layer inside decoder layers")
            raise ArgumentError(
                f"the calibration has no amax of {name}, but one of {other}: a whole model's names have the base model's prefix",
                hint="calibrate and parallelize the same of the two",
            )
        return float(found)
