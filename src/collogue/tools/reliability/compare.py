"""Outputs compared with what they must be, on the device, by one kernel for each call: cheap enough to check every call of millions.

The kernel counts words that differ and then writes the complement of what was expected into the output, so that a call that does not
write, or an older call's words, can never pass for the next one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch

from collogue.contract.formats import scale_storage
from collogue.contract.spec import Output
from collogue.gpu import jit
from collogue.planning.architecture import architecture_of

#: Most outputs of one call.
MOST = 4
_THREADS, _WORDS_PER_CTA, _MOST_CTAS = 256, 4096, 264
_NAME = "collogue_compare"
SOURCE = f"""
struct Parts {{
  unsigned* actual[{MOST}];
  const unsigned* expected[{MOST}];
  unsigned long long words[{MOST}];
  unsigned long long* counts;  // words that differ, comparisons
}};
extern "C" __global__ void __launch_bounds__({_THREADS}) {_NAME}(const __grid_constant__ Parts p) {{
  const unsigned long long first = blockIdx.x * {_THREADS}ull + threadIdx.x, step = gridDim.x * {_THREADS}ull;
  unsigned long long differ = 0;
  for (int i = 0; i < {MOST}; i++)
    for (unsigned long long w = first; w < p.words[i]; w += step) {{
      const unsigned expected = p.expected[i][w];
      differ += p.actual[i][w] != expected;
      p.actual[i][w] = ~expected;
    }}
  if (differ) atomicAdd(p.counts, differ);
  if (first == 0) atomicAdd(p.counts + 1, 1ull);
}}
"""


class _Parts(ctypes.Structure):
    """Mirrors ``Parts`` in :data:`SOURCE`."""

    _fields_ = [
        ("actual", ctypes.c_void_p * MOST),
        ("expected", ctypes.c_void_p * MOST),
        ("words", ctypes.c_uint64 * MOST),
        ("counts", ctypes.c_void_p),
    ]


class Comparer:
    """Compares on one device. ``counts``: words that differed and comparisons made since it was made, in its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._kernel: Any = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            code, _ = jit.compile_source(SOURCE, architecture_of((properties.major, properties.minor)), _NAME)
            self._kernel = jit.load(code, _NAME)
            torch.cuda.synchronize(device)  # other streams will count

    def of(self, actual: Output, expected: Output) -> Callable[[], None]:
        """What compares ``actual``, in the memory it has now, with ``expected`` and spoils it; on the current stream."""
        pairs = [(words_of(getattr(actual, name), name), words_of(tensor, name)) for name, tensor in expected.items()]
        pairs = [pair for pair in pairs if pair[1].numel()]
        for left, right in pairs:
            assert left.shape == right.shape
            left.copy_(~right)
        return (lambda: self._compare(pairs)) if self._kernel is None else self._launch_of(pairs)

    def read(self) -> tuple[int, int]:
        """``counts`` when all that has been queued on the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wrong, made = self.counts.tolist()
        return int(wrong), int(made)

    def _compare(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The same in PyTorch, for the CPU."""
        for left, right in pairs:
            self.counts[0] += (left != right).sum()
            left.copy_(~right)
        self.counts[1] += 1

    def _launch_of(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
        from cuda.bindings import driver

        parts = _Parts(counts=self.counts.data_ptr())
        for i, (left, right) in enumerate(pairs):
            parts.actual[i], parts.expected[i], parts.words[i] = left.data_ptr(), right.data_ptr(), left.numel()
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parts))
        ctas = max(1, min(_MOST_CTAS, -(-sum(left.numel() for left, _ in pairs) // _WORDS_PER_CTA)))
        function = driver.CUfunction(int(self._kernel.handle))

        def launch(keep: object = (parts, pairs)) -> None:
            stream = torch.cuda.current_stream(self.device).cuda_stream
            (error,) = driver.cuLaunchKernel(
                function, ctas, 1, 1, _THREADS, 1, 1, 0, driver.CUstream(stream), ctypes.addressof(arguments), 0
            )
            if error:
                raise RuntimeError(f"the comparison could not be launched: {error!r}")

        return launch


def words_of(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """The memory of an output as 32-bit words, padding of scales included. Its size must be a multiple of 4 bytes."""
    flat = scale_storage(tensor) if name == "scales" else tensor.reshape(-1)
    return flat.view(torch.uint8).view(torch.int32)
