"""Run a model over its calibration text and collect what each quantized projection reads: a :class:`collogue.Calibration`."""

from __future__ import annotations

import torch

from collogue.contract.calibration import Calibration
from collogue.tools.accuracy.measure import forward
from collogue.tools.accuracy.models import Model
from collogue.tools.accuracy.orders import contract
from collogue.tools.demo.weights import ModelShape


def readers(shape: ModelShape, call: int) -> tuple[str, ...]:
    """The modules of a transformers Llama that read fused call ``call``; the last one feeds the vocabulary projection."""
    if call == shape.fused_calls - 1:
        return ("lm_head",)
    layer, mlp = divmod(call, 2)
    names = ("mlp.gate_proj", "mlp.up_proj") if mlp else ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return tuple(f"model.layers.{layer}.{name}" for name in names)


def calibrate(model: Model, *, world_size: int = 1, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Calibration:
    """Run ``model`` over its calibration tokens, unquantized. The vocabulary projection's input is left out: it stays unquantized."""
    found = Calibration()
    seen = forward(model, model.calibration, world_size=world_size, dtype=dtype, order=contract, keep_norms=True, rows=found, device=device)
    for call, norm in enumerate(seen.norms[:-1]):
        for name in readers(model.shape, call):
            found.observe(name, norm)
    return found
