"""The fusion pass on small graphs: what it finds, what it leaves alone and why, and that the bits are those of the contract."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from models import small_model
from torch.utils._pytree import tree_leaves

import collogue
from collogue import FP8Group, FP8PerToken, FP8Static, Quant, RMSNorm, registry
from collogue.errors import ArgumentError

pytestmark = pytest.mark.slow

T, H, EPS = 6, 64, 1e-5


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A real process group, of one rank: its all-reduce does nothing, so every difference is the pass's."""
    gc.collect()
    registry._COMMUNICATORS.clear()  # what other tests left open, of groups that had the same name
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def comm(group: Any) -> Iterator[collogue.Communicator]:
    torch._dynamo.reset()
    collogue.compile.report().clear()
    with collogue.Communicator(group, max_tokens=T, hidden_size=H) as comm, torch.no_grad():
        yield comm


def tensors(dtype: torch.dtype = torch.bfloat16, lead: tuple[int, ...] = (2, 3)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Partial, residual, weight."""
    torch.manual_seed(1)
    return torch.randn(*lead, H).to(dtype), torch.randn(*lead, H).to(dtype), (torch.rand(H) + 0.5).to(dtype)


# ---- models


def unweighted(x: torch.Tensor) -> torch.Tensor:
    wide = x.to(torch.float32)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * unweighted(x)


def gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * (1.0 + weight.float())).type_as(x)


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return ((1.0 / torch.sqrt(EPS + (wide * wide).mean(-1, True))) * wide * weight.float()).to(x.dtype)


def operator_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, (H,), weight, EPS)


NORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "llama": llama,
    "gemma": gemma,
    "plain": plain,
    "operator": operator_norm,
}


def functional(x: torch.Tensor) -> torch.Tensor:
    return collectives.all_reduce(x * 1, "sum", dist.group.WORLD)


def in_place(x: torch.Tensor) -> torch.Tensor:
    x = x * 1
    dist.all_reduce(x)
    return x


def static(n: torch.Tensor, scale: Any) -> torch.Tensor:
    return (n.float() * (1.0 / scale)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def per_token(n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (n.abs().amax(-1, keepdim=True).float() / 448.0).clamp(min=1e-6)
    return (n.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


# ---- helpers


def contract(
    given: tuple[torch.Tensor, ...], *, residual: bool = True, offset: float = 0.0, quant: Quant | None = None, keep_norm: bool = False
) -> list[torch.Tensor]:
    """The contract's answer: residual, norm, codes, scales, those that there are, in the model's shapes."""
    x, r, weight = given
    norm = RMSNorm(weight, EPS, offset)
    out = collogue.reference.all_reduce(
        [x.view(-1, H)], residual=r.view(-1, H) if residual else None, norm=norm, quant=quant, keep_norm=keep_norm
    )
    return [t.view(*x.shape[:-1], -1) for _, t in out.items()]


def compiled(model: Callable[..., Any], *args: Any, backend: str = "eager") -> list[torch.Tensor]:
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        return tree_leaves(collogue.compile(model, backend=backend, fullgraph=True)(*args))


def same_bits(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return [t.shape for t in found] == [t.shape for t in expected] and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(found, expected, strict=True)
    )


def only_fused() -> Any:
    """The one thing that the report tells."""
    report = collogue.compile.report()
    assert (len(report.fused), report.missed) == (1, []), str(report)
    return report.fused[0]


def only_missed() -> str:
    report = collogue.compile.report()
    assert (report.fused, len(report.missed)) == ([], 1), str(report)
    return report.missed[0].reason


# ---- what is found


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", NORMS)
def test_written_out_norms(form: str, dtype: torch.dtype, group: Any) -> None:
    with collogue.Communicator(group, max_tokens=T, hidden_size=H, dtype=dtype):
        given = tensors(dtype)

        def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
            y = r + functional(x)
            return y, NORMS[form](y, w)

        assert same_bits(compiled(model, *given), contract(given, offset=1.0 if form == "gemma" else 0.0))
    fused = only_fused()
    assert (fused.residual, fused.eps, fused.weight_offset, fused.quant) == (True, pytest.approx(EPS), float(form == "gemma"), "none")
    rounds = dtype == torch.bfloat16
    assert ("the sum to bfloat16 before the residual" in fused.roundings) == rounds
    assert ("y * rstd to bfloat16 before the weight" in fused.roundings) == (rounds and form == "llama")


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(("reduce", "backend"), [(functional, "inductor"), (in_place, "eager"), (in_place, "inductor")])
def test_kinds_of_all_reduce(reduce: Callable[[torch.Tensor], torch.Tensor], backend: str) -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = reduce(x) + r
        return y, llama(y, w)

    assert same_bits(compiled(model, *given, backend=backend), contract(given))
    only_fused()


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(("keep_norm", "backend"), [(False, "eager"), (True, "eager"), (True, "inductor")])
@pytest.mark.parametrize("quant", [FP8PerToken(1e-6), FP8Static(0.25), FP8Static(torch.tensor(0.25))], ids=["token", "number", "tensor"])
def test_quantization(quant: Any, keep_norm: bool, backend: str) -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, s: Any) -> Any:
        y = functional(x) + r
        n = operator_norm(y, w)
        return y, n if keep_norm else None, per_token(n) if s is None else static(n, s)

    found = [t for t in compiled(model, *given, quant.given_scale, backend=backend) if t is not None]
    assert same_bits(found, contract(given, quant=quant, keep_norm=keep_norm))
    fused = only_fused()
    assert (fused.quant, fused.keeps_norm) == (quant.label, keep_norm)


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("quant", [FP8PerToken(1e-6), FP8Static(torch.tensor(0.25))], ids=["token", "tensor"])
def test_one_row_has_one_scale_either_way(quant: Any) -> None:
    given = tensors(lead=(1, 1))

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, s: Any) -> Any:
        y = functional(x) + r
        n = operator_norm(y, w)
        return y, per_token(n) if s is None else static(n, s)

    assert same_bits(compiled(model, *given, quant.given_scale), contract(given, quant=quant))
    assert only_fused().quant == quant.label


@pytest.mark.usefixtures("comm")
def test_a_scale_that_is_rounded_on_the_way() -> None:
    given, scale = tensors(), torch.tensor(0.3)
    found = compiled(lambda x, r, w, s: static(operator_norm(functional(x) + r, w), s.bfloat16().float()), *given, scale)
    assert same_bits(found, contract(given, quant=FP8Static(scale))[1:])
    assert "scale to bfloat16" in only_fused().roundings


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("quant", [FP8PerToken(1e-6), FP8Static(0.25)], ids=["token", "number"])
def test_quantization_of_a_norm_left_in_float32(quant: Any) -> None:
    """Inductor's graph may lack the conversion to bfloat16 and back between norm and quantization: the fused call rounds, and says so."""
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = functional(x) + r
        n = y.float() * torch.rsqrt(y.float().pow(2).mean(-1, keepdim=True) + EPS) * w
        return y, per_token(n) if quant.given_scale is None else static(n, quant.given_scale)

    assert same_bits(compiled(model, *given), contract(given, quant=quant))
    fused = only_fused()
    assert fused.quant == quant.label
    assert any("(added)" in rounding for rounding in fused.roundings)


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(
    ("roundings", "norm"),
    [
        ([], plain),
        (["weight to bfloat16"], lambda y, w: plain(y, w.to(y.dtype))),
        (["weight to bfloat16"], lambda y, w: gemma(y, w.to(y.dtype))),
        (["y * rstd to bfloat16 before the weight"], lambda y, w: (unweighted(y).float() * w).to(y.dtype)),
        (["rstd to bfloat16"], lambda y, w: (y.float() * torch.rsqrt(y.float().square().mean(-1, True) + EPS).to(y.dtype) * w).to(y.dtype)),
    ],
)
def test_roundings_around_a_weight_in_float32(roundings: list[str], norm: Callable[..., Any]) -> None:
    """The fused call takes the weight as it is, and the report names what the model rounds on the way, also to and fro."""
    x, r, w = given = (*tensors()[:2], torch.rand(H) + 0.5)
    found = compiled(lambda *t: norm(functional(t[0]) + t[1], t[2]), x, r, w)
    fused = only_fused()
    assert same_bits(found, contract(given, offset=fused.weight_offset)[1:])
    assert list(fused.roundings) == ["the sum to bfloat16 before the residual", *roundings]


@pytest.mark.usefixtures("comm")
def test_a_sum_without_residual_and_the_next_one() -> None:
    """A vocabulary-parallel embedding, then a layer: the first sum is the residual of the second."""
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        stream = functional(x)
        y = stream + functional(llama(stream, w))
        return llama(y, w)

    first = contract(given, residual=False)
    expected = contract((first[1], first[0], given[2]))
    assert same_bits(compiled(model, *given), expected[1:])
    assert [fused.residual for fused in collogue.compile.report().fused] == [False, True]


# A norm before the residual


def behind_branch(
    given: tuple[torch.Tensor, ...], *, offset: float = 0.0, norm: bool = True, quant: Quant | None = None
) -> list[torch.Tensor]:
    """The contract's answer, with one weight for both norms."""
    x, r, weight = given
    each = RMSNorm(weight, EPS, offset)
    out = collogue.reference.all_reduce([x.view(-1, H)], residual=r.view(-1, H), norm=each if norm else None, quant=quant, branch_norm=each)
    return [t.view(*x.shape[:-1], -1) for _, t in out.items()]


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("quant", [None, FP8PerToken(1e-6), FP8Static(torch.tensor(0.25))], ids=["none", "token", "tensor"])
@pytest.mark.parametrize("form", NORMS)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_norm_before_the_residual(form: str, quant: Any, backend: str) -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, s: Any) -> Any:
        y = r + NORMS[form](functional(x), w)
        n = NORMS[form](y, w)
        return y, n if quant is None else per_token(n) if s is None else static(n, s)

    offset = float(form == "gemma")
    found = compiled(model, *given, None if quant is None else quant.given_scale, backend=backend)
    assert same_bits(found, behind_branch(given, offset=offset, quant=quant))
    fused = only_fused()
    assert (fused.residual, fused.eps, fused.branch_eps) == (True, pytest.approx(EPS), pytest.approx(EPS))
    assert (fused.weight_offset, fused.branch_offset, fused.quant) == (offset, offset, "none" if quant is None else quant.label)
    assert fused.roundings.count("y * rstd to bfloat16 before the weight") == 2 * (form == "llama")
    assert not any("before the residual" in rounding for rounding in fused.roundings)


