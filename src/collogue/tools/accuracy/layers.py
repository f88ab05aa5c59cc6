"""A model through layers with quantized weights and inputs: ``collogue.parallelize(model, group, quant=..)``, nothing simulated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch

from collogue.contract.calibration import Calibration
from collogue.errors import CollogueError
from collogue.pytorch.parallel import parallelize
from collogue.pytorch.recipes import RECIPES
from collogue.testing import VirtualGroup, run_virtual
from collogue.tools.accuracy.measure import score
from collogue.tools.accuracy.models import Model
from collogue.tools.demo.weights import as_transformers


def run(model: Model, expected: torch.Tensor, *, dtype: torch.dtype, started: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every recipe's score against ``expected`` logits on one rank, or why the model cannot have it. The first row is unquantized.

    Without transformers there are no rows.
    """
    if find_spec("transformers") is None:
        return []
    plain = as_transformers(model.shape, model.weights).to(dtype)
    seen = Calibration()
    with seen.observing(plain), torch.inference_mode():
        plain(model.calibration[None])

    def logits(recipe: str | None) -> torch.Tensor:
        calibration = seen if recipe in ("fp8_static", "nvfp4") else None

        def rank(group: VirtualGroup) -> torch.Tensor:
            mine = parallelize(copy.deepcopy(plain), group, max_tokens=len(model.tokens), quant=recipe, calibration=calibration)
            with torch.inference_mode():
                found: torch.Tensor = mine(model.tokens[None]).logits[0].float()
            return found

        return run_virtual(1, rank, timeout=600.0)[0]

    rows = []
    for recipe in (None, *RECIPES):
        name = recipe or "none"
        started(f"layers: {name}")
        try:
            rows.append({"quant": name, **asdict(score(logits(recipe), expected, model.tokens))})
        except CollogueError as error:
            rows.append({"quant": name, "error": error.message})
    return rows
