"""The README: every Python block runs on two ranks, and the first screen says what a newcomer asks."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import collogue
from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow

README = Path(__file__).resolve().parents[3] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
#: What a block is about: a name in it.
ABOUT = ("init_process_group", "parallelize", "collogue.compile", "collogue.nn", "comm.all_reduce")
HIDDEN = 4096


def names_of_the_reader() -> dict[str, Any]:
    """What the blocks take as given: the reader's own modules."""
    torch.manual_seed(0)

    def my_model(x: torch.Tensor) -> torch.Tensor:
        y = torch.clone(x)
        dist.all_reduce(y)
        return torch.nn.functional.rms_norm(x + y, (HIDDEN,), torch.ones(HIDDEN, dtype=x.dtype), 1e-6)

    mlp = SimpleNamespace(up_proj=torch.nn.Linear(HIDDEN, 64).bfloat16(), down_proj=torch.nn.Linear(64, HIDDEN).bfloat16())
    hidden_states = torch.randn(8, HIDDEN).bfloat16()
    next_norm = torch.nn.RMSNorm(HIDDEN).bfloat16()
    return {"my_model": my_model, "mlp": mlp, "hidden_states": hidden_states, "residual": hidden_states, "next_norm": next_norm}


def tiny_model(*args: Any, **named: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=named["dtype"]).eval()


def readme_rank(group: dist.ProcessGroup, tell: Any, blocks: list[str]) -> list[str]:
    """What each block prints on this rank, run one after the other."""
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained = tiny_model
    dist.init_process_group = lambda *args, **named: None  # there is one
    names, printed = names_of_the_reader(), []
    for block in blocks:
        tell(block.splitlines()[0])
        with redirect_stdout(io.StringIO()) as text:
            exec(compile(block, "README.md", "exec"), names)
        printed.append(text.getvalue())
    layer, out, y = names["gemm"], names["out"], names["gemm"](names["out"])
    decoded = collogue.dequantize(out.codes, out.scales, collogue.FP8PerToken(), hidden_size=HIDDEN)
    expected = torch.nn.functional.linear(decoded, layer.quantized_weight.decode(), layer.bias.float())
    assert torch.equal(y, expected.bfloat16())
    return printed


@pytest.fixture(scope="module")
def printed() -> list[list[str]]:
    return list(run_processes(2, readme_rank, BLOCKS))


def test_there_is_a_block_for_each_way_in() -> None:
    assert len(BLOCKS) == len(ABOUT)
    assert all(name in block for name, block in zip(ABOUT, BLOCKS, strict=True))
    assert all(3 <= len([line for line in block.splitlines() if line]) <= 8 for block in BLOCKS)
    assert "vllm serve" in TEXT


@pytest.mark.timeout(300)
def test_every_block_runs(printed: list[list[str]]) -> None:
    for rank in printed:
        _, generated, report, _, engine = rank
        assert "tensor([[ 1,  2,  3, " in generated
        assert "fused" in report
        assert engine == "torch.Size([8, 4096]) torch.Size([8, 4096]) torch.Size([8, 1])\ntorch.Size([8, 1024])\n"
    assert printed[0][1] == printed[1][1]


def test_the_first_screen() -> None:
    """In 40 lines: what, for whom, how much faster, how to install, how to start; in 180 everything."""
    lines = TEXT.splitlines()
    first = "\n".join(lines[:40])
    for said in (
        "Python library",
        "It is for people who",
        "x as fast",
        "pip install '.[cli,hf]'",
        "collogue doctor",
        *ABOUT[1:3],
        "nn",
        "vLLM",
    ):
        assert said in first, said
    assert len(lines) <= 180
    assert not re.search(r"(quanti|normali|synchroni)s", TEXT), "American spelling"
