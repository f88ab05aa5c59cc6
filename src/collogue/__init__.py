"""Collogue: all-reduce, residual, RMSNorm and quantisation in one GPU kernel, with the same bits everywhere.

>>> comm = collogue.Communicator(group, max_tokens=4096, hidden_size=7168)
>>> out = comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
"""

import importlib
from typing import TYPE_CHECKING, Any

from collogue import errors
from collogue.communicator import Communicator
from collogue.contract import formats, reference
from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.contract.reference import dequantize, quantize
from collogue.contract.spec import Output, RMSNorm
from collogue.errors import CollectiveError, CollectiveTimeout, CollogueError, MismatchedCall, NotPrepared
from collogue.gpu.journal import Journal
from collogue.planning.plan import Plan

if TYPE_CHECKING:
    from collogue.pytorch import nn
    from collogue.pytorch.cut import full_state_dict
    from collogue.pytorch.fusion import compile
    from collogue.pytorch.parallel import parallelize

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "CollectiveError",
    "CollectiveTimeout",
    "CollogueError",
    "Communicator",
    "FP8Group",
    "FP8PerToken",
    "FP8Static",
    "Journal",
    "MismatchedCall",
    "NotPrepared",
    "Output",
    "Plan",
    "Quant",
    "RMSNorm",
    "compile",
    "dequantize",
    "errors",
    "formats",
    "full_state_dict",
    "nn",
    "parallelize",
    "quantize",
    "reference",
]

#: Names that bring modules along which `import collogue` does without.
_LATER = {
    "compile": ("collogue.pytorch.fusion", "compile"),
    "full_state_dict": ("collogue.pytorch.cut", "full_state_dict"),
    "nn": ("collogue.nn", None),
    "parallelize": ("collogue.pytorch.parallel", "parallelize"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'collogue' has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)
