"""Ranks on several hosts, and groups that move the bytes of calls themselves: bits, plans, faults. Mistakes are at the end."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from islands import check, check_experts, dying, on_hosts, wrong
from ranks import HIDDEN_SIZE, communicator
from samples import DTYPES, every_format, same, wild

import collogue
from collogue import Output, RMSNorm, reference
from collogue.calls.call import Call
from collogue.calls.capacity import Capacity
from collogue.contract.quant import NVFP4, FP8Group, FP8PerToken, describe
from collogue.contract.spec import as_islands
from collogue.errors import ArgumentError, CollogueError, MismatchedCall, UnsupportedError
from collogue.host.engine import HostEngine
from collogue.planning.explain import Machine, explain
from collogue.planning.host import exchanges, plan_call, steps
from collogue.planning.islands import adder, split
from collogue.planning.plan import Plan
from collogue.planning.topology import Overrides, Topology, check_terms
from collogue.testing import VirtualGroup, run_virtual
from collogue.testing.inputs import make_prologue
from collogue.testing.oracle import by_reference, by_scalar
from collogue.testing.processes import run_processes

#: Hosts by rank: islands of one size, of several, ranks of one host that do not follow each other, and one rank alone.
HOSTS = {
    "2 x 2": "aabb",
    "2 x 3": "aaabbb",
    "4 x 2": "aabbccdd",
    "3 + 1": "aaab",
    "1 + 2 + 1": "abbc",
    "in turns": "ababa",
    "all alone": "abc",
}


# ---- the sum


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("islands", [[[0, 1], [2, 3]], [[0, 1, 2], [3]], [[0, 2], [1, 3]], [[0], [1, 2], [3]]])
def test_the_reference_adds_islands_as_scalar_loops_do(dtype: torch.dtype, islands: list[list[int]]) -> None:
    partials, weight = [wild(4, 256, seed=s, dtype=dtype) for s in range(4)], RMSNorm(wild(256, seed=9).to(dtype))
    seen = 0
    for quant in (None, NVFP4(3.0), FP8PerToken()):
        for residual in (None, wild(4, 256, seed=5, dtype=dtype)):
            got = by_reference(partials, residual, weight, quant, quant is not None, islands=islands)
            assert wrong(got, by_scalar(partials, residual, weight, quant, quant is not None, islands=islands)) == []
            seen += wrong(got, by_scalar(partials, residual, weight, quant, quant is not None)) != []
    assert seen or dtype != torch.float32 or islands == [[0, 1, 2], [3]]  # the split shows, but where it comes to rank order


def test_one_island_and_islands_of_one_rank_are_rank_order() -> None:
    partials = [wild(2, 64, seed=s, dtype=torch.float32) for s in range(3)]
    plain = reference.all_reduce(partials).reduced
    for islands in ([[0, 1, 2]], [[0], [1], [2]]):
        assert same(reference.all_reduce(partials, islands=islands).reduced, plain)
        assert as_islands(islands, 3) is None
        # Not only by definition: the sums are the same bits.
        assert same(reference.sum_partials(partials, islands), reference.sum_partials(partials))
    assert not same(reference.all_reduce(partials, islands=[[0], [1, 2]]).reduced, plain)


def test_negative_zeros_of_islands() -> None:
    zero = -torch.zeros(1, 8, dtype=torch.bfloat16)
    for islands in (None, [[0, 1], [2]]):
        assert same(reference.all_reduce([zero] * 3, residual=zero, islands=islands).residual, torch.zeros(1, 8, dtype=torch.bfloat16))


def test_sharded_and_reduce_scatter_of_islands_are_rows_of_all_reduce() -> None:
    partials = [wild(5, 64, seed=s, dtype=torch.float32) for s in range(4)]
    islands, norm = [[0, 1], [2, 3]], RMSNorm(wild(64, seed=9, dtype=torch.float32))
    whole = reference.all_reduce(partials, norm=norm, islands=islands)
    for outputs in (
        reference.sharded(partials, norm=norm, islands=islands),
        reference.reduce_scatter(partials, norm=norm, islands=islands),
    ):
        assert same(torch.cat([out.residual for out in outputs]), whole.residual)  # type: ignore[misc]


# ---- the split


def test_ranks_are_split_by_host_and_reach() -> None:
    assert split("aaaa") == ((0, 1, 2, 3),)
    assert split("abab") == ((0, 2), (1, 3))
    pairs = {(0, 1), (1, 0), (2, 3), (3, 2)}
    assert split("aaaa", lambda a, b: (a, b) in pairs) == ((0, 1), (2, 3))
    assert split("aaa", lambda a, b: (a, b) != (0, 1)) == ((0, 2), (1,))  # one direction is not enough
    assert split("aaaa", lambda a, b: {a, b} != {1, 2}) == ((0, 1, 3), (2,))  # nor is one rank of the island


def test_every_row_has_one_adder_in_each_island() -> None:
    for hosts in HOSTS.values():
        for island, owner in itertools.product(split(hosts), range(len(hosts))):
            assert adder(island, owner) in island
            assert owner not in island or adder(island, owner) == owner


# ---- bits, on virtual ranks


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", None])
@pytest.mark.parametrize("name", HOSTS)
def test_every_operation_on_virtual_hosts(name: str, algorithm: Any) -> None:
    hosts, chance = HOSTS[name], random.Random(name)
    islands = split(hosts)
    formats = [None, *chance.sample(every_format(), 3)]

    def rank(group: VirtualGroup) -> list[str]:
        comm = communicator(group, algorithm=algorithm, max_tokens=16)
        found = []
        for tokens, quant in zip((1, len(hosts) - 1, 5, 2 * len(hosts)), formats, strict=True):
            found += check(comm, islands, tokens, quant=quant, kind="normal", seed=tokens)
        rows = [(3 * r + 1) % 4 for r in range(len(hosts))]
        return found + check(comm, islands, sum(rows), quant=FP8Group(32), rows=rows) + check_experts(comm, islands)

    assert [text for found in run_virtual(len(hosts), rank, hosts=list(hosts)) for text in found] == []


@pytest.mark.parametrize("world", [12, 64])
def test_large_worlds(world: int) -> None:
    hosts = [str(r // 8) for r in range(world)]
    for algorithm in ("one_shot", "two_shot"):

        def rank(group: VirtualGroup, algorithm: Any = algorithm) -> list[str]:
            comm = communicator(group, algorithm=algorithm, hidden_size=8)
            assert comm.explain(3).bytes_sent > 0
            return check(comm, split(hosts), 3, width=8)

        assert [text for found in run_virtual(world, rank, hosts=hosts) for text in found] == []


def test_bits_do_not_depend_on_the_way() -> None:
    """The same islands: by one exchange, by owners, whichever ranks own which rows."""

    def rank(group: VirtualGroup) -> list[torch.Tensor | None]:
        partial = wild(6, HIDDEN_SIZE, seed=group.rank)
        one, two = (communicator(group, algorithm=way) for way in ("one_shot", "two_shot"))
        rows = [0, 6, 0, 0]
        return [
            one.all_reduce(partial).reduced,
            two.all_reduce(partial).reduced,
            two.unshard(two.reduce_scatter(partial, rows=rows).reduced, rows=rows),  # type: ignore[arg-type]
        ]

    every = [each for found in run_virtual(4, rank, hosts=list("aabb")) for each in found]
    assert all(same(each, every[0]) for each in every)


# ---- plans


def test_explain_names_transport_and_islands() -> None:
    def rank(group: VirtualGroup) -> tuple[str, str]:
        comm, plain = communicator(group), communicator(group, order="rank")
        return str(comm.explain(4)), str(plain.explain(4))

    texts = run_virtual(4, rank, hosts=list("aabb"))
    assert texts == texts[:1] * 4
    ours, plain = (" ".join(text.split()) for text in texts[0])
    assert "transport host; ranks on the CPU have no memory that others reach; 2 islands: ranks 0 1; 2 3, each added for itself" in ours
    assert "2 islands: ranks 0 1; 2 3, added in rank order" in plain


@pytest.mark.parametrize("order", ["islands", "rank"])
@pytest.mark.parametrize("wire", [None, FP8Group(64)])
def test_explain_without_a_communicator_is_that_of_one(order: Any, wire: Any) -> None:
    """The same plan, word for word, as every rank's of a communicator over two hosts."""

    def rank(group: VirtualGroup) -> list[Plan]:
        comm = communicator(group, order=order, wire=wire, max_tokens=512, hidden_size=1024)
        return [comm.explain(tokens) for tokens in (1, 512)]

    plans = run_virtual(4, rank, hosts=list("aabb"))
    given: dict[str, Any] = {
        "hidden_size": 1024,
        "max_tokens": 512,
        "world_size": 4,
        "order": order,
        "wire": describe(wire),
        "table": False,
    }
    assert plans == [[explain(Machine(hosts=2), tokens, **given).plan for tokens in (1, 512)]] * 4


