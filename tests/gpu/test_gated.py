"""Quantization and gated units without a sum on a GPU: every format, dtype and width bit for bit; capture and replay; threads, streams."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import collogue
from collogue import Gated, PrologueForm, reference
from collogue.contract.quant import Quant, parse
from collogue.contract.weight import FP8Block
from collogue.nn import ScaledLinear, gated
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.compare import compare
from collogue.testing.inputs import KINDS, make_inputs, make_prologue
from collogue.tools.check.case import GLOBAL_SCALE, STATIC_SCALE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

LABELS = (
    *(f"nvfp4/{layout}" for layout in ("128x4", "8x4", "linear")),
    *("/".join(parts) for parts in itertools.product(("mxfp4", "mxfp8"), ("floor", "ceil"), ("128x4", "8x4", "linear"))),
    "fp8_static",
    "fp8_per_token",
    *(f"fp8_group{size}/{scale}/{layout}" for size, scale, layout in itertools.product((128, 48), ("float32", "ue8m0"), ("row", "column"))),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (128, 384, 2880, 7168, 14336, 28672)
TOKENS = (1, 2, 3, 5, 8, 17, 64, 131, 200)


def quant_of(label: str) -> Quant | None:
    return parse(label, global_scale=GLOBAL_SCALE, static_scale=STATIC_SCALE)


def calls(label: str) -> Iterator[tuple[int, int, torch.dtype, str]]:
    """Every width with every dtype; numbers of rows and kinds of input in turn."""
    quant, kinds = quant_of(label), list(KINDS)
    for n, (width, dtype) in enumerate(itertools.product(WIDTHS, DTYPES)):
        if quant is None or not quant.block or width % quant.block == 0:
            yield TOKENS[(n + len(label)) % len(TOKENS)], width, dtype, kinds[n % len(kinds)]


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check(found: collogue.Output, expected: collogue.Output, *what: object) -> None:
    for name, difference in compare(found, expected).items():
        assert not difference.count, (*what, name, difference.first)


@pytest.mark.parametrize("label", LABELS)
def test_quantize(label: str) -> None:
    quant = quant_of(label)
    assert quant is not None
    for tokens, width, dtype, kind in calls(label):
        x = make_inputs(kind, rank=0, tokens=tokens, hidden_size=width, dtype=dtype, device="cuda").partial
        codes, scales = collogue.quantize(x, quant)
        check(collogue.Output(codes=codes, scales=scales), reference.finish_alone(x, quant), tokens, width, dtype, kind)


@pytest.mark.parametrize("label", [*LABELS, "none"])
def test_gated(label: str) -> None:
    """Two tensors and the halves of one."""
    quant = None if label == "none" else quant_of(label)
    for rank, (tokens, width, dtype, kind) in enumerate(calls(label)):
        form = PrologueForm("gated", "none")
        given = make_prologue(form, kind, rank=rank % 2, tokens=tokens, hidden_size=width, dtype=dtype, count=1, device="cuda")
        assert isinstance(given, Gated)
        found = gated((given.gate, given.up), quant)
        out = found if isinstance(found, collogue.Output) else collogue.Output(reduced=found)
        check(out, reference.finish_alone(given, quant), tokens, width, dtype, kind)


def test_the_reference_has_the_same_bits_on_both_devices() -> None:
    """Every 16-bit gate, and many of float32."""
    for dtype in DTYPES:
        gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(64, 1024)
        gate = gate.float() * (1 + 2.0**-20) if dtype == torch.float32 else gate.view(torch.int16).view(dtype)
        for factor in (1.0, -0.37, torch.inf):
            up = torch.full_like(gate, factor)
            on_gpu = reference.term_of(Gated(gate.cuda(), up.cuda()))
            expected = collogue.Output(reduced=reference.term_of(Gated(gate, up)))
            check(collogue.Output(reduced=on_gpu.cpu()), expected, dtype, factor)
            found = gated((gate.cuda(), up.cuda()))
            check(collogue.Output(reduced=found.cpu()), expected, dtype, factor)


def test_rows_that_kernels_cannot_read() -> None:
    """Copied, or left to PyTorch: an odd address, columns, odd and wide rows, no rows, a scale on the CPU."""
    x, quant = torch.randn(9, 4104, device="cuda").bfloat16(), collogue.FP8PerToken()
    for rows in (x[:, 4:2052], x[:, :2048].t(), x[:, :36], x[:0], torch.randn(2, 40000, device="cuda").half()):
        codes, scales = collogue.quantize(rows, quant)
        check(collogue.Output(codes=codes, scales=scales), reference.finish_alone(rows, quant), rows.shape)
    elsewhere = collogue.NVFP4(torch.tensor(3.0))
    codes, scales = collogue.quantize(x[:, :2048], elsewhere)
    check(collogue.Output(codes=codes, scales=scales), reference.finish_alone(x[:, :2048], elsewhere))
    half = x[:, 4:2052], x[:, 2052:4100]
    check(gated(half, quant), reference.finish_alone(Gated(*half), quant))


def replayed(call: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    """``call(x)`` captured, and replayed with other values in ``x``, is the eager call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = call(x)
    for seed in range(3):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)) * 3.0**seed)
        graph.replay()
        torch.cuda.synchronize()
        expected = call(x)
        pairs = zip(*(torch.utils._pytree.tree_leaves(each) for each in (out, expected)), strict=True)
        assert all(torch.equal(raw(a), raw(b)) for a, b in pairs if b is not None)


