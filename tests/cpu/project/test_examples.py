"""Every example runs, all of them on one set of processes."""

from __future__ import annotations

import importlib.util
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from collogue.testing.processes import run_processes

pytestmark = pytest.mark.slow

EXAMPLES = sorted((Path(__file__).resolve().parents[3] / "examples").glob("*.py"))
#: What rank 0 prints, in part.
PRINTED = {
    "cuda_graph_decode": "5 steps, 1.0",
    "fp8_generate": "activations quantized to fp8_per_token",
    "hugging_face": "rank 0: [1, 2, 3, ",
    "sharded_residual": "kept 5 of 10 rows",
    "tensor_parallel_mlp": "codes torch.float8_e4m3fn, scales [8, 1]",
}


def example_rank(group: dist.ProcessGroup, tell: Any, files: list[Path]) -> dict[str, str]:
    """What each example prints on this rank."""
    printed = {}
    for file in files:
        tell(file.stem)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with redirect_stdout(io.StringIO()) as text:
            module.main(*([_tiny_model()] if file.stem in ("hugging_face", "fp8_generate") else []))
        printed[file.stem] = text.getvalue()
    return printed


def _tiny_model() -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_example_destroys_its_group(file: Path) -> None:
    """Left to the interpreter's end, a gloo group often ends its process with SIGABRT."""
    assert file.read_text().endswith("    main()\n    dist.destroy_process_group()\n")


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    return dict(run_processes(2, example_rank, EXAMPLES)[0])


@pytest.mark.parametrize("example", [file.stem for file in EXAMPLES])
def test_example(example: str, printed: dict[str, str]) -> None:
    assert PRINTED[example] in printed[example]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_says_how_to_run_it(file: Path) -> None:
    assert f"examples/{file.name}" in file.read_text().split('"""')[1]
