"""Calibration: the largest magnitude that each quantised tensor reaches over some text, and static scales from it, by convention.

A checkpoint's scale may be the number that values are divided by before they are encoded (**divisor**) or the number they are multiplied
by (**multiplier**); a name alone does not tell. :data:`CONVENTIONS` says it for each. Works with any model: a :class:`Calibration` is
told tensors by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from collogue.contract.quant import E2M1_MAX, E4M3_MAX
from collogue.errors import FormatError, ScaleError
from collogue.tools.accuracy.measure import forward
from collogue.tools.accuracy.models import Model
from collogue.tools.accuracy.orders import contract
from collogue.tools.demo.weights import ModelShape

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
    """The largest magnitude of every tensor seen, by name."""

    amax: dict[str, float] = field(default_factory=dict)

    def observe(self, name: str, tensor: torch.Tensor) -> None:
        """Take ``tensor`` (any shape) into account. NaN is ignored, as amax ignores it everywhere. Reads the tensor: synchronises."""
        largest = float(tensor.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax()) if tensor.numel() else 0.0
        self.amax[name] = max(self.amax.get(name, 0.0), largest)

    def scales(self, format: str, convention: str = "collogue") -> dict[str, float]:
        """``name.SUFFIX`` -> scale, rounded to float32, of every tensor.

        Args:
            format: ``"fp8_static"`` or ``"nvfp4"``.
            convention: a name of :data:`CONVENTIONS`.
        Raises:
            FormatError: there is no such convention, or it has no such format.
            ScaleError: a tensor was all zeros or infinite.
        """
        suffix, direction = convention_of(format, convention)
        found = {}
        for name, amax in self.amax.items():
            if not 0.0 < amax < torch.inf:
                raise ScaleError(f"{name} has the largest magnitude {amax}", hint="calibrate with text that this part of the model sees")
            divisor = amax / LARGEST[format]
            found[f"{name}.{suffix}"] = float(torch.tensor(divisor if direction == "divisor" else 1.0 / divisor, dtype=torch.float32))
        return found


def convention_of(format: str, convention: str) -> tuple[str, Direction]:
    """Suffix and direction. Raises :class:`FormatError` where there is none."""
    if convention not in CONVENTIONS:
        raise FormatError(f"there is no convention {convention!r}", hint=f"choose from {', '.join(CONVENTIONS)}")
    known = CONVENTIONS[convention].formats
    if format not in known:
        raise FormatError(f"the convention {convention} has no static scale for {format}", hint=f"it has {', '.join(known)}")
    return known[format]


def readers(shape: ModelShape, call: int) -> tuple[str, ...]:
    """The modules of a transformers Llama that read fused call ``call``; the last one feeds the vocabulary projection."""
    if call == shape.fused_calls - 1:
        return ("lm_head",)
    layer, mlp = divmod(call, 2)
    names = ("mlp.gate_proj", "mlp.up_proj") if mlp else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return tuple(f"model.layers.{layer}.{name}" for name in names)


def calibrate(model: Model, *, world_size: int = 1, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Calibration:
    """Run ``model`` over its calibration tokens, unquantised. The vocabulary projection's input is left out: it stays unquantised."""
    found = Calibration()
    seen = forward(model, model.calibration, world_size=world_size, dtype=dtype, order=contract, keep_norms=True, device=device)
    for call, norm in enumerate(seen.norms[:-1]):
        for name in readers(model.shape, call):
            found.observe(name, norm)
    return found


def document(calibration: Calibration, format: str, convention: str, **about: Any) -> dict[str, Any]:
    """Scales with what is needed to read them right."""
    suffix, direction = convention_of(format, convention)
    return {
        **about,
        "format": format,
        "convention": convention,
        "suffix": suffix,
        "direction": direction,
        "divisor": f"amax / {LARGEST[format]:g}",
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
