"""The demo on a small random Llama of its own: everything but the reading of SmolLM2-135M."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from collogue import Communicator  # noqa: E402
from collogue.errors import ArgumentError, FormatError, PlatformError, ShapeError  # noqa: E402
from collogue.group import Group  # noqa: E402
from collogue.testing.virtual import run_virtual  # noqa: E402
from collogue.tools.demo import formats, main, table, worker  # noqa: E402
from collogue.tools.demo.model import Cache, ShardedLlama  # noqa: E402
from collogue.tools.demo.sequence import SequenceParallelLlama  # noqa: E402
from collogue.tools.demo.weights import ModelShape, Weights, attach, read_model, share  # noqa: E402

pytestmark = pytest.mark.slow

WORLD = 3
#: Sums in another order than transformers': a few units in the last place of logits below 4.
BOUND = 2e-5
CONFIG = {"hidden_size": 192, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, num_hidden_layers=2, vocab_size=96, tie_word_embeddings=True, initializer_range=0.14)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def task(model: Any) -> worker.Task:
    draw = torch.Generator().manual_seed(1)
    tokens, other = torch.randint(0, 96, (2, 17), generator=draw)
    shape = ModelShape.of(model.config)
    return worker.Task(shape, ("none", "fp8_static", "nvfp4"), prompt=tokens[:3], new_tokens=4, tokens=tokens, calibration=other[:9])


@pytest.fixture
def weights(model: Any) -> Weights:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def sharded(group: Group, task: worker.Task, weights: Weights) -> ShardedLlama:
    comm = Communicator(group, max_tokens=task.max_tokens, hidden_size=task.shape.hidden_size, dtype=torch.float32)
    return ShardedLlama(task.shape, weights, comm)


@pytest.mark.parametrize("steps", [[17], [5, 1, 1, 10]], ids=["at-once", "from-the-cache"])
def test_logits_are_those_of_the_unsharded_model(model: Any, task: worker.Task, weights: Weights, steps: list[int]) -> None:
    def rank(group: Group) -> torch.Tensor:
        llama = sharded(group, task, weights)
        cache = Cache(llama, len(task.tokens))
        quants = formats.quants_for("none", [1.0] * task.shape.fused_calls)
        return torch.cat([llama.forward(tokens, cache, quants) for tokens in task.tokens.split(steps)])

    logits = torch.cat(run_virtual(WORLD, rank), dim=1)
    with torch.inference_mode():
        expected = model(task.tokens[None]).logits[0]
    assert float(expected.abs().max()) > 1.0
    assert float((logits - expected).abs().max()) < BOUND


@pytest.mark.parametrize("name", ["none", "nvfp4", "fp8_per_token"])
@pytest.mark.parametrize("steps", [[17], [5, 1, 1, 10]], ids=["at-once", "from-the-cache"])
def test_a_sharded_residual_gives_the_same_logits(task: worker.Task, weights: Weights, name: str, steps: list[int]) -> None:
    """Bit for bit, with calls of one token, which two of the three ranks own no row of. No rank holds more than its rows."""

    def rank(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        logits = []
        quants = formats.quants_for(name, [3.0] * task.shape.fused_calls)
        for kind in (ShardedLlama, SequenceParallelLlama):
            comm = Communicator(group, max_tokens=task.max_tokens, hidden_size=task.shape.hidden_size, dtype=torch.float32)
            llama = kind(task.shape, weights, comm)
            cache = Cache(llama, len(task.tokens))
            logits.append(torch.cat([llama.forward(tokens, cache, quants) for tokens in task.tokens.split(steps)]))
        return logits[0], logits[1]

    for replicated, sharded_ in run_virtual(WORLD, rank):
        assert torch.equal(replicated.view(torch.int32), sharded_.view(torch.int32))


def test_the_sharded_stream_is_the_replicated_one_cut_into_rows(task: worker.Task, weights: Weights) -> None:
    def rank(group: Group) -> None:
        comm = Communicator(group, max_tokens=task.max_tokens, hidden_size=task.shape.hidden_size, dtype=torch.float32)
        streams: dict[type, list[torch.Tensor]] = {}
        for kind in (ShardedLlama, SequenceParallelLlama):
            llama, seen = kind(task.shape, weights, comm), streams.setdefault(kind, [])
            inner = llama._fused
            llama._fused = lambda *given, inner=inner, seen=seen: (out := inner(*given), seen.append(out.residual))[0]  # type: ignore
            llama.forward(task.tokens, Cache(llama, len(task.tokens)), [None] * task.shape.fused_calls)
        assert len(streams[ShardedLlama]) == task.shape.fused_calls
        for whole, mine in zip(*streams.values(), strict=True):
            assert len(mine) == len(comm.owned_rows(17))
            assert torch.equal(comm.unshard(mine, 17), whole)

    run_virtual(WORLD, rank)


def test_losses_of_shards_are_those_of_the_whole(task: worker.Task) -> None:
    logits = torch.randn(17, 96, generator=torch.Generator().manual_seed(2)) * 30
    losses = torch.log_softmax(logits[:-1].double(), dim=-1).gather(1, task.tokens[1:, None])

    def rank(group: Group) -> torch.Tensor:
        shard = logits.chunk(WORLD, dim=1)[group.rank]
        return worker.token_losses(shard, task.tokens, group, group.rank * shard.shape[1])

    for found in run_virtual(WORLD, rank):
        assert float((found + losses[:, 0]).abs().max()) < 1e-5  # Logits reach 100, the sums are float32.


def test_calibration_finds_the_largest_norm_of_every_call(task: worker.Task, weights: Weights) -> None:
    def rank(group: Group) -> tuple[list[float], list[float]]:
        llama = sharded(group, task, weights)
        seen = [0.0] * task.shape.fused_calls
        quants = formats.quants_for("none", [1.0] * task.shape.fused_calls)
        for tokens in task.calibration.split(1):  # The first call sees no context: the same in steps and at once.
            llama.forward(tokens, Cache(llama, 1), quants, lambda call, n: seen.__setitem__(call, max(seen[call], float(n.abs().max()))))
        return formats.calibrate(llama, task.calibration), seen

    results = run_virtual(WORLD, rank)
    assert all(amax == results[0][0] for amax, _ in results)
    amax, seen = results[0]
    assert len(amax) == 5
    assert amax[0] == seen[0]
    assert amax[1] != seen[1]  # Attention saw the context.
    assert formats.quants_for("fp8_static", amax)[1].scale == amax[1] / 448  # type: ignore[union-attr]
    assert formats.quants_for("nvfp4", amax)[-1] is None


def run_worker(task: worker.Task, weights: Weights, logits: torch.Tensor) -> list[tuple[str, Any]]:
    reports: list[tuple[str, Any]] = []
    run_virtual(WORLD, lambda group: worker.work(group, task, weights, logits, lambda kind, value: reports.append((kind, value))))
    return reports


def test_a_row_shows_its_error_and_the_others_still_run(model: Any, task: worker.Task, weights: Weights) -> None:
    task = dataclasses.replace(task, formats=("none", "fp8_group80", "nvfp4"))
    unsharded = main.run_unsharded(model, task)
    rows = [value for kind, value in run_worker(task, weights, unsharded.logits) if kind == "row"]
    assert [row.format for row in rows] == ["none", "fp8_group80", "nvfp4"]
    assert "FormatError" in rows[1].error
    assert rows[1].perplexity is None
    assert rows[0].error is None
    assert rows[2].error is None
    assert abs(rows[0].perplexity - unsharded.perplexity) < 1e-4 * unsharded.perplexity
    assert abs(rows[2].perplexity - unsharded.perplexity) > 1e-3 * unsharded.perplexity
    assert rows[0].standard_error < 1e-4 * unsharded.perplexity < rows[2].standard_error


def result_of(unsharded: main.Unsharded) -> main.Result:
    return main.Result("cpu", WORLD, 17, "float32", {}, unsharded.perplexity, "prompt")


def test_three_processes_end_to_end(model: Any, task: worker.Task, weights: Weights, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    unsharded = main.run_unsharded(model, task)
    assert len(set(unsharded.generated)) == task.new_tokens
    result = result_of(unsharded)
    generated, in_fp8 = main.measure(result, task, weights, unsharded, lambda step: None)
    assert generated == unsharded.generated
    assert len(in_fp8) == task.new_tokens
    assert result.passed, result
    table.save_json(result, tmp_path / "new" / "demo.json")
    saved = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert saved["passed"] is True
    assert [row["format"] for row in saved["rows"]] == list(task.formats)
    for row in saved["rows"]:
        assert row["error"] is None
        assert row["bytes_replicated"] > 0
        assert row["bytes_sharded"] > 0
        assert row["us_one_token"] is None  # no GPU
        assert row["difference"] == row["perplexity"] - saved["unsharded_perplexity"]
    table.save_plot(result, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("on_gpus", [False, True])
def test_the_table_fits_80_columns(on_gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the longest names and numbers: none is cut, and no line is longer."""
    times = (12_345.6, 123_456.7) if on_gpus else (None, None)
    names = ("none", "fp8_per_token", "mxfp8/ceil")
    rows = [worker.Row(name, 1254.7421, 234.5678, 1_234_145_728, 3_145_728, *times) for name in names]
    result = main.Result("cpu", 8, 123_456, "bfloat16", {}, 12.7421, "prompt", rows=[*rows, worker.Row("fp8_group96", error="no")])
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    table.show(result)
    text = written.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for said in (*names, "1254.7421", "+1242.0000", "1,234.146", "3.146", *(("12,346", "123,457") if on_gpus else ())):
        assert said in text, said
    rows[0].format = "fp8_group128/ue8m0/column"
    written.truncate(0)
    written.seek(0)
    table.show(result)
    assert "…" not in written.getvalue()
    assert max(map(len, written.getvalue().splitlines())) <= 80


