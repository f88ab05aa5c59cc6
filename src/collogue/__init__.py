"""Collogue: all-reduce, residual, RMSNorm and quantisation in one GPU kernel, with the same bits everywhere.

>>> comm = collogue.Communicator(group, max_tokens=4096, hidden_size=7168)
>>> out = comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())
"""

from collogue import errors, formats, reference
from collogue.communicator import Communicator
from collogue.errors import CollectiveError, CollectiveTimeout, CollogueError, MismatchedCall, NotPrepared
from collogue.journal import Journal
from collogue.plan import Plan
from collogue.reference import dequantize, quantize
from collogue.spec import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Output, Quant, RMSNorm

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
    "dequantize",
    "errors",
    "formats",
    "quantize",
    "reference",
]