@pytest.mark.usefixtures("comm")
def test_a_norm_before_the_residual_and_none_behind_it() -> None:
    """OLMo 2: the next layer reads the stream itself."""
    given = tensors()
    found = compiled(lambda x, r, w: operator_norm(functional(x), w) + r, *given)
    assert same_bits(found, behind_branch(given, norm=False))
    assert " all_reduce + RMSNorm(eps=1e-05) + residual" in str(only_fused())


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(
    "model",
    [
        lambda x, r, w: (lambda n: (n, n + r))(operator_norm(functional(x), w)),
        lambda x, r, w: (lambda s: (s, operator_norm(s, w) + r))(functional(x)),
        lambda x, r, w: (lambda s: operator_norm(s, w) + s * r)(functional(x)),
        lambda x, r, w: operator_norm(functional(x), w) + w,
        lambda x, r, w: operator_norm(functional(x), w) + r.float(),
        lambda x, r, w: operator_norm(functional(x), w) + 1.0,
    ],
    ids=["norm is read", "sum is read", "residual of the sum", "no residual", "another dtype", "a number"],
)
def test_what_is_no_norm_before_a_residual(model: Callable[..., Any]) -> None:
    """The first norm is fused, and what follows stays."""
    given = tensors()
    for a, b in zip(compiled(model, *given), tree_leaves(model(*given)), strict=True):
        torch.testing.assert_close(a, b)
    assert only_fused().branch_eps is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("kind", ["gemma2", "glm4", "olmo2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_models_that_end_in_plain_all_reduces(kind: str, group: Any) -> None:
    """``parallelize(fuse=False)`` and the pass: one call for each boundary, with the norm of the branch where there is one."""
    model, tokens = small_model(kind), torch.tensor([[1, 5, 9, 100], [3, 3, 7, 2]])
    expected = model(tokens, use_cache=False).logits
    plain = collogue.parallelize(model, group, max_tokens=8, fuse=False)
    (found,) = compiled(lambda tokens: plain(tokens, use_cache=False).logits, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    report = collogue.compile.report()
    assert (len(report.fused), report.missed) == (2 * len(model.model.layers), []), str(report)
    assert all((fused.branch_eps is not None) == (kind in ("gemma2", "glm4", "olmo2")) for fused in report.fused)
    assert [fused.eps is None for fused in report.fused[:-1]] == [kind == "olmo2"] * (len(report.fused) - 1)
    assert report.fused[-1].eps is not None


@pytest.mark.usefixtures("comm")
def test_layers_with_norms_on_both_sides_sharded() -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = r + operator_norm(functional(x), w)
        z = y + operator_norm(functional(operator_norm(y, w)), w)
        return z, operator_norm(z, w)

    first = behind_branch(given)
    expected = behind_branch((first[1], first[0], given[2]))
    found = collogue.compile(model, backend="eager", fullgraph=True, sharded=True)(*given)
    assert same_bits(tree_leaves(found), expected)
    assert collogue.compile.report().remarks == ["residual sharded in 2 calls, gathered whole 1 times"]


@pytest.mark.usefixtures("comm")
def test_shapes_may_be_symbolic() -> None:
    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = functional(x) + r
        return y, per_token(llama(y, w))

    step = collogue.compile(model, backend="eager", fullgraph=True)
    for lead in ((2, 3), (4, 5), (3, 2)):  # 20 rows are more than the communicator takes in one call
        given = tensors(lead=lead)
        for tensor in given[:2]:
            torch._dynamo.mark_dynamic(tensor, (0, 1))
        assert same_bits(tree_leaves(step(*given)), contract(given, quant=FP8PerToken(1e-6)))
    only_fused()


@pytest.mark.usefixtures("comm")
def test_a_symbolic_hidden_size_is_a_near_miss() -> None:
    """``dynamic=True`` leaves nothing fixed, not even the number in ``+ eps``."""
    step = collogue.compile(lambda x, r, w: llama(functional(x) + r, w), backend="eager", dynamic=True)
    given = tensors()
    torch.testing.assert_close(step(*given), llama(functional(given[0]) + given[1], given[2]))
    assert "mark_dynamic" in only_missed()


@pytest.mark.usefixtures("comm")
def test_removed_roundings_are_bounded() -> None:
    """The unfused model differs by the roundings that the report names: of y by one unit, of the norm by three half units."""
    given = tensors(lead=(1, 6))

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = r + functional(x)
        return y, llama(y, w)

    unfused, fused = model(*given), compiled(model, *given)
    assert len(only_fused().roundings) == 2
    ulp = torch.finfo(torch.bfloat16).eps
    for before, after, units in zip(unfused, fused, (1.0, 3.0), strict=True):
        assert bool(((before - after).abs() <= units * ulp * after.abs() + 1e-6).all())


@pytest.mark.usefixtures("comm")
def test_float32_graph_keeps_every_bit(group: Any) -> None:
    """In float32 no rounding goes away before y: the unfused contract calls give the same bits one by one."""
    given = tensors(torch.float32)
    with collogue.Communicator(group, max_tokens=T, hidden_size=H, dtype=torch.float32) as wide:
        x, r, weight = (t.view(-1, H) if t.ndim > 1 else t for t in given)
        reduced = wide.all_reduce(x).reduced
        assert reduced is not None
        y = reduced + r
        out = wide.finish(y, norm=RMSNorm(weight, EPS), quant=FP8PerToken(1e-6))

        def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
            y = functional(x) + r
            return y, per_token(plain(y, w))

        found = compiled(model, *given)
    assert same_bits([t.view(T, -1) for t in found], [y, out.codes, out.scales])  # type: ignore[list-item]


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_fused_model_has_the_gradients_of_its_graph(backend: str, group: Any) -> None:
    """The pass works below autograd: what is fused is the forward graph, and the backward graph stays the model's own."""
    x, r, w = tensors(torch.float32)

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return operator_norm(functional(x) + r, w)

    def gradients(model: Callable[..., list[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        given = [t.clone().requires_grad_() for t in (x, r, w)]
        return torch.autograd.grad(model(*given)[0].square().sum(), given[1:])

    with collogue.Communicator(group, max_tokens=T, hidden_size=H, dtype=torch.float32), torch.enable_grad():
        found = gradients(lambda *given: compiled(model, *given, backend=backend))
        torch.testing.assert_close(found, gradients(lambda *given: [model(*given)]))
    assert len(collogue.compile.report().fused) == 1


# ---- what is left alone


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(
    ("reason", "model"),
    [
        ("no RMSNorm reads the sum", lambda x, r, w: functional(x) + r),
        ("not rounded", lambda x, r, w: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, True) + EPS) * w)((functional(x) + r).float())),
        ("no RMSNorm reads the sum", lambda x, r, w: torch.nn.functional.layer_norm(functional(x) + r, (H,), w)),
        ("no RMSNorm reads the sum", lambda x, r, w: llama((functional(x) + r).transpose(0, 1), w)),
        ("no RMSNorm reads the sum", lambda x, r, w: (lambda s: (s, llama(s + r, w)))(functional(x))),
        ("added to itself", lambda x, r, w: (lambda s: llama(s + s, w))(functional(x))),
        ("added to itself", lambda x, r, w: (lambda s: (lambda t: llama(t + t, w))(s.view(6, H)))(functional(x))),
        ("a bias?", lambda x, r, w: llama(functional(x) + w + r, w)),
        ("a number is added", lambda x, r, w: llama(functional(x) + 1.0, w)),
        ("another dtype", lambda x, r, w: operator_norm(functional(x) + r.float(), w.float())),
        ("not in float32", lambda x, r, w: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, True) + EPS) * w)(functional(x) + r)),
        ("reduces by max", lambda x, r, w: llama(collectives.all_reduce(x, "max", dist.group.WORLD), w)),
        # Which of the two reasons is named first depends on what else the process has compiled.
        ("no communicator for float32 rows of 64|not a weight of [H]", lambda x, r, w: llama(functional(x.float()), w.float())),
        ("no weight", lambda x, r, w: torch.nn.functional.rms_norm(functional(x) + r, (H,), None, EPS)),
        ("not a weight of [H]", lambda x, r, w: (lambda y: torch.nn.functional.rms_norm(y, (H,), None, EPS) * r)(functional(x) + r)),
        ("computed from the sum", lambda x, r, w: (lambda y: operator_norm(y, y[0, 0]))(functional(x) + r)),
        ("eps is not a constant", lambda x, r, w: (lambda y: y * torch.rsqrt(y.pow(2).mean(-1, True) + r[..., :1]) * w)(in_float(x))),
    ],
)
def test_near_misses_are_left_alone_and_explained(reason: str, model: Callable[..., Any]) -> None:
    given = tensors()
    found = compiled(model, *given)
    for a, b in zip(found, tree_leaves(model(*given)), strict=True):
        torch.testing.assert_close(a, b)
    missed = only_missed()
    assert any(each in missed for each in reason.split("|")), missed


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(
    ("reason", "model"),
    [
        ("row by row", lambda y, w: ((lambda z: z * torch.rsqrt(z.pow(2).mean(-1) + EPS))(y.float()) * w).to(y.dtype)),
        ("not a weight of [H]", lambda y, w: torch.nn.functional.rms_norm(y, (H,), None, EPS) * w[:, None]),
    ],
)
def test_what_lies_along_columns_is_no_norm_of_rows(reason: str, model: Callable[..., Any], group: Any) -> None:
    """With as many rows as columns a vector fits both ways."""
    with collogue.Communicator(group, max_tokens=H, hidden_size=H):
        given = tensors(lead=(H,))
        found = compiled(lambda x, r, w: model(functional(x) + r, w), *given)
    torch.testing.assert_close(found, [model(given[0] + given[1], given[2])])
    assert reason in only_missed()