def test_the_demo_says_first_how_long_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ends(*args: Any) -> None:
        raise PlatformError("stop", hint="-")

    monkeypatch.setattr(main, "read_model", ends)
    with pytest.raises(PlatformError, match="stop"):
        main.run("cpu")
    assert capsys.readouterr().err.splitlines()[0] == "SmolLM2-135M on 3 ranks in 7 formats: two to three minutes on two cores"


def test_the_worker_measures_the_sharded_residual(model: Any, task: worker.Task, weights: Weights) -> None:
    unsharded = main.run_unsharded(model, task)
    task = dataclasses.replace(task, formats=("none", "nvfp4"))
    found = [dict(run_worker(dataclasses.replace(task, sharded=on), weights, unsharded.logits)) for on in (False, True)]
    assert found[0]["text"] == found[1]["text"] == unsharded.generated
    assert found[0]["logits"] == found[1]["logits"] < BOUND
    replicated, sharded_ = found[0]["row"], found[1]["row"]
    assert sharded_.error is None
    assert sharded_.perplexity == replicated.perplexity
    assert (sharded_.bytes_replicated, sharded_.bytes_sharded) == (replicated.bytes_replicated, replicated.bytes_sharded)
    assert 0 < sharded_.bytes_sharded < sharded_.bytes_replicated