def test_explain_refuses_what_a_communicator_refuses() -> None:
    given: dict[str, Any] = {"hidden_size": 1024, "world_size": 4}
    for machine, asked, told in (
        (Machine(), {"transport": "peer"}, "ranks on the CPU have no memory"),
        (Machine.named("sm_90a"), {"transport": "peer", "world_size": 16}, "the group has 16 ranks; kernels reach 8"),
        (replace(Machine.named("sm_90a"), hosts=2), {"transport": "peer"}, "rank 0 is on host 0, rank 2 on host 1"),
        (Machine.named("sm_90a"), {"world_size": 32}, "32 terms in rank order; kernels add at most 16"),
        (Machine.named("sm_90a"), {"wire": "mxfp8", "transport": "peer"}, "kernels that write to peers send terms as they are"),
        (Machine(), {"wire": "nvfp4"}, "expected an object of FP8Group, FP8PerToken, MXFP8"),
        (Machine(), {"wire": "fp8_group48"}, "hidden size 1024"),
        (Machine(), {"order": "host"}, "order is 'host'"),
        (Machine(), {"transport": "nccl"}, "transport is 'nccl'"),
        (Machine(hosts=3), {}, "4 ranks are not the same number on each of 3 hosts"),
        (Machine(hosts=0), {}, "hosts is 0"),
    ):
        with pytest.raises(ArgumentError, match=told):
            explain(machine, 4, **{**given, **asked})


