"""Collogue: all-reduce, residual, RMSNorm and quantisation in one GPU kernel, with the same bits everywhere.

>>> comm = collogue.Communicator(group, max_tokens=4096, hidden_size=7168)
>>> out = comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
"""

import importlib
from typing import TYPE_CHECKING, Any

from collogue import errors, formats, reference
from collogue.communicator import Communicator
from collogue.errors import CollectiveError, CollectiveTimeout, CollogueError, MismatchedCall, NotPrepared
from collogue.journal import Journal
from collogue.plan import Plan
from collogue.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
from collogue.reference import dequantize, quantize
from collogue.spec import Output, RMSNorm

if TYPE_CHECKING:
    from collogue import nn
    from collogue.fusion import compile
    from collogue.parallel import parallelize

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
    "nn",
    "parallelize",
    "quantize",
    "reference",
]

#: Names that bring modules along which `import collogue` does without.
_LATER = {"compile": ("collogue.fusion", "compile"), "nn": ("collogue.nn", None), "parallelize": ("collogue.parallel", "parallelize")}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'collogue' has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)