def test_ranks_that_end_early_leave_an_error_in_every_row(model: Any, task: worker.Task, weights: Weights) -> None:
    unsharded = main.run_unsharded(model, task)
    result = result_of(unsharded)
    broken = dataclasses.replace(task, prompt=torch.empty(0, dtype=torch.long))  # No token, so no logits to choose from.
    assert main.measure(result, broken, weights, unsharded, lambda step: None) == ([], [])
    assert [row.format for row in result.rows] == list(task.formats)
    assert all(row.error is not None and row.error.startswith("rank ") for row in result.rows)
    assert not result.passed


def test_logits_off_the_unsharded_models_fail_the_run(model: Any, task: worker.Task, weights: Weights) -> None:
    unsharded = main.run_unsharded(model, task)
    result = result_of(unsharded)
    [difference] = [value for kind, value in run_worker(task, weights, unsharded.logits) if kind == "logits"]
    result.logits_difference = difference
    assert result.passed
    [difference] = [value for kind, value in run_worker(task, weights, unsharded.logits + 0.01) if kind == "logits"]
    result.logits_difference = difference
    assert not result.passed


def test_world_sizes_that_do_not_divide_the_model_are_refused(task: worker.Task) -> None:
    task.shape.check_world_size(3)
    with pytest.raises(ShapeError, match=r"3 key-value heads do not divide among 2 ranks\nhint: "):
        task.shape.check_world_size(2)


def test_the_shared_weights_are_mapped_unchanged(weights: Weights, tmp_path: Path) -> None:
    share(weights, tmp_path)
    mapped = attach(tmp_path)
    assert mapped.keys() == weights.keys()
    assert all(torch.equal(mapped[name].view(torch.int32), weights[name].view(torch.int32)) for name in weights)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("collogue.tools.demo.weights.model_file", lambda: tmp_path / "x.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(PlatformError, match=r"not installed: gguf\nhint: pip install gguf"):
        read_model()


@pytest.mark.parametrize(("device", "error"), [("tpu", ArgumentError), ("cuda", PlatformError)])
def test_devices_that_cannot_be(device: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(error):
        main.choose_device(device, 2)


def test_an_unknown_format_is_refused_before_anything_is_read() -> None:
    with pytest.raises(FormatError, match="'fp7'"):
        main.run(formats=("none", "fp7"))