def on_gpus(hosts: str, **facts: Any) -> Topology:
    way: dict[str, Any] = {"transport": "host", "islands": split(hosts), "why": "no peer access", **facts}
    return Topology(len(hosts), 4096, 7168, torch.bfloat16, "sm_90a", 132, 1, **way)


def planned(topology: Topology, tokens: int, operation: Any = "all_reduce", **more: Any) -> Plan:
    capacity = Capacity(4096, 7168, torch.bfloat16, torch.device("cpu"), topology.world_size)
    return plan_call(topology, capacity.request(tokens, True, True, None, False, None, operation, **more))


def test_plans_of_gpus_on_the_host_path() -> None:
    """Small calls by one exchange, others by owners, of two ranks always by one; nothing is predicted, and no line is too long."""
    ways = [[planned(on_gpus(hosts), tokens).algorithm for tokens in (1, 4096)] for hosts in ("aa", "aaaa", "aabb")]
    assert ways == [["host_gather"] * 2, ["host_gather", "host_owners"], ["host_gather", "host_owners"]]
    assert planned(on_gpus("aabb", overrides=Overrides("one_shot")), 4096).algorithm == "host_gather"
    assert planned(on_gpus("aabb"), 0).algorithm == planned(on_gpus("aabb"), 5, "finish").algorithm == "local"
    for operation in ("all_reduce", "sharded", "reduce_scatter", "all_gather"):
        for tokens in (1, 4096):
            plan = planned(on_gpus("aabbcc"), tokens, operation)
            lines = str(plan).splitlines()
            assert max(map(len, lines)) <= 80
            assert (plan.shape is None) == (operation == "all_gather")
            assert lines[[line.split()[0] for line in lines].index("predicted")].split() == ["predicted", "-"]
            assert "3 islands: ranks 0 1; 2 3; 4 5" in " ".join(str(plan).split())


