"""The kernels on the CPU, their ranks, CTAs and threads interleaved by a seeded adversary: how the protocol is tested without a GPU.

The kernel sources are compiled as they are by a C++ compiler; `host_ptx.cuh` stands in for `kernels/ptx.cuh`, the one file that
holds PTX. All ranks run in one thread: every GPU thread is a fibre, and `machine.hpp` chooses at every scheduling point who goes on.

Modelled: streams with programmatic dependent launch (the next kernel's CTAs may start early, and wait for the end of this one);
stores to peers and to slots, whose 32-bit words arrive one by one, late and in any order, but after a fence's earlier stores and
before the kernel's end; warp collectives, block and cluster barriers, mbarriers with transactions that arrive late; a clock that
counts scheduling points; GPUs that hold few CTAs at a time, several communicators on them, and kernels of others that write weights and
scales late. Besides wrong results it finds deadlocks, stores outside peer memory, lanes that meet at different
places, words for a CTA that has ended, and barriers misused.

Not modelled: loads that return old values or overtake each other; shared memory (but that a CTA stores where another one sends is an
error), counters and ordinary stores to other than slots are seen at once; lanes of a converged warp that read one address together see
one value.
"""

from collogue.testing.emulator.build import Case, Edit, Library, compile_cases, edited
from collogue.testing.emulator.run import MODES, Ask, Run, emulate

__all__ = ["MODES", "Ask", "Case", "Edit", "Library", "Run", "compile_cases", "edited", "emulate"]
