"""Every Python block of the documents runs on two ranks. README has a test of its own; files that a page shows are examples."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow

DOCS = Path(__file__).resolve().parents[3] / "docs"
BLOCKS = {
    f"{page.relative_to(DOCS).as_posix()} {number}": block
    for page in sorted(DOCS.rglob("*.md"))
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1)
}
HIDDEN = 64


def _llama() -> Any:
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _summing_model(x: torch.Tensor) -> torch.Tensor:
    y = torch.clone(x)
    dist.all_reduce(y)
    return torch.nn.functional.rms_norm(x + y, (HIDDEN,), torch.ones(HIDDEN, dtype=x.dtype), 1e-6)


def names_of_the_reader(group: dist.ProcessGroup, page: str, clean: ExitStack) -> dict[str, Any]:
    """What the blocks of ``page`` take as given."""
    import collogue

    rows = torch.randn(8, HIDDEN).bfloat16()
    names = {
        "torch": torch,
        "collogue": collogue,
        "group": group,
        "rank": group.rank(),
        "partial": rows,
        "residual": torch.zeros_like(rows),
        "norm": torch.empty_like(rows),
        "weight": torch.ones(HIDDEN).bfloat16(),
        "global_scale": 100.0,
        "x": rows,
        "my_model": _summing_model,
        "mlp": SimpleNamespace(**{name: torch.nn.Linear(HIDDEN, HIDDEN).bfloat16() for name in ("up_proj", "down_proj")}),
        "graph": SimpleNamespace(replay=lambda: None),
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda name, dtype: _llama()),
        "other": _llama(),
    }
    if page.startswith(("pytorch.md 1", "guides/hangs.md", "reference/errors.md", "reference/models.md")):
        names["comm"] = clean.enter_context(collogue.Communicator(group, max_tokens=4096, hidden_size=HIDDEN))
    if page == "pytorch.md 1":
        names |= {"model": _summing_model, "tokens": rows}
    elif not page.startswith("quickstart"):
        names |= {"model": _llama(), "tokens": torch.tensor([[1, 2, 3]])}
    return names


def fitted(block: str) -> str:
    """``block`` for two ranks of a CPU and a small hidden size, in a group that is there already and stays."""
    for said, meant in (("world_size=8", "world_size=2"), ("7168", str(HIDDEN)), ("4096", "64"), ("dist.destroy_process_group()", "")):
        block = block.replace(said, meant)
    return block


def blocks_rank(group: dist.ProcessGroup, tell: Callable[[str], None], blocks: dict[str, str]) -> dict[str, str]:
    """What each block prints on this rank, or how it fails."""
    import collogue.flashinfer

    dist.init_process_group = lambda *args, **named: None
    printed = {}
    with torch.inference_mode():
        for page, block in blocks.items():
            tell(page)
            with ExitStack() as clean, redirect_stdout(io.StringIO()) as text:
                try:
                    exec(compile(fitted(block), page, "exec"), names_of_the_reader(group, page, clean))
                except Exception as error:
                    text.write(f"FAILED {type(error).__name__}: {error}")
            printed[page] = text.getvalue()
            if "install()" in block:
                collogue.flashinfer.install().uninstall()
    return printed


@pytest.mark.timeout(300)
def test_every_block_runs() -> None:
    """One test, so that one pair of processes runs them all; a block that cannot run is among them, and is seen."""
    printed = run_processes(2, blocks_rank, {**BLOCKS, "broken 1": "comm.all_reduce()"})
    for rank in printed:
        assert rank.pop("broken 1").startswith("FAILED NameError")
        assert {page: text for page, text in rank.items() if "FAILED" in text} == {}
        assert rank["quickstart.md 1"] == "torch.Size([8, 1024])\ntorch.float8_e4m3fn torch.Size([8, 1])\n"


def test_files_that_pages_show_are_examples() -> None:
    shown = {name for page in DOCS.rglob("*.md") for name in re.findall(r"<!-- file: (\S+\.py) -->", page.read_text(encoding="utf-8"))}
    assert len(shown) == 4
    assert all(name.startswith("examples/") and (DOCS.parent / name).exists() for name in shown)
