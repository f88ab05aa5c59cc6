"""``collogue bench generate``: tokens per second and time to the first token of whole decoders, in FP8 and in bfloat16, in one run.

Every scheme is run with Collogue's kernels between the products and with what ``torch.compile`` makes of the same; the products are the
same. A number is kept only if the logits are those of the compiled way and of bfloat16 within :data:`TOLERANCE`.
"""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from collogue.communicator import Communicator
from collogue.errors import ArgumentError, PlatformError
from collogue.pytorch.recipes import RECIPES
from collogue.testing import environment
from collogue.testing.processes import run_processes
from collogue.tools.bench import report
from collogue.tools.bench.between import COLLOGUE, COMPILED, WAYS, Collogue, Compiled, Units, Way
from collogue.tools.bench.decoder import BFLOAT16, Decoder, State
from collogue.tools.bench.stack import SHAPES, rank_shape
from collogue.tools.bench.timing import captured, everywhere, meet, microseconds
from collogue.tools.record import circumstances

MODELS = ("llama-3.1-8b", "qwen3-8b")
SCHEMES = ("fp8_static", "fp8_per_token", "fp8_block")
BATCHES = (1, 8, 64)
#: Relative error of logits, in the L2 norm. Random layers carry one changed code on through all that follow, so two orders of the same sum
#: end as far apart as FP8 and bfloat16 do, about 0.15 after 24 layers; with one scale inverted it is above 1.
TOLERANCE = 0.5
#: Bytes per second that a GPU's memory gives, measured on an H200.
MEMORY_RATE = 4.3e12
#: Repetitions that a prefill is timed in.
PREFILLS = 2
SILENCE = 300.0
_NOW = "now "
METHOD = (
    "Random weights, the same ones quantized to every scheme; embedding, norms, output head, attention and cache in bfloat16. A decode "
    "step is one CUDA graph: embedding, all layers, output head, greedy choice. Attention is scaled_dot_product_attention over the whole "
    "cache of cache_tokens rows, static, written or not; us_per_step is the median over rounds of new_tokens replays in a row, the ways "
    "in turn. ms_to_first_token: a prefill of batch x prompt_tokens tokens in a CUDA graph, to the greedy choice. The slowest rank counts. "
    "torch.compile: residual, norm and quantization are one compiled unit, SwiGLU and quantization another, the attention's output a "
    "third; products by torch.nn.functional.scaled_mm or linear outside of them, the same calls as Collogue's way. Collogue's way gates by "
    "a compiled unit and quantizes by a kernel. Rotary embedding and the cache's update are compiled in both ways. gemms_us: the products "
    "of a step alone, in a CUDA graph. bound_us: step_bytes (weights, scales, cache) at 4.3 TB/s."
)

Row = dict[str, Any]
Run = Callable[[], Tensor]
T = TypeVar("T")


def run(
    *,
    model: Sequence[str] | None = None,
    scheme: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    layers: int | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    rounds: int = 5,
    world_size: int = 1,
    device: str = "cuda",
    started: Callable[[str], None] = lambda name: None,
    commit: str | None = None,
) -> Row:
    """Measure; what ``--json`` writes.

    Args:
        model: names of :data:`collogue.tools.bench.stack.SHAPES` with a vocabulary; default :data:`MODELS`.
        scheme: of :data:`collogue.pytorch.recipes.RECIPES`; default :data:`SCHEMES`. bfloat16 is always one of them.
        batch: sequences of a decode step. layers: of each model; default all.
        prompt_tokens: of each sequence. new_tokens: steps that are timed in a row; the cache has room for both.
        rounds: in which the ways take turns.
        device: ``"cpu"`` runs the same code without graphs; its times mean nothing.
        started: told what is done next, :func:`steps` times.
    Raises:
        ArgumentError: an unknown model or scheme. PlatformError: fewer GPUs than ranks.
    """
    names, schemes, batches = list(model or MODELS), list(scheme or SCHEMES), list(batch or BATCHES)
    known = [name for name, shape in SHAPES.items() if shape.vocabulary]
    for what, words, choices in (("model", names, known), ("scheme", schemes, RECIPES)):
        for word in words:
            if word not in choices:
                raise ArgumentError(f"unknown {what} {word!r}", hint=f"choose from {', '.join(choices)}")
    if device == "cuda":
        environment.set_defaults()
    gpus = torch.cuda.device_count() if device == "cuda" else 8
    if world_size > gpus:
        raise PlatformError(f"{gpus} GPUs found; {world_size} required, one for each rank", hint="use a machine with more GPUs")
    start = time.monotonic()
    given = (device, names, [BFLOAT16, *schemes], batches, layers, prompt_tokens, new_tokens, rounds)

    def heard(rank: int, stage: str) -> None:
        if rank == 0 and stage.startswith(_NOW):
            started(stage.removeprefix(_NOW))

    found = run_processes(world_size, generate_rank, *given, device=device, silence=SILENCE, heard=heard)[0]
    return {
        "benchmark": "generate",
        "passed": all(row["error"] is None for row in found["rows"] if row["way"] == COLLOGUE),
        **circumstances(commit),
        "method": METHOD,
        "world_size": world_size,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "cache_tokens": prompt_tokens + new_tokens,
        "attention": "scaled_dot_product_attention over all cache_tokens",
        "rounds": rounds,
        "cuda_graphs": device == "cuda",
        "seconds": time.monotonic() - start,
        **found,
    }


