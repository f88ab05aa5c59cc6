"""What the demo has found."""

from __future__ import annotations

from dataclasses import dataclass, field

from collogue.tools.demo.worker import Row

#: Largest difference of a float32 logit (they reach 42) to the unsharded model's that the run accepts:
#: what sums in another order may cost over 30 layers. A wrong shard, norm or rotation is off by whole units.
LOGITS_BOUND = 1e-3


@dataclass
class Result:
    """What a run found. ``passed``: no row has an error, and the unquantized logits are within :data:`LOGITS_BOUND`."""

    device: str
    world_size: int
    tokens: int
    dtype: str
    machine: dict[str, str]
    unsharded_perplexity: float
    prompt: str
    sharded: bool = False
    rows: list[Row] = field(default_factory=list)
    generated: str = ""
    same_text: bool | None = None
    generated_in_fp8: str = ""
    logits_difference: float | None = None
    logits_bound: float = LOGITS_BOUND
    seconds: float = 0.0
    error: str | None = None

    @property
    def passed(self) -> bool:
        logits = self.logits_difference is None or self.logits_difference <= self.logits_bound
        return self.error is None and logits and all(row.error is None for row in self.rows)
