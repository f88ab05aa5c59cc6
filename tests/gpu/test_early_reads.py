"""Weights and scale tensors that the kernel before a call writes, after it has let the call's kernel start (PDL)."""

from __future__ import annotations

import pytest
import torch

from collogue import NVFP4, Communicator, FP8Static, Output, Quant, RMSNorm
from collogue.gpu import jit
from collogue.gpu.launch import Launcher
from collogue.planning.architecture import architecture_of
from collogue.planning.plan import LaunchShape
from collogue.testing import VirtualGroup, run_virtual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9, reason="no GPU with PDL"),
    pytest.mark.timeout(300),
]

TOKENS, WIDTH, CALLS = 4, 7168, 20
#: Of other people: one writes ``tokens`` words from ``partial`` to ``stream`` 0.3 ms after it has let the next kernel start, one does
#: nothing. Both let the next kernel start before they wait for the one before them, as many do.
SOURCE = """
#include "params.cuh"
#include "ptx.cuh"
extern "C" __global__ void late_writer(const __grid_constant__ collogue::Params p) {
  using namespace collogue;
  launch_next_kernel();
  wait_for_previous_kernel();
  for (const u64 from = time_ns(); time_ns() - from < 300000ull;) {
  }
  for (u32 i = thread_index(); i < p.tokens; i += thread_count()) store_word(p.stream + 4 * i, reinterpret_cast<const u32*>(p.partial)[i]);
}
extern "C" __global__ void passer_by(const __grid_constant__ collogue::Params p) {
  collogue::launch_next_kernel();
  collogue::wait_for_previous_kernel();
}
"""


def other(name: str) -> Launcher:
    code, _ = jit.compile_source(SOURCE, architecture_of(torch.cuda.get_device_capability()), name)
    return Launcher(jit.load(code, name), LaunchShape(128, 1, 1, 1), dependent=True)


def same(found: Output, right: Output) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().view(torch.uint8)

    return all(torch.equal(raw(one), raw(getattr(right, name))) for name, one in found.items())


def rank(group: VirtualGroup, what: str, between: int, graph: bool, early: bool = False) -> int:
    """How many calls have used what was there before: call i has a weight or scale of its own."""
    device = group.device
    generator = torch.Generator(device=device).manual_seed(group.rank)
    comm = Communicator(group, max_tokens=TOKENS, hidden_size=WIDTH, timeout=20.0)
    partial = torch.randn(TOKENS, WIDTH, device=device, generator=generator).bfloat16()
    weights = torch.rand(CALLS, WIDTH, device=device, generator=torch.Generator(device=device).manual_seed(9)).bfloat16()
    scales = torch.linspace(8.0, 40.0, CALLS, device=device)
    written = torch.ones(WIDTH, device=device).bfloat16() if what == "weight" else torch.ones(1, device=device)
    sources = weights if what == "weight" else scales
    kinds = {"nvfp4": NVFP4, "fp8_static": FP8Static}

    def call(value: torch.Tensor | float, *, early: bool, out: Output | None = None) -> Output:
        quant: Quant | None = None if what == "weight" else kinds[what](value)  # type: ignore[arg-type]
        norm = RMSNorm(value if what == "weight" else weights[0], prefetch=early)  # type: ignore[arg-type]
        return comm.all_reduce(partial, norm=norm, quant=quant, out=out)

    # The weight that is written before: everything is right without a kernel that writes it late.
    expected = [call(sources[i].clone() if what == "weight" else float(scales[i]), early=True) for i in range(CALLS)]
    outs = [call(written, early=early) for _ in range(CALLS)]
    writers, passing = [other("late_writer") for _ in range(CALLS)], other("passer_by")
    for i, writer in enumerate(writers):
        writer.params.partial, writer.params.stream = sources[i].data_ptr(), written.data_ptr()
        writer.params.tokens = sources[i].nbytes // 4
    group.settle()

    def chain() -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        for writer, out in zip(writers, outs, strict=True):
            writer(stream)
            for _ in range(between):
                passing(stream)
            call(written, early=early, out=out)

    if graph:
        recorded = torch.cuda.CUDAGraph()
        for one in range(group.size):  # one at a time
            if one == group.rank:
                with torch.cuda.graph(recorded, stream=torch.cuda.current_stream(device), capture_error_mode="thread_local"):
                    chain()
            group.settle()
        recorded.replay()
    else:
        chain()
    group.settle()
    wrong = sum(not same(out, right) for out, right in zip(outs, expected, strict=True))
    comm.check()
    comm.close()
    return wrong


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("between", [0, 1])
@pytest.mark.parametrize("what", ["weight", "nvfp4", "fp8_static"])
def test_what_is_written_late_is_read_late(what: str, between: int, graph: bool, world: int) -> None:
    """The kernel before the call, or the one before that, writes a weight (``prefetch=False``) or a scale tensor."""
    assert run_virtual(world, lambda group: rank(group, what, between, graph), device="cuda:0", timeout=120.0) == [0] * world


@pytest.mark.parametrize("between", [0, 1])
def test_the_writers_are_late(between: int) -> None:
    """A weight that is read ahead is the one from before: else the tests above would show nothing."""
    (wrong,) = run_virtual(1, lambda group: rank(group, "weight", between, False, early=True), device="cuda:0", timeout=120.0)
    assert wrong > 0