def steps(model: Sequence[str], scheme: Sequence[str], batch: Sequence[int]) -> int:
    """How many times :func:`run` says what it does next."""
    return len(model or MODELS) * (1 + len(batch or BATCHES) * len(WAYS) * (1 + len(scheme or SCHEMES)))


# ---- one rank


def generate_rank(
    group: dist.ProcessGroup,
    tell: Callable[[str], None],
    device: str,
    names: Sequence[str],
    schemes: Sequence[str],
    batches: Sequence[int],
    layers: int | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
) -> Row:
    """Sizes and times of every model; the same on every rank."""
    units = {prefill: Units(torch.device(device), prefill=prefill) for prefill in (False, True)}
    sizes: list[Row] = []
    rows: list[Row] = []
    for name in names:
        whole, most = SHAPES[name], max(batches)
        count = layers or whole.layers
        with (
            torch.inference_mode(),
            Communicator(group, max_tokens=most * prompt_tokens, hidden_size=whole.hidden_size, timeout=60.0) as comm,
        ):
            _say(tell, name, "weights")
            shape = rank_shape(whole, comm.world_size)
            said = functools.partial(_say, tell, name)
            decoder = Decoder(shape, count, schemes, comm, batch=most, length=prompt_tokens + new_tokens)
            of_model = {"model": name, "layers": count, "model_layers": whole.layers}
            sizes += [{**of_model, **size} for size in _sizes(decoder, schemes)]
            for batch in batches:
                found = _Batch(decoder, units, group, batch, prompt_tokens, said).measure(schemes, new_tokens, rounds)
                rows += [{**of_model, **row} for row in found]
                _free()
            del decoder
            _free()
    add_ratios(rows)
    return {"sizes": sizes, "rows": rows}


def _say(tell: Callable[[str], None], model: str, what: str) -> None:
    tell(f"{_NOW}{model}: {what}")


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sizes(decoder: Decoder, schemes: Sequence[str]) -> list[Row]:
    """Bytes of each scheme, this rank's, and their ratio to bfloat16's."""
    plain = decoder.quantized_bytes(BFLOAT16), decoder.model_bytes(BFLOAT16)
    return [
        {
            "scheme": scheme,
            "product": decoder.layers[scheme][0].qkv.explain(),
            "quantized_bytes": decoder.quantized_bytes(scheme),
            "quantized_ratio": decoder.quantized_bytes(scheme) / plain[0],
            "model_bytes": decoder.model_bytes(scheme),
            "model_ratio": decoder.model_bytes(scheme) / plain[1],
        }
        for scheme in schemes
    ]