@pytest.mark.parametrize("label", ["nvfp4/128x4", "mxfp8/ceil/8x4", "fp8_static", "fp8_per_token", "fp8_group128/ue8m0/column"])
@pytest.mark.parametrize("tokens", [1, 33, 200])
def test_capture_and_replay(label: str, tokens: int) -> None:
    quant = quant_of(label)
    assert quant is not None
    x = torch.zeros(tokens, 7168, device="cuda", dtype=torch.bfloat16)
    replayed(lambda x: collogue.quantize(x, quant), x)
    replayed(lambda x: gated(x, quant), x)
    replayed(lambda x: gated(x), x)


@pytest.mark.parametrize("name", ["tensor", "channel", "block", "nvfp4"])
def test_a_layer_that_quantizes_its_input_is_captured(name: str) -> None:
    torch.manual_seed(0)
    weight, quant = {
        "tensor": (collogue.FP8Static(0.005), collogue.FP8Static(0.02)),
        "channel": (collogue.FP8PerToken(), collogue.FP8PerToken()),
        "block": (FP8Block(128), collogue.FP8Group(128)),
        "nvfp4": (collogue.NVFP4(900.0, layout="linear"), collogue.NVFP4(500.0)),
    }[name]
    layer = ScaledLinear.of(torch.nn.Linear(1024, 768, dtype=torch.bfloat16, device="cuda"), weight, activation=quant)  # type: ignore[arg-type]
    with torch.no_grad():
        replayed(layer, torch.zeros(8, 1024, device="cuda", dtype=torch.bfloat16))
        replayed(lambda x: layer(gated(x, layer.activation)), torch.zeros(8, 2048, device="cuda", dtype=torch.bfloat16))  # type: ignore[arg-type]


def test_a_first_call_under_capture_is_a_named_error() -> None:
    x, found = torch.zeros(3, 288, device="cuda", dtype=torch.float16), []
    collogue.quantize(x, collogue.FP8PerToken())
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            collogue.quantize(x, collogue.FP8Group(48))
        except collogue.NotPrepared as error:
            found.append(error)
        x.zero_()
    assert "once before the capture" in found[0].hint