def test_sums_of_more_terms_than_a_kernel_adds() -> None:
    check_terms(on_gpus("a" * 15 + "b"))
    for facts in (on_gpus("aaaabbbb" * 3, order="rank"), on_gpus("a" * 17 + "b")):
        with pytest.raises(UnsupportedError, match=r"a sum of this group has (24|18) terms in .*; kernels add at most 16"):
            check_terms(facts)
    check_terms(replace(on_gpus("a" * 32, order="rank"), architecture=None))
    assert planned(on_gpus("aaaabbbb" * 3), 1).algorithm == "host_owners"


@pytest.mark.parametrize("wire", [None, FP8Group(32)], ids=str)
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("hosts", ["aaa", "aab", "aaabbb", "ababa", "abc"])
def test_bytes_are_those_that_the_plan_says(hosts: str, algorithm: Any, wire: Any) -> None:
    """Every exchange sends what the plan counts, to whom it says, here and on GPUs. ``explain`` has those of the rank that sends most."""

    def rank(group: VirtualGroup) -> list[tuple[int, int]]:
        sent: list[tuple[int, ...]] = []
        swap = group.swap

        def counted(what: str, give: Any, take: Any) -> None:
            sent.append(tuple(each.nbytes if r != group.rank else 0 for r, each in enumerate(give)))
            swap(what, give, take)

        group.swap = counted  # type: ignore[method-assign]
        comm = communicator(group, algorithm=algorithm, wire=wire)
        facts, found = replace(comm.topology, architecture="sm_90a", multiprocessors=132), []
        partial = torch.ones(7, HIDDEN_SIZE, dtype=torch.bfloat16)
        norm = RMSNorm(torch.ones(HIDDEN_SIZE))
        calls: dict[Any, Any] = {
            "all_reduce": lambda: comm.all_reduce(partial, norm=norm),
            "sharded": lambda: comm.all_reduce(partial, norm=norm, sharded=True),
            "reduce_scatter": lambda: comm.reduce_scatter(partial, norm=norm),
            "all_gather": lambda: comm.unshard(comm.shard(partial), 7),
        }
        for operation, call in calls.items():
            sent.clear()
            call()
            request = comm._capacity.request(7, operation == "all_gather", norm, None, False, None, operation)
            if operation == "all_gather":
                request = comm._capacity.request(7, True, None, None, False, None, operation)
            plan = plan_call(facts, request)
            assert plan.algorithm.startswith("host")
            assert plan_call(comm.topology, request).bytes_sent == plan.bytes_sent
            assert (f"{plan.bytes_sent} bytes in place of" in plan.why) == (wire is not None and operation != "all_gather")
            assert [each.sent[group.rank] for each in exchanges(facts, request, plan.algorithm)] == sent
            found.append((plan.bytes_sent, sum(map(sum, sent))))
        return found

    for planned in zip(*run_virtual(len(hosts), rank, hosts=list(hosts)), strict=True):
        assert max(sent for _, sent in planned) == planned[0][0]


