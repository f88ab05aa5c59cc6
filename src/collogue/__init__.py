"""Collogue: all-reduce, residual, RMSNorm and quantization in one GPU kernel, with the same bits everywhere.

Examples:
    >>> comm = collogue.Communicator(group, max_tokens=4096, hidden_size=7168)
    >>> out = comm.all_reduce(partial, residual=residual, norm=collogue.RMSNorm(weight), quant=collogue.FP8PerToken())

Public names are imported when they are first used. ``torch.ops.collogue`` is registered by ``import collogue`` where torch has been
imported before, else by the first public name that is used: where ``import collogue`` comes first, make the communicator (or
``import collogue.ops``) before ``torch.export.load``.
"""

import sys as _sys

TYPE_CHECKING = False  # type checkers take it for true; `typing` takes longer to import than the rest of this file
if TYPE_CHECKING:
    from collogue import errors
    from collogue.communicator import Communicator
    from collogue.contract import formats, reference
    from collogue.contract.calibration import Calibration
    from collogue.contract.prologue import ExpertCombine, ExpertReduce, Gated, PrologueForm
    from collogue.contract.quant import MXFP4, MXFP8, NVFP4, FP8Group, FP8PerToken, FP8Static, Quant
    from collogue.contract.reference import dequantize
    from collogue.contract.spec import Output, RMSNorm
    from collogue.errors import CollectiveError, CollectiveTimeout, CollogueError, MismatchedCall, NotPrepared
    from collogue.functions import quantize
    from collogue.gpu.journal import Journal
    from collogue.planning.plan import Plan
    from collogue.pytorch import nn
    from collogue.pytorch.cut import full_state_dict
    from collogue.pytorch.fusion import compile
    from collogue.pytorch.parallel import parallelize

__version__ = "0.2.0"

__all__ = [
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "Calibration",
    "CollectiveError",
    "CollectiveTimeout",
    "CollogueError",
    "Communicator",
    "ExpertCombine",
    "ExpertReduce",
    "FP8Group",
    "FP8PerToken",
    "FP8Static",
    "Gated",
    "Journal",
    "MismatchedCall",
    "NotPrepared",
    "Output",
    "Plan",
    "PrologueForm",
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

#: Where public names are; a name that is not here is a module of its own.
_HOMES = {
    "Calibration": "collogue.contract.calibration",
    "Communicator": "collogue.communicator",
    "Journal": "collogue.gpu.journal",
    "Plan": "collogue.planning.plan",
    "compile": "collogue.pytorch.fusion",
    "full_state_dict": "collogue.pytorch.cut",
    "parallelize": "collogue.pytorch.parallel",
    **dict.fromkeys(("MXFP4", "MXFP8", "NVFP4", "FP8Group", "FP8PerToken", "FP8Static", "Quant"), "collogue.contract.quant"),
    **dict.fromkeys(("ExpertCombine", "ExpertReduce", "Gated", "PrologueForm"), "collogue.contract.prologue"),
    "dequantize": "collogue.contract.reference",
    "quantize": "collogue.functions",
    **dict.fromkeys(("Output", "RMSNorm"), "collogue.contract.spec"),
    **dict.fromkeys(("CollectiveError", "CollectiveTimeout", "CollogueError", "MismatchedCall", "NotPrepared"), "collogue.errors"),
}


if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module("collogue.ops")
        module = import_module(_HOMES.get(name, f"collogue.{name}"))
        found = getattr(module, name) if name in _HOMES else module
        globals()[name] = found
        return found


del TYPE_CHECKING


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


if _sys.modules.get("torch") is not None:
    __import__("collogue.ops")
