"""Every kernel on virtual ranks of one GPU, with little else on it: what `scripts/sanitize.sh` runs under compute-sanitizer.

Inputs and answers are made on the CPU and copied, outputs are compared there, and all memory is allocated before the first call.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Literal

import torch
from cuda.bindings import driver

from collogue import Communicator, RMSNorm
from collogue.contract.spec import OWNING, Output
from collogue.formats import scale_storage
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.tools.check import Answers, Case
from collogue.tools.check.rank import Given, poisoned

#: Rows of two CTAs, the second one partly idle.
WIDTH = 576
CPU = torch.device("cpu")
#: Under a tool a kernel takes more registers than it was compiled for, and the kernels of all ranks must still be on the GPU together.
FEW = {"max_sms": 24, "cta_threads": 64}


def cases(world: int) -> dict[Literal["one_shot", "two_shot"], list[Case]]:
    """By what an ``all_reduce`` is to be done with: formats, operations, one row and several, more rows than clusters."""
    labels = ("none", "nvfp4/128x4", "fp8_per_token", "fp8_group64/float32/column", "mxfp8/ceil/8x4")
    plain = [Case(1 + 2 * i, WIDTH, format=label, world_size=world, seed=i) for i, label in enumerate(labels)]
    owned: list[Case] = []
    for operation in ("sharded", "reduce_scatter", "all_gather", "finish"):
        owned += [replace(case, operation=operation, seed=10 + case.seed) for case in plain[:3]]  # type: ignore[arg-type]
    owned += [replace(case, rows=(*[0] * (world - 1), case.tokens)) for case in owned if case.operation in OWNING]
    many = Case(300, WIDTH, world_size=world, seed=30)
    sums = Case(2, 24, world_size=world, residual=False, norm=False, seed=31)
    return {
        "one_shot": [*plain, *owned, many, replace(many, operation="sharded"), sums],
        "two_shot": [*plain, many, sums],
    }


def on_gpu(output: Output, device: torch.device) -> Output:
    """The same bytes there, padding of scales included."""
    moved = Output()
    for name, tensor in output.items():
        flat = scale_storage(tensor) if name == "scales" else tensor.reshape(-1).view(torch.uint8)
        setattr(moved, name, flat.to(device).view(tensor.dtype).as_strided(tensor.shape, tensor.stride()))
    return moved


def given_on_gpu(case: Case, rank: int, device: torch.device, answers: Answers) -> Given:
    """What the rank passes, made on the CPU."""
    given = Given.of(case, rank, CPU, answers)
    kwargs: dict[str, Any] = dict(given.kwargs)
    if kwargs["norm"] is not None:
        kwargs["norm"] = RMSNorm(kwargs["norm"].weight.to(device), kwargs["norm"].eps, kwargs["norm"].weight_offset)
    residual = None if given.residual is None else given.residual.to(device)
    shard = None if given.shard is None else on_gpu(given.shard, device)
    return Given(case, given.partial.to(device), residual, kwargs, shard)


def load(comm: Communicator) -> None:
    """Every kernel into this context now: with CUDA_MODULE_LOADING=LAZY the first launch would, and might wait for kernels that run."""
    for kernel in comm._engine._kernels.values():  # type: ignore[union-attr]
        error, function = driver.cuKernelGetFunction(driver.CUkernel(int(kernel.handle)))
        if not error:
            driver.cuFuncLoad(function)


def rank(group: VirtualGroup, answers: Answers) -> list[str]:
    """All cases on this rank: what is wrong."""
    return [text for algorithm, mine in cases(group.size).items() for text in calls(group, answers, algorithm, mine)]


def calls(group: VirtualGroup, answers: Answers, algorithm: Literal["one_shot", "two_shot"], mine: list[Case]) -> list[str]:
    """The cases of one communicator. Memory goes at the return: freeing between calls waits for kernels that wait for this rank."""
    tokens, wrong = max(c.tokens for c in mine), []
    comm = Communicator(group, max_tokens=tokens, hidden_size=WIDTH, algorithm=algorithm, timeout=20.0, **FEW)  # type: ignore[arg-type]
    work = []
    for case in mine:
        given = given_on_gpu(case, group.rank, group.device, answers)
        given.prepare(comm)
        expected = answers(case, CPU, group.rank)
        work.append((given, on_gpu(poisoned(expected), group.device), expected))
    load(comm)
    group.settle()
    for given, out, _ in work:
        given.call(comm, out)
    group.settle()
    comm.check()
    for given, out, expected in work:
        for difference in compare(on_gpu(out, CPU), expected).values():
            if difference.count:
                wrong.append(f"rank {group.rank}, {algorithm}, {given.case}: {difference.count} differ, first {difference.first}")
    group.settle()
    comm.close()
    return wrong


def run(world: int, device: str) -> list[list[str]]:
    """All cases on virtual ranks: what is wrong, by rank."""
    answers = Answers()
    return run_virtual(world, lambda group: rank(group, answers), device=device, timeout=120.0)


def main() -> int:
    """Worlds of two and three; prints what is wrong."""
    failed = 0
    for world in (2, 3):
        wrong = [text for texts in run(world, "cuda:0") for text in texts]
        print(f"world {world}: " + ("every output is right" if not wrong else "\n".join(wrong)))
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
