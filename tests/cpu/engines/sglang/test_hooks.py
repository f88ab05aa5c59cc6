"""The plugin for SGLang by its hooks, on a stand-in of its modules: what is served on real process groups, and what is left to SGLang."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_calls import EPS, WIDTH, WORLD, given, load_plugins, right, summed
from fake_flashinfer import forgotten
from fake_sglang import write_sglang
from samples import same

from collogue.contract.quant import FP8Group
from collogue.engines import sglang
from collogue.testing.processes import run_processes

MOST = 16
SRT = "sglang.srt"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_sglang(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLLOGUE_SGLANG", "1")
    monkeypatch.setenv("COLLOGUE_ON_FAILURE", "log")
    monkeypatch.setattr(sglang, "_registered", False)
    with forgotten("sglang"):
        yield tmp_path
        sys.modules.pop("collogue.engines.sglang.hooks", None)


def _module(name: str) -> Any:
    return importlib.import_module(f"{SRT}.{name}")


def _group(group: dist.ProcessGroup, name: str) -> Any:
    """One of SGLang's groups."""
    made = _module("distributed.parallel_state").GroupCoordinator()
    made.cpu_group, made.unique_name, made.size = group, name, dist.get_world_size(group)
    return made


def _warm_up(dtype: torch.dtype = torch.bfloat16) -> Any:
    runner = _module("model_executor.runner.base_runner").BaseRunner()
    runner.model_runner = SimpleNamespace(device="cpu", dtype=dtype, model_config=SimpleNamespace(hidden_size=WIDTH))
    runner._pre_initialize_flashinfer_allreduce_workspace()
    return runner


def hooked_rank(group: dist.ProcessGroup, tell: Any, path: str) -> list[str]:
    """One scheduler: the plugin, the warm-up, then the calls of SGLang's layers."""
    sys.path.insert(0, path)
    os.environ["COLLOGUE_SGLANG"] = "1"
    load_plugins("sglang.srt.plugins")
    _module("plugins.hook_registry").HookRegistry.apply_hooks()
    layer, norms, context = _module("layers.flashinfer_comm_fusion"), _module("layers.layernorm"), _module("runtime_context")
    applies = _module("layers.layer_boundary.residual.add_norm").flashinfer_ar_fusion_applies
    tp = _group(group, "tp:0")
    context.parallel.attention = context.parallel.experts = tp
    wrong = []
    x, residual, weight = given(dist.get_rank(group), 3)
    if applies(1) or layer.flashinfer_allreduce_residual_rmsnorm(x, residual, weight) != (None, None):
        wrong.append("served before the warm-up")
    tell("warm-up")
    if hasattr(_warm_up(), "warmed_up"):
        wrong.append("SGLang's own workspace was made too")
    if [applies(tokens) for tokens in (0, 1, MOST, MOST + 1)] != [False, True, True, False]:
        wrong.append("the numbers of tokens")

    def expect(what: str, *pairs: tuple[Any, torch.Tensor | None]) -> None:
        wrong.extend(f"{what}, output {i}" for i, (a, b) in enumerate(pairs) if not same(a, b))

    for tokens in (1, 5, MOST):
        tell(f"{tokens} tokens")
        x, residual, weight = given(dist.get_rank(group), tokens)
        answer, kept = right(tokens), residual.clone()
        norm, stream = layer.flashinfer_allreduce_residual_rmsnorm(
            input_tensor=x, residual=residual, weight=weight, eps=EPS, max_token_num=2048, use_attn_tp_group=False
        )
        expect("norm", (norm, answer.norm), (stream, answer.residual), (residual, kept))
        for packed in (False, True):
            _module("layers.deep_gemm_wrapper").DEEPGEMM_SCALE_UE8M0 = packed
            answer = right(tokens, quant=FP8Group(32, "ue8m0" if packed else "float32", "column", smallest=1e-10 / 448))
            module = SimpleNamespace(variance_epsilon=EPS)
            quantize = norms._forward_with_allreduce_fusion_quant_per_group
            (codes, scales), stream = quantize(module, x, residual, weight, 32)
            expect("FP8", (codes, answer.codes), (scales, answer.scales), (stream, answer.residual))
            (norm, codes, scales), _ = quantize(module, x, residual, weight, 32, True, True)
            expect("FP8 with the norm", (norm, right(tokens).norm), (codes, answer.codes), (scales, answer.scales))
            assert scales.dtype == (torch.int32 if packed else torch.float32)
            assert scales.stride(0) == 1
        assert quantize(module, x, None, weight) is quantize(module, x, residual, weight, 48) is None
        assert tp._can_use_flashinfer_allreduce(x)
        expect("sum", (tp._flashinfer_allreduce(x), summed(tokens)))
    x, residual, weight = given(dist.get_rank(group), MOST + 1)
    for rows, stream, vector in (
        (x, residual, weight),
        (x[:3].float(), residual[:3].float(), weight),
        (x[:3], residual[:3, ::2], weight),
        (x[:3], residual[:3], weight.double()),
        (x[:4].view(2, 2, WIDTH), residual[:4], weight),
        (x[:0], residual[:0], weight),
    ):
        if layer.flashinfer_allreduce_residual_rmsnorm(rows, stream, vector) != (None, None):
            wrong.append(f"a call with {list(rows.shape)}, {rows.dtype} was not left to SGLang")
    assert tp._flashinfer_allreduce(x) == "SGLang"
    layer.cleanup_flashinfer_workspace()
    if applies(1) or tp._can_use_flashinfer_allreduce(x[:1]) or not context.parallel.cleaned:
        wrong.append("served after the clean-up")
    return wrong