class Recording:
    """A finisher that notes what it is asked for."""

    def __init__(self, finisher: Any, seen: list[Any]) -> None:
        self._finisher, self._seen = finisher, seen

    def run(self, step: Call, out: Output) -> None:
        if step.tokens:
            self._seen.append(step.signature.request)
        self._finisher.run(step, out)


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
@pytest.mark.parametrize("wire", [None, FP8Group(64)], ids=str)
@pytest.mark.parametrize("hosts", ["aaa", "aab", "aabb", "abc"])
def test_what_is_prepared_is_what_is_run(hosts: str, wire: Any, algorithm: Any) -> None:
    """The steps that ``prepare`` builds kernels for are those of the call, whatever the epilogue."""

    def rank(group: VirtualGroup) -> None:
        comm = communicator(group, algorithm=algorithm, wire=wire)
        engine: Any = comm._engine
        seen: list[Any] = []
        engine._finisher = Recording(engine._finisher, seen)
        partial, whole = torch.ones(5, HIDDEN_SIZE, dtype=torch.bfloat16), torch.ones(5, HIDDEN_SIZE, dtype=torch.bfloat16)
        norms = (None, RMSNorm(torch.ones(HIDDEN_SIZE)), RMSNorm(torch.ones(HIDDEN_SIZE, dtype=torch.bfloat16), prefetch=False))
        form = collogue.PrologueForm("expert_combine", "float32", shared=True)
        experts = make_prologue(form, "normal", rank=group.rank, tokens=5, hidden_size=HIDDEN_SIZE, dtype=torch.bfloat16, count=2)
        for norm, quant, residual, sharded, term in itertools.product(norms, (None, FP8PerToken()), (0, 1), (0, 1, 2), (partial, experts)):
            if sharded == 1 and norm is None and quant is None:
                continue
            own = None if not residual else whole if not sharded else comm.shard(whole)
            keep = norm is not None and quant is not None
            branch = {"branch_norm": norm} if residual and norm is not None else {}
            given: dict[str, Any] = {"residual": own, "norm": norm, "quant": quant, "keep_norm": keep, **branch}
            seen.clear()
            if sharded == 2:
                comm.reduce_scatter(term, **given)
            else:
                comm.all_reduce(term, sharded=bool(sharded), **given)
            operation = ("all_reduce", "sharded", "reduce_scatter")[sharded]
            request = comm._capacity.request(
                5, bool(residual), norm, quant, keep, None, operation, term if term is experts else None, branch.get("branch_norm")
            )
            planned = [replace(step, quant=describe(step.quant)) for step in steps(comm.topology, request, group.rank)]  # type: ignore[arg-type]
            assert [replace(step, quant=describe(step.quant)) for step in seen] == planned, (norm, quant, residual, operation)

    run_virtual(len(hosts), rank, hosts=list(hosts))


# ---- real processes


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (2, 2, 2, 2), (3, 1)], ids=["2 x 2", "2 + 3", "4 x 2", "3 + 1"])
def test_processes_on_hosts(sizes: tuple[int, ...]) -> None:
    assert [text for found in run_processes(sum(sizes), on_hosts, sizes, silence=60) for text in found] == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 3])
def test_a_process_that_ends_on_either_host(victim: int) -> None:
    told = run_processes(4, dying, (2, 2), victim, mortal=[victim], silence=60)
    for rank, each in enumerate(told):
        if rank == victim:
            assert each is None
        else:
            kind, text, seconds = each
            assert kind == "CollectiveError", (rank, each)
            assert f"rank {victim}" in text
            assert seconds < 3.0


# ---- mistakes


@pytest.mark.parametrize(
    "islands", [[], [[0, 1]], [[0, 1], [1, 2]], [[1, 0], [2]], [[2], [0, 1]], [[0, 1], [2], []], [[0, 1], [2.0]], "012", [0, 1, 2]]
)
def test_what_is_no_split_of_the_ranks(islands: Any) -> None:
    partials = [torch.zeros(1, 8)] * 3
    with pytest.raises(ArgumentError, match="expected the 3 ranks, each in one island\nhint: give lists of ranks in order"):
        reference.all_reduce(partials, islands=islands)


def test_ranks_that_call_differently_and_again() -> None:
    def rank(group: VirtualGroup) -> str:
        comm = communicator(group, algorithm="two_shot")
        with pytest.raises(MismatchedCall) as raised:
            comm.all_reduce(torch.zeros(1 + group.rank % 2, HIDDEN_SIZE, dtype=torch.bfloat16))
        with pytest.raises(MismatchedCall):
            comm.all_reduce(torch.zeros(1, HIDDEN_SIZE, dtype=torch.bfloat16))
        comm.reset()
        assert check(comm, [[0, 1], [2, 3]], 4) == []
        return str(raised.value)

    for text in run_virtual(4, rank, hosts=list("aabb")):
        assert "rank 0 called with (all_reduce, tokens=1" in text


def test_the_order_is_compared() -> None:
    def rank(group: VirtualGroup) -> str:
        with pytest.raises(CollogueError) as raised:
            communicator(group, order="rank" if group.rank else "islands")
        return str(raised.value)

    for text in run_virtual(2, rank):
        assert "order=rank\nhint: make the communicator with the same arguments on every rank" in text


def test_engines_of_cpu_groups() -> None:
    assert all(run_virtual(2, lambda group: isinstance(communicator(group)._engine, HostEngine)))