def test_a_communicator_whose_terms_are_rounded_is_left_alone(group: Any) -> None:
    torch._dynamo.reset()
    collogue.compile.report().clear()
    with collogue.Communicator(group, max_tokens=T, hidden_size=H, wire=FP8Group(H)), torch.no_grad():
        given = tensors()
        found = compiled(lambda x, r, w: llama(functional(x) + r, w), *given)
    torch.testing.assert_close(found, tree_leaves(llama(given[0] + given[1], given[2])))
    assert "sends terms as" in only_missed()


@pytest.mark.usefixtures("comm")
def test_scales_along_columns_are_not_per_token(group: Any) -> None:
    def quantize(n: torch.Tensor) -> torch.Tensor:
        return (n.float() / (n.abs().amax(-1).float() / 448.0).clamp(min=1e-6)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)

    with collogue.Communicator(group, max_tokens=H, hidden_size=H):
        given = tensors(lead=(H,))
        found = compiled(lambda x, r, w: quantize(operator_norm(functional(x) + r, w)), *given)
        assert same_bits(found, [quantize(contract(given)[1])])
    assert only_fused().quant == "none"


def _times(n: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (n.float() * scale.reciprocal()).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale.reshape(1)


def _over(n: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (n.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale.reshape(1)


#: Scales of one element that are computed from the norm, or from the sum.
DYNAMIC: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "amax": lambda n, y: n.abs().amax() / 448,
    "amax in float32": lambda n, y: n.float().abs().amax() / 448.0,
    "max": lambda n, y: n.abs().max().float() / 448.0,
    "torch.max": lambda n, y: torch.max(torch.abs(n)).to(torch.float32) / 448.0,
    "kept dimensions": lambda n, y: n.abs().amax((0, 1, 2), True).float() / 448.0,
    "flat": lambda n, y: n.flatten().abs().max(0).values.float() / 448.0,
    "rows first": lambda n, y: n.abs().amax(-1).amax().float() / 448.0,
    "both ends": lambda n, y: torch.maximum(n.amax(), -n.amin()).float() / 448.0,
    "aminmax": lambda n, y: torch.maximum(n.aminmax().max, n.aminmax().min.neg()).float() / 448.0,
    "norm": lambda n, y: torch.linalg.vector_norm(n.float(), torch.inf) / 448.0,
    "bounded": lambda n, y: (n.abs().amax().float() / 448.0).clamp(min=1e-12),
    "multiplied": lambda n, y: n.abs().amax().float() * (1.0 / 448.0),
    "of the stream": lambda n, y: y.abs().amax().float() / 448.0,
    "of all ranks": lambda n, y: collectives.all_reduce(n.abs().amax().float(), "max", dist.group.WORLD) / 448.0,
    "power of two": lambda n, y: torch.exp2(torch.ceil(torch.log2(n.abs().amax().float() / 448.0))),
    "first row": lambda n, y: n[0, 0].abs().amax().float() / 448.0,
}


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("lead", [(2, 3), (1, 1)])
@pytest.mark.parametrize("quantize", [_times, _over])
@pytest.mark.parametrize("kind", DYNAMIC)
def test_one_scale_from_the_whole_norm_stays_behind_it(kind: str, quantize: Callable[..., Any], lead: tuple[int, ...]) -> None:
    given = tensors(lead=lead)

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = functional(x) + r
        n = operator_norm(y, w)
        return y, quantize(n, DYNAMIC[kind](n, y))

    y, n = contract(given)
    assert same_bits(compiled(model, *given), tree_leaves((y, quantize(n, DYNAMIC[kind](n, y)))))
    report = collogue.compile.report()
    assert [fused.quant for fused in report.fused] == ["none"], str(report)
    assert [missed.reason for missed in report.missed] == ["it reduces by max, not by sum"] * (kind == "of all ranks")
    assert any("the FP8 scale is computed from the sum" in remark for remark in report.remarks) or kind == "amax", report.remarks


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize("steps", [3, 40])
def test_a_scale_that_is_computed_late_from_inputs(steps: int) -> None:
    """It may be moved in front of the call; where that is a long way, it is the quantization that stays."""
    given, scale = tensors(), torch.tensor(0.125)

    def late(s: torch.Tensor) -> torch.Tensor:
        for step in range(steps):
            s = torch.sin(s) + 0.25 if step % 2 else torch.cos(s)
        return s

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> Any:
        return static(operator_norm(functional(x) + r, w), late(s))

    expected = contract(given, quant=FP8Static(late(scale)))[1]
    assert same_bits(compiled(model, *given, scale), [expected])
    assert only_fused().quant == ("fp8_static" if steps == 3 else "none")


def in_float(x: torch.Tensor) -> torch.Tensor:
    return functional(x).float()


@pytest.mark.usefixtures("comm")
@pytest.mark.parametrize(
    ("reason", "quantize"),
    [
        ("without a clamp", lambda n: (n.float() * 4.0).to(torch.float8_e4m3fn)),
        ("no lower bound", lambda n: (n.float() / (n.abs().amax(-1, True).float() / 448.0)).to(torch.float8_e4m3fn)),
        ("not amax / 448", lambda n: (n.float() / (n.abs().amax(-1, True).float() / 240.0).clamp(min=1e-6)).to(torch.float8_e4m3fn)),
        ("not amax / 448", lambda n: (n.float() / (n.abs().amax(0, True).float() / 448.0).clamp(min=1e-6)).to(torch.float8_e4m3fn)),
    ],
)
def test_other_quantization_stays_behind_the_fused_norm(reason: str, quantize: Callable[..., Any]) -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return quantize(operator_norm(functional(x) + r, w))

    expected = quantize(contract(given)[1])
    assert same_bits(compiled(model, *given), [expected])
    assert only_fused().quant == "none"
    assert reason in collogue.compile.report().remarks[0]


def test_without_a_communicator(group: Any) -> None:
    collogue.compile.report().clear()
    given = tensors()
    with torch.no_grad():
        compiled(lambda x, r, w: llama(functional(x) + r, w), *given)
    assert "make one before compiling" in only_missed()


# ---- compiling


def test_options_and_modes(comm: collogue.Communicator) -> None:
    with pytest.raises(ArgumentError, match="backend='nothing'"):
        collogue.compile(llama, backend="nothing")
    with pytest.raises(ArgumentError, match="hint: use backend='inductor'"):
        collogue.compile(llama, backend="eager", mode="reduce-overhead")
    seen: list[int] = []
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        return llama(functional(x) + r, w)

    def own(graph: torch.fx.Graph) -> None:
        seen.append(sum(node.target is torch.ops.collogue.all_reduce.default for node in graph.nodes))

    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        step = collogue.compile(model, mode="reduce-overhead", options={"post_grad_custom_pre_pass": own}, fullgraph=True)
        assert same_bits([step(*given)], contract(given)[1:])
    assert seen == [1]


@pytest.mark.usefixtures("comm")
def test_a_sharded_stream_is_gathered_where_it_is_read() -> None:
    given = tensors()

    def model(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> Any:
        y = r + functional(x)
        z = y + functional(llama(y, w))
        return z, llama(z, w)

    expected = contract((contract(given)[1], contract(given)[0], given[2]))
    found = collogue.compile(model, backend="eager", fullgraph=True, sharded=True)(*given)
    assert same_bits(tree_leaves(found), expected)
    assert collogue.compile.report().remarks == ["residual sharded in 2 calls, gathered whole 1 times"]


@pytest.mark.parametrize("more", [{}, {"prefetch": False}, {"branch": True}], ids=str)
def test_calls_that_a_graph_makes_itself_are_sharded_too(more: dict[str, bool], comm: collogue.Communicator) -> None:
    """Whatever arguments follow the communicator's name. A call that says who owns which rows stays as it is."""
    x, r, weight = (t.view(-1, t.shape[-1]) if t.dim() > 1 else t for t in tensors())
    norm = RMSNorm(weight, EPS, prefetch=more.get("prefetch", True))
    branch = RMSNorm(weight, EPS) if "branch" in more else None
    calls = (
        lambda x, r: comm.all_reduce(x, residual=r, norm=norm, branch_norm=branch),
        lambda x, r: comm.all_reduce(x, residual=r, norm=norm, branch_norm=branch, sharded=True, rows=[len(x)]),
    )
    with torch.no_grad():
        for call, sharded in zip(calls, (1, 0), strict=True):
            found = collogue.compile(call, backend="eager", fullgraph=True, sharded=True)(x, r)
            assert collogue.compile.report().remarks[-1] == f"residual sharded in {sharded} calls, gathered whole {sharded} times"
            assert same_bits(*([tensor for _, tensor in out.items()] for out in (found, call(x, r))))


def test_the_pass_is_part_of_the_cache_key(comm: collogue.Communicator, group: Any) -> None:
    from collogue.pytorch.fusion import FusionPass

    before = FusionPass().uuid()
    assert before == FusionPass().uuid() != FusionPass(sharded=True).uuid()
    with collogue.Communicator(group, max_tokens=T + 1, hidden_size=H):
        assert FusionPass().uuid() != before


def test_report_as_text(comm: collogue.Communicator) -> None:
    given = tensors()
    compiled(lambda x, r, w: (static(llama(functional(x) + r, w), 2.0), functional(r)), *given)
    text = str(collogue.compile.report())
    assert f"[2, 3, 64] on {comm.name}: all_reduce + residual + RMSNorm(eps=1e-05) + fp8_static; roundings that differ: the sum" in text
    assert text.endswith("no RMSNorm reads the sum\n1 fused, 1 missed")