@pytest.mark.slow
def test_what_is_served(package: Path) -> None:
    assert run_processes(WORLD, hooked_rank, str(package), silence=100) == [[]] * WORLD


def _register() -> Any:
    sglang.register()
    _module("plugins.hook_registry").HookRegistry.apply_hooks()
    return importlib.import_module("collogue.engines.sglang.hooks")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: setattr(c.parallel, "tp_size", 1), "tensor-parallel size 1"),
        (lambda c: setattr(c.parallel, "tp_size", 16), "tensor-parallel size 16: Collogue serves 2 to 8"),
        (lambda c: setattr(c.parallel, "attn_dp_enabled", True), "attention is data-parallel"),
        (lambda c: setattr(c.options.comm, "flashinfer_allreduce_fusion_backend", "cutedsl"), "cutedsl was chosen"),
        (lambda c: setattr(c.options.deterministic, "enable_deterministic_inference", True), "deterministic inference"),
        (lambda c: setattr(c.options.overlap, "enable_two_batch_overlap", True), "two streams"),
        (lambda c: setattr(c.disagg, "enable_pdmux", True), "two streams"),
    ],
)
@pytest.mark.usefixtures("package")
def test_what_is_not_served_is_said_once(change: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    _register()
    change(_module("runtime_context"))
    with caplog.at_level(logging.WARNING):
        runner = _warm_up()
    assert runner.warmed_up == "SGLang"
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert not _module("layers.layer_boundary.residual.add_norm").flashinfer_ar_fusion_applies(1)


@pytest.mark.usefixtures("package")
def test_a_dtype_without_kernels_is_left(caplog: pytest.LogCaptureFixture) -> None:
    _register()
    assert _warm_up(torch.float64).warmed_up == "SGLang"
    assert "the model's dtype is torch.float64" in caplog.text


@pytest.mark.parametrize(
    ("file", "old", "new", "moved"),
    [
        ("layers/layernorm.py", "group_size", "group", "_forward_with_allreduce_fusion_quant_per_group takes no group_size"),
        ("distributed/parallel_state.py", "_flashinfer_allreduce(", "_all_reduce(", "GroupCoordinator._flashinfer_allreduce is not there"),
        ("plugins/hook_registry.py", "AROUND", "AROUND_IT", "HookType.AROUND is not there"),
        ("model_executor/runner/base_runner.py", "class", "klass", "base_runner cannot be imported: SyntaxError"),
    ],
)
def test_a_hook_that_has_moved_is_named_and_nothing_is_hooked(
    file: str, old: str, new: str, moved: str, package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changed = package / "sglang" / "srt" / file
    assert old in changed.read_text()
    changed.write_text(changed.read_text().replace(old, new))
    with caplog.at_level(logging.WARNING):
        sglang.register()
        sglang.register()
    (record,) = caplog.records
    assert "the engine runs without Collogue" in record.getMessage()
    assert moved in record.getMessage()
    assert not _module("plugins.hook_registry").HookRegistry.hooks
