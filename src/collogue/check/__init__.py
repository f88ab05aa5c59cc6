"""``collogue check``: calls of a communicator against an independent answer, bit for bit.

On CPU groups the communicator runs the reference, and the answer is the scalar numpy version of the contract. On CUDA groups it
runs kernels, and the answer is the reference on the same GPU.
"""

from collogue.check.case import Case, CaseResult
from collogue.check.emulated import PROGRAMS, Emulated, run_programs
from collogue.check.full import full_sweep
from collogue.check.kernels import build_kernels
from collogue.check.rank import Answers, check_rank, run_case
from collogue.check.run import Report, run_cases
from collogue.check.sweep import default_sweep, expand, sweep

__all__ = [
    "PROGRAMS",
    "Answers",
    "Case",
    "CaseResult",
    "Emulated",
    "Report",
    "build_kernels",
    "check_rank",
    "default_sweep",
    "expand",
    "full_sweep",
    "run_case",
    "run_cases",
    "run_programs",
    "sweep",
]
