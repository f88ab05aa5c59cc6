"""``collogue.parallelize`` on GPUs: virtual ranks on one GPU say what the unsharded model says, and give its weights back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import EXPERTS, small_model

import collogue
from collogue import RMSNorm
from collogue.pytorch.forms import FORMS
from collogue.testing import VirtualGroup, run_virtual

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"), pytest.mark.timeout(300)]

TOKENS = torch.tensor([[1, 5, 9, 100], [3, 3, 7, 2]])


def ready(model: Any, tokens: int) -> None:
    """Load every kernel that a forward pass needs: a kernel that is loaded late may wait for kernels that wait for it."""
    norm = RMSNorm(model.model.norm.weight)
    form = FORMS[model.config.model_type]
    branch = norm if form.attention_out else None
    model.comm.prepare(tokens, residual=False, norm=norm, operation="finish")
    for each in (norm, None) if form.mlp_in is None else (norm,):
        model.comm.prepare(tokens, residual=True, norm=each, branch_norm=branch)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", FORMS)
def test_a_parallel_model_says_the_same(kind: str, world_size: int) -> None:
    changed = {} if kind.startswith("deepseek") else {"num_key_value_heads": 1}  # DeepSeek's latents have no such heads
    changed |= {"residual_multiplier": 0.22} if kind == "granite" else {}
    model = small_model(kind, **changed).cuda().bfloat16()
    exact = copy.deepcopy(model).float()
    if kind in EXPERTS:
        exact.set_experts_implementation("eager")  # grouped products are bfloat16's
    tokens = TOKENS.cuda()
    with torch.no_grad():
        expected, far = exact(tokens).logits, (model(tokens).logits.float() - exact(tokens).logits).abs().max()

    def rank(group: VirtualGroup) -> torch.Tensor:
        options: Any = {"max_tokens": TOKENS.numel(), "timeout": 20.0}
        by_host = collogue.parallelize(copy.deepcopy(model), group, transport="host", **options)
        mine = collogue.parallelize(copy.deepcopy(model), group, **options)
        ready(mine, TOKENS.numel())
        with torch.no_grad():
            # First where no kernel waits for another: here cuBLAS makes this thread's handle, and memory is found for what follows.
            same: torch.Tensor = by_host(tokens, use_cache=False).logits
            group.settle()
            logits: torch.Tensor = mine(tokens, use_cache=False).logits
        mine.comm.check()
        group.settle()
        assert torch.equal(logits, same)
        state = collogue.full_state_dict(mine)
        assert all(torch.equal(state[name], tensor.cpu()) for name, tensor in model.state_dict().items())
        return logits.float()

    found = run_virtual(world_size, rank, device="cuda:0", timeout=120.0)
    assert all(torch.equal(found[0], other) for other in found)
    assert float((found[0] - expected).abs().max()) <= 2.0 * float(far)


def test_sampling_has_the_numbers_of_the_gpu() -> None:
    """World 1: the text that the unsharded model samples from the same generators."""
    model, tokens = small_model("llama").cuda().bfloat16(), TOKENS.cuda()
    options = {"do_sample": True, "max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": torch.ones_like(tokens)}

    def rank(group: VirtualGroup) -> list[torch.Tensor]:
        mine = collogue.parallelize(copy.deepcopy(model), group, max_tokens=16)
        texts = []
        for _ in range(2):
            torch.manual_seed(3)
            texts.append(mine.generate(tokens, **options))
        return texts

    ((first, second),) = run_virtual(1, rank, device="cuda:0", timeout=120.0)
    assert torch.equal(first, second)
