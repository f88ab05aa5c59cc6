"""``collogue check``: calls of a communicator against an independent answer, bit for bit.

On CPU groups the communicator runs the reference, and the answer is the scalar numpy version of the contract. On CUDA groups it
runs kernels, and the answer is the reference on the same GPU.
"""

from collogue.tools.check.case import Case, CaseResult
from collogue.tools.check.emulated import PROGRAMS, Emulated, run_programs
from collogue.tools.check.full import full_sweep
from collogue.tools.check.kernels import build_kernels
from collogue.tools.check.rank import Answers, check_rank, run_case
from collogue.tools.check.run import Report, run_cases
from collogue.tools.check.sweep import default_sweep, expand, sweep

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
