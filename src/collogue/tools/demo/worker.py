"""What one rank does: generate text, then measure each format. Works on any :class:`collogue.group.Group`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from collogue import Communicator, Quant
from collogue.group import Group
from collogue.pytorch.parallel import parallelize
from collogue.tools.demo.formats import calibrate, quants_for
from collogue.tools.demo.model import Cache, ShardedLlama
from collogue.tools.demo.sequence import SequenceParallelLlama
from collogue.tools.demo.weights import ModelShape, Weights, as_transformers

#: Receives ``("text", ids)``, ``("row", Row)``, ``("logits", largest difference)`` and ``("FP8 text", ids)`` on rank 0 as they come.
Report = Callable[[str, object], None]


@dataclass(frozen=True)
class Task:
    """What the parent asks of every rank."""

    shape: ModelShape
    formats: tuple[str, ...]
    prompt: torch.Tensor  # [P] token ids
    new_tokens: int
    tokens: torch.Tensor  # [T], evaluated
    calibration: torch.Tensor  # [C], other text
    dtype: torch.dtype = torch.float32
    sharded: bool = False  # the residual

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of any call."""
        return max(len(self.prompt), len(self.tokens), len(self.calibration))


@dataclass
class Row:
    """One format's result, or its error. Bytes are what one rank sends in one fused call of all tokens, by the plan, with the residual
    on every rank and with it sharded; times of a fused call are measured on GPUs, host included.

    ``standard_error`` is that of the perplexity's difference to the unsharded model, over the same tokens.
    """

    format: str
    perplexity: float | None = None
    standard_error: float | None = None
    bytes_replicated: int | None = None
    bytes_sharded: int | None = None
    us_one_token: float | None = None
    us_all_tokens: float | None = None
    error: str | None = None


def work(group: Group, task: Task, weights: Weights, unsharded_logits: torch.Tensor, report: Report) -> None:
    """Everything of the demo that runs on one rank. Collective; reports on rank 0 only.

    Args:
        unsharded_logits: ``[T, V]`` float32, what the unsharded model says on ``task.tokens``.
    """
    with Communicator(group, max_tokens=task.max_tokens, hidden_size=task.shape.hidden_size, dtype=task.dtype) as comm:
        model = (SequenceParallelLlama if task.sharded else ShardedLlama)(task.shape, weights, comm)
        unquantized: list[Quant | None] = [None] * task.shape.fused_calls
        tell = report if comm.rank == 0 else lambda kind, value: None
        tell("text", generate(model, group, task.prompt.to(comm.device), task.new_tokens, unquantized))
        amax = calibrate(model, task.calibration.to(comm.device))
        tokens = task.tokens.to(comm.device)
        expected = unsharded_logits[:, model.vocab_start : model.vocab_start + len(model.head)].to(comm.device)
        expected_losses = token_losses(expected, tokens, group, model.vocab_start)
        for name in task.formats:
            row = Row(name)
            try:
                quants = quants_for(name, amax)
                logits = model.forward(tokens, Cache(model, len(tokens)), quants)
                losses = token_losses(logits, tokens, group, model.vocab_start)
                row.perplexity = float(losses.mean().exp())
                row.standard_error = row.perplexity * float((losses - expected_losses).std()) / len(losses) ** 0.5
                row.bytes_replicated = comm.explain(len(tokens), quant=quants[1]).bytes_sent
                row.bytes_sharded = comm.explain(len(tokens), quant=quants[1], operation="sharded").bytes_sent
                if comm.device.type == "cuda":  # a time of the reference says nothing about the kernels
                    row.us_one_token, row.us_all_tokens = (_fused_call(comm, model, quants[1], count) for count in (1, len(tokens)))
                if name == "none":
                    tell("logits", max(group.all_gather_object(float((logits.float() - expected).abs().max()))))
            except Exception as error:
                row.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            errors = [error for error in group.all_gather_object(row.error) if error]
            row.error = errors[0] if errors else None
            tell("row", row)
        del model
    tell("FP8 text", generate_in_fp8(group, task, weights))


def generate_in_fp8(group: Group, task: Task, weights: Weights) -> list[int]:
    """The tokens behind the prompt by the transformers model, parallelized with FP8 weights and inputs in every linear layer."""
    whole = as_transformers(task.shape, weights).to(task.dtype)
    again = getattr(group, "process_group", group)  # the communicator before has closed the connections of the group's object
    model = parallelize(whole, again, max_tokens=task.max_tokens, device=group.device, quant="fp8_per_token")
    prompt = task.prompt[None].to(model.comm.device)
    with torch.inference_mode():
        found = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=task.new_tokens, min_new_tokens=task.new_tokens
        )
    model.comm.close()
    ids: list[int] = found[0, prompt.shape[1] :].tolist()
    return ids


def generate(model: ShardedLlama, group: Group, prompt: torch.Tensor, count: int, quants: Sequence[Quant | None]) -> list[int]:
    """``count`` tokens behind the prompt, each the most likely one: the prompt at once, then one token a step from the KV cache."""
    cache = Cache(model, len(prompt) + count)
    tokens, generated = prompt, list[int]()
    while len(generated) < count:
        logits = model.forward(tokens, cache, quants)[-1].float()
        best = int(logits.argmax())
        # Ties go to the lower token, as argmax does on the whole vocabulary.
        candidates = group.all_gather_object((-float(logits[best]), model.vocab_start + best))
        generated.append(min(candidates)[1])
        tokens = torch.tensor(generated[-1:], device=prompt.device)
    return generated


def token_losses(logits: torch.Tensor, tokens: torch.Tensor, group: Group, vocab_start: int) -> torch.Tensor:
    """The loss of token ``t + 1`` under ``logits[t]``, from each rank's ``[T, V / N]``: ``[T - 1]``, float64, on the CPU.

    Ranks exchange three numbers a token (largest logit, sum of exponentials, the target's logit), never the logits.
    """
    logits, local = logits[:-1].float(), tokens[1:] - vocab_start
    largest = logits.amax(dim=-1)
    total = (logits - largest[:, None]).exp().sum(dim=-1, dtype=torch.float64)
    mine = (local >= 0) & (local < logits.shape[1])
    target = logits.gather(1, torch.where(mine, local, 0)[:, None])[:, 0].masked_fill(~mine, -torch.inf)
    parts = group.all_gather_object((largest.double().cpu(), total.cpu(), target.double().cpu()))
    top = torch.stack([part[0] for part in parts]).amax(dim=0)
    log_sum = torch.stack([part[1] * (part[0] - top).exp() for part in parts]).sum(dim=0).log() + top
    return log_sum - torch.stack([part[2] for part in parts]).amax(dim=0)


def _fused_call(comm: Communicator, model: ShardedLlama, quant: Quant | None, tokens: int, repeats: int = 5) -> float:
    """The median time of a fused call in microseconds, host included."""
    partial = torch.randn(tokens, model.shape.hidden_size, generator=torch.Generator().manual_seed(comm.rank)).to(comm.device, comm.dtype)
    sharded = isinstance(model, SequenceParallelLlama)
    residual = torch.zeros_like(comm.shard(partial) if sharded else partial)
    times = []
    for _ in range(repeats + 1):  # The first call warms up.
        torch.cuda.synchronize(comm.device)
        start = time.perf_counter()
        comm.all_reduce(partial, residual=residual, norm=model.norms[1], quant=quant, sharded=sharded)
        torch.cuda.synchronize(comm.device)
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times[1:])[repeats // 2]