class _Batch:
    """All schemes and ways at one batch size of one decoder."""

    def __init__(
        self,
        decoder: Decoder,
        units: dict[bool, Units],
        group: dist.ProcessGroup,
        batch: int,
        prompt_tokens: int,
        tell: Callable[[str], None],
    ) -> None:
        self.decoder, self.units, self.group, self.batch, self.tell = decoder, units, group, batch, tell
        self.device, self.state = decoder.comm.device, State(decoder, batch, prompt_tokens)

    def measure(self, schemes: Sequence[str], new_tokens: int, rounds: int) -> list[Row]:
        """One row for each scheme and way."""
        rows: list[Row] = []
        runs: list[tuple[Run, Run]] = []
        expected: dict[str, Tensor] = {}
        for scheme in schemes:
            gemms, no_gemms = self._guarded(functools.partial(self._gemms, scheme, rounds))
            gemms = None if gemms is None else max(everywhere(self.group, gemms))
            for name in reversed(WAYS):  # the compiled way is what the other is compared with
                self.tell(f"batch {self.batch}, {scheme}, {name}")
                row: Row = {"batch": self.batch, "scheme": scheme, "way": name}
                made, row["error"] = self._guarded(functools.partial(self._made, scheme, name))
                if made is not None:
                    decode, prefill, logits = made
                    row["error"] = self._gate(row, logits, expected)
                    runs += [(decode, prefill)] if row["error"] is None else []
                read = self.decoder.step_bytes(scheme, self.batch)
                row |= {"gemms_us": gemms, "gemms_error": no_gemms, "step_bytes": read, "bound_us": read / MEMORY_RATE * 1e6}
                rows.append(row)
        right = [row for row in rows if row["error"] is None]
        for row, (decode_us, prefill_us) in zip(right, self._times(runs, new_tokens, rounds), strict=True):
            row |= _spread("us_per_step", decode_us)
            row["tokens_per_second"] = self.batch / row["us_per_step"] * 1e6
            row["ms_to_first_token"] = statistics.median(prefill_us) / 1e3
        return rows

    def _guarded(self, work: Callable[[], T]) -> tuple[T | None, str | None]:
        """What it returns, or what it raised on any rank, in a line. An error is a result: the rest is still timed."""
        result = error = None
        try:
            result = work()
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}".splitlines()[0][:300]
        error = next((text for text in everywhere(self.group, error) if text), None)
        return (result, None) if error is None else (None, error)

    def _gemms(self, scheme: str, rounds: int) -> float:
        run = captured(self.decoder.products(scheme, self.batch), self.device)
        return statistics.median(microseconds(run, self.device) for _ in range(rounds))

    def _way(self, name: str, scheme: str, *, prefill: bool) -> Way:
        units, quant = self.units[prefill], self.decoder.quant(scheme)
        if name == COLLOGUE:
            return Collogue(self.decoder.comm, units)
        given = None if quant is None else quant.given_scale
        scale = torch.ones(1, device=self.device) if given is None else torch.as_tensor(given, device=self.device).reshape(1)
        return Compiled(self.group, units, scale)

    def _made(self, scheme: str, name: str) -> tuple[Run, Run, Tensor]:
        """A decode step, a prefill, and the logits of a prefill and of a step behind it, ``[2, B, V]``."""
        ways = [self._way(name, scheme, prefill=prefill) for prefill in (False, True)]
        self.state.reset()
        decode = captured(functools.partial(self.decoder.decode, scheme, ways[0], self.state), self.device)
        prefill = captured(functools.partial(self.decoder.prefill, scheme, ways[1], self.state), self.device, warmups=1)
        first = prefill().float()
        self.state.reset()
        return decode, prefill, torch.stack([first, decode().float()])

    def _gate(self, row: Row, found: Tensor, expected: dict[str, Tensor]) -> str | None:
        """Compare the logits with the compiled way's and with bfloat16's; why they are wrong, if they are on any rank."""
        expected.setdefault(row["scheme"], found)
        error = None
        for field, scheme in (("difference", row["scheme"]), ("difference_to_bfloat16", BFLOAT16)):
            right = expected.get(scheme)
            row[field] = None if right is None else max(float((a - b).norm() / b.norm()) for a, b in zip(found, right, strict=True))
            if row[field] is not None and not row[field] < TOLERANCE:
                error = error or f"{field} of the logits is {row[field]:.3g}, above {TOLERANCE}"
        return next((text for text in everywhere(self.group, error) if text), None)

    def _times(self, runs: Sequence[tuple[Run, Run]], new_tokens: int, rounds: int) -> list[tuple[list[float], list[float]]]:
        """Microseconds of a step and of a prefill, of every round but the first, the longest of all ranks; in turn."""
        taken: list[list[float]] = [[] for _ in runs]
        for _ in range(rounds + 1):
            for (decode, _prefill), times in zip(runs, taken, strict=True):
                self.state.reset()
                self._meet()
                times.append(microseconds(decode, self.device, new_tokens))
        first: list[list[float]] = [[] for _ in runs]
        for _ in range(PREFILLS):
            for (_decode, prefill), times in zip(runs, first, strict=True):
                self._meet()
                times.append(microseconds(prefill, self.device, 1))
        slowest = [
            [[max(each) for each in zip(*of_ranks, strict=True)] for of_ranks in zip(*everywhere(self.group, kind), strict=True)]
            for kind in (taken, first)
        ]
        return [(decode[1:], prefill) for decode, prefill in zip(*slowest, strict=True)]

    def _meet(self) -> None:
        if self.device.type == "cuda":
            meet(self.group)


