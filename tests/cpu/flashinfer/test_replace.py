"""``collogue.flashinfer.install()``: code that imports ``flashinfer.comm`` gets Collogue's functions, with FlashInfer installed or not."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_flashinfer import forgotten, write_flashinfer

import collogue.flashinfer
from collogue.testing import VirtualGroup, run_virtual


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with forgotten("flashinfer"):
        yield


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer is not found, also where it is installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None if name == "flashinfer" else found(name, package))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A FlashInfer on the path, whose functions say that they are FlashInfer's. Its ``comm``."""
    write_flashinfer(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert collogue.flashinfer.flashinfer_present()
    return importlib.import_module("flashinfer.comm")


def use(group: VirtualGroup) -> None:
    """What an engine does, by the name it knows."""
    import flashinfer.comm as comm

    workspace = comm.create_allreduce_fusion_workspace(
        backend="auto", world_size=group.size, rank=group.rank, max_token_num=4, hidden_dim=64, dtype=torch.bfloat16, group=group
    )
    x = torch.full((4, 64), 1.0 + group.rank, dtype=torch.bfloat16)
    out = comm.allreduce_fusion(input=x, workspace=workspace, pattern=comm.AllReduceFusionPattern.kAllReduce)
    assert (out == 3).all()
    workspace.destroy()


@pytest.mark.usefixtures("nothing")
def test_without_flashinfer_a_stand_in_takes_its_place() -> None:
    assert not collogue.flashinfer.flashinfer_present()
    with collogue.flashinfer.install():
        assert not collogue.flashinfer.flashinfer_present()
        run_virtual(2, use)
        comm = importlib.import_module("flashinfer.comm")
        for name in collogue.flashinfer.SERVED:
            assert getattr(comm, name) is getattr(collogue.flashinfer, name)
        assert importlib.import_module("flashinfer.comm.mnnvl").TorchDistBackend is collogue.flashinfer.TorchDistBackend
        assert not hasattr(sys.modules["flashinfer"], "BatchDecodeWithPagedKVCacheWrapper")
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flashinfer.decode")
    assert not {"flashinfer", "flashinfer.comm", "flashinfer.comm.mnnvl"} & set(sys.modules)


def test_with_flashinfer_its_names_are_replaced_and_put_back(package: Any) -> None:
    before = dict(vars(package))
    with collogue.flashinfer.install():
        run_virtual(2, use)
        assert package.allreduce_fusion is not before["allreduce_fusion"]
        assert package.vllm_all_reduce is before["vllm_all_reduce"]
        ours = inspect.signature(collogue.flashinfer.create_allreduce_fusion_workspace)
        assert inspect.signature(package.create_allreduce_fusion_workspace) == ours
    assert dict(vars(package)) == before


def test_what_is_flashinfers_own_still_goes_to_flashinfer(package: Any) -> None:
    """Its workspaces made before, and the backend that Collogue does not serve."""
    theirs = package.create_allreduce_fusion_workspace("trtllm")
    handles, pointers = package.trtllm_create_ipc_workspace_for_all_reduce_fusion(0, 1, 8, 64)
    with collogue.flashinfer.install():
        assert package.allreduce_fusion(torch.ones(1, 8), theirs, 0) == "flashinfer"
        assert package.create_allreduce_fusion_workspace("mnnvl-cutedsl", 2, top_k=8).backend == "mnnvl-cutedsl"
        assert package.trtllm_allreduce_fusion(*[None] * 5, pointers, *[None] * 15) == "flashinfer"
        assert package.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(handles) == "flashinfer"
        assert package.is_mnnvl_cutedsl_supported(2, 7168, torch.bfloat16, max_token_num=8) is False


def test_what_collogue_refuses_does_not_go_to_flashinfer(package: Any) -> None:
    def rank(group: VirtualGroup) -> None:
        workspace = package.create_allreduce_fusion_workspace(
            world_size=1, rank=0, max_token_num=4, hidden_dim=64, dtype=torch.bfloat16, group=group
        )
        rows = torch.ones(1, 64, dtype=torch.bfloat16)
        index = torch.zeros(1, 1, dtype=torch.int32)
        more = {"residual_in": rows, "rms_gamma": rows[0], "expanded_idx_to_permuted_idx": index, "quant_out": rows}
        with pytest.raises(NotImplementedError, match="pattern 7"):
            package.allreduce_fusion(rows, workspace, 7, **more)

    with collogue.flashinfer.install():
        run_virtual(1, rank)


def test_sglangs_own_argument_is_accepted(package: Any) -> None:
    """FlashInfer has no ``use_fp32_lamport`` here; SGLang passes it for float32."""

    def rank(group: VirtualGroup) -> None:
        workspace = package.create_allreduce_fusion_workspace(
            world_size=1, rank=0, max_token_num=4, hidden_dim=64, dtype=torch.float32, group=group, use_fp32_lamport=True
        )
        assert workspace.metadata["use_fp32_lamport"] is True

    with collogue.flashinfer.install():
        run_virtual(1, rank)


def test_installing_twice_changes_nothing(package: Any) -> None:
    before = package.allreduce_fusion
    first = collogue.flashinfer.install()
    replaced = package.allreduce_fusion
    with collogue.flashinfer.install():
        assert package.allreduce_fusion is replaced
    assert package.allreduce_fusion is replaced
    first.uninstall()
    first.uninstall()
    assert package.allreduce_fusion is before
    with collogue.flashinfer.install():
        assert package.allreduce_fusion is not before
    assert package.allreduce_fusion is before


def test_a_name_that_this_flashinfer_lacks_goes_away_again(package: Any) -> None:
    del package.is_mnnvl_cutedsl_supported
    with collogue.flashinfer.install():
        assert package.is_mnnvl_cutedsl_supported(2, 64, torch.bfloat16, max_token_num=1) is False
    assert not hasattr(package, "is_mnnvl_cutedsl_supported")


def test_constants_that_only_flashinfer_has_stay(package: Any) -> None:
    """A newer FlashInfer's patterns are not served, but code that names them must go on."""
    package.AllReduceFusionPattern.kOfTomorrow = 99
    with collogue.flashinfer.install():
        assert package.AllReduceFusionPattern.kOfTomorrow == 99
        assert package.AllReduceFusionPattern.kARResidualRMSNormOutMXFP8Quant == 14
        assert not hasattr(collogue.flashinfer.AllReduceFusionPattern, "kOfTomorrow")


@pytest.mark.usefixtures("nothing")
def test_an_exception_in_the_block_uninstalls() -> None:
    with pytest.raises(KeyError), collogue.flashinfer.install():
        raise KeyError
    assert "flashinfer" not in sys.modules