def test_threads_and_streams() -> None:
    """Each thread on streams of its own, no order between them; a stream that is being captured keeps nobody from calling."""
    problems: list[object] = []

    def work(seed: int) -> None:
        try:
            quant, streams = collogue.FP8PerToken(), [torch.cuda.Stream() for _ in range(3)]
            for i in range(60):
                with torch.cuda.stream(streams[i % 3]):
                    x = torch.randn(1 + i % 7, 1024, device="cuda").bfloat16()
                    codes, scales = collogue.quantize(x, quant)
                    out = gated(x, quant)
                    check(collogue.Output(codes=codes, scales=scales), reference.finish_alone(x, quant), seed, i)
                    check(out, reference.finish_alone(Gated.of(x), quant), seed, i)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_compiled() -> None:
    quant = collogue.FP8PerToken()

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = gated(x, quant)
        return out.codes, out.scales, *collogue.quantize(x * 1.0, quant)  # type: ignore[return-value]

    x = torch.randn(5, 2048, device="cuda").bfloat16()
    found = torch.compile(call, fullgraph=True)(x)
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(found, call(x), strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_in_a_communicators_calls(world_size: int) -> None:
    """``finish``, and a gated unit in the place of a partial."""
    form, quant = PrologueForm("gated", "none"), collogue.FP8PerToken()
    terms = [
        make_prologue(form, "outlier", rank=rank, tokens=33, hidden_size=2880, dtype=torch.bfloat16, count=1, device="cuda")
        for rank in range(world_size)
    ]
    summed = reference.all_reduce(terms, quant=quant)
    torch.cuda.synchronize()

    def rank(group: VirtualGroup) -> None:
        comm = collogue.Communicator(group, max_tokens=64, hidden_size=2880, timeout=20.0)
        mine = terms[group.rank]
        comm.prepare(33, residual=False, quant=quant, prologue=mine)
        comm.prepare(33, residual=False, quant=quant, prologue=mine, operation="finish")
        group.settle()
        check(comm.all_reduce(mine, quant=quant), summed)
        assert isinstance(mine, Gated)
        check(comm.finish(mine, quant=quant), reference.finish(mine, quant=quant))
        comm.check()

    run_virtual(world_size, rank, device="cuda:0", timeout=120.0)


def test_host_time(record_property: Callable[[str, object], None]) -> None:
    """Of an eager call, beside that of a kernel of PyTorch's: told, and below that of the reference's operations."""
    import time

    quant, x = collogue.FP8PerToken(), torch.randn(4, 4096, device="cuda").bfloat16()

    def us(call: Callable[[], object]) -> float:
        for _ in range(50):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(500):
            call()
        took = time.perf_counter() - start
        torch.cuda.synchronize()
        return took / 500 * 1e6

    with torch.inference_mode():
        times = {
            "quantize": us(lambda: collogue.quantize(x, quant)),
            "gated": us(lambda: gated(x, quant)),
            "x.add_": us(lambda: x.add_(0.0)),
            "reference": us(lambda: reference.quantize(x, quant)),
        }
    told = ", ".join(f"{name} {value:.1f}" for name, value in times.items())
    record_property("told", f"host time of a call, in us: {told}")
    assert times["quantize"] < times["reference"]


def test_what_cannot_be_is_a_named_error_also_after_a_call_like_it() -> None:
    """Tensors that require grad, and what is no tensor of values or no format: the way of most calls looks at none of it."""
    x, quant = torch.randn(4, 2 * 512, device="cuda"), collogue.FP8PerToken()
    gated(x, quant)
    values = gated(x)
    codes, _ = collogue.quantize(x, quant)
    learned = x.clone().requires_grad_()
    for call in (lambda: collogue.quantize(learned, quant), lambda: gated(learned, quant), lambda: gated(learned)):
        with pytest.raises(collogue.errors.GradError, match="requires grad"):
            call()
        with torch.no_grad():
            call()
    for wrong in ("fp8", collogue.FP8PerToken, FP8Block(32)):
        with pytest.raises(collogue.errors.FormatError):
            collogue.quantize(x, wrong)  # type: ignore[arg-type]
        with pytest.raises(collogue.errors.FormatError):
            gated(x, wrong)  # type: ignore[call-overload]
    for wrong_rows in (x.double(), x.int(), codes):
        with pytest.raises(collogue.errors.DTypeError):
            collogue.quantize(wrong_rows, quant)
    assert torch.equal(gated(x.t().contiguous().t()), values)