def _spread(name: str, values: Sequence[float]) -> Row:
    return {name: statistics.median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


# ---- report


def add_ratios(rows: Sequence[Row]) -> None:
    """Of every row with a number: tokens per second over those of the same scheme compiled, and of the faster of bfloat16's ways."""
    speed = {(r["model"], r["batch"], r["scheme"], r["way"]): r.get("tokens_per_second") for r in rows}
    for row in rows:
        mine, key = row.get("tokens_per_second"), (row["model"], row["batch"])
        plain = [found for way in WAYS if (found := speed.get((*key, BFLOAT16, way))) is not None]
        compiled = speed.get((*key, row["scheme"], COMPILED))
        row["over_compiled"] = None if mine is None or compiled is None else mine / compiled
        row["over_bfloat16"] = None if mine is None or not plain else mine / max(plain)


def text(data: Row) -> str:
    """Tables of at most 80 columns: sizes, then times."""
    lines = [
        f"world {data['world_size']}, {data['prompt_tokens']} prompt tokens, attention over all {data['cache_tokens']} of the cache",
        "CUDA graphs" if data["cuda_graphs"] else "CPU, no graphs: times mean nothing",
        "/bf16, /comp: tokens per second over bfloat16's and over torch.compile's",
        "step, GEMMs, bound: us of a decode step, of its products, of reading its bytes",
    ]
    for name in dict.fromkeys(row["model"] for row in data["rows"]):
        sizes = [row for row in data["sizes"] if row["model"] == name]
        rows = [row for row in data["rows"] if row["model"] == name]
        lines += ["", f"{name}, {sizes[0]['layers']} of {sizes[0]['model_layers']} layers", ""]
        lines += report.aligned([["scheme", "layers' GB", "of bf16", "model's GB", "of bf16"], *map(_size, sizes)])
        head = ["B", "scheme", "way", "tok/s", "/bf16", "/comp", "1st ms", "step", "GEMMs", "bound"]
        lines += ["", *report.aligned([head, *(_time(row) for row in rows if row["error"] is None)])]
        lines += [f"NO NUMBER B={r['batch']} {r['scheme']} {r['way']}: {r['error']}" for r in rows if r["error"] is not None]
    return "\n".join(lines) + "\n"


def _size(row: Row) -> list[str]:
    sizes = [(row[f"{what}_bytes"] / 1e9, row[f"{what}_ratio"]) for what in ("quantized", "model")]
    return [row["scheme"], *(cell for size, ratio in sizes for cell in (f"{size:.3f}", f"{ratio:.4f}"))]


def _time(row: Row) -> list[str]:
    ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("over_bfloat16", "over_compiled")]
    times = ["-" if row[name] is None else f"{row[name]:.0f}" for name in ("us_per_step", "gemms_us", "bound_us")]
    way = row["way"].removeprefix("torch.")
    speed = f"{row['tokens_per_second']:.0f}"
    return [str(row["batch"]), row["scheme"], way, speed, *ratios, f"{row['ms_to_first_token']:.1f}", *times]
