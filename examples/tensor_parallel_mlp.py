"""One tensor-parallel MLP: column-parallel, row-parallel, and everything that follows in the row-parallel layer's all-reduce.

torchrun --nproc-per-node 2 examples/tensor_parallel_mlp.py
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import collogue
from collogue.nn import ColumnParallelLinear, RowParallelLinear

TOKENS, HIDDEN, INTERMEDIATE = 8, 512, 1536


def main() -> None:
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    torch.manual_seed(0)  # the same weights everywhere; each rank keeps its part
    up, down = torch.nn.Linear(HIDDEN, INTERMEDIATE), torch.nn.Linear(INTERMEDIATE, HIDDEN)
    stream = torch.randn(TOKENS, HIDDEN).to(device, torch.bfloat16)
    norm = collogue.RMSNorm(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16), eps=1e-6)
    with collogue.Communicator(dist.group.WORLD, max_tokens=TOKENS, hidden_size=HIDDEN) as comm, torch.inference_mode():
        first = ColumnParallelLinear.of(up, comm).to(device, torch.bfloat16)
        second = RowParallelLinear.of(down, comm).to(device, torch.bfloat16)
        out = second(F.silu(first(stream)), residual=stream, norm=norm, quant=collogue.FP8PerToken())
        print(f"rank {comm.rank}: residual {list(out.residual.shape)}, codes {out.codes.dtype}, scales {list(out.scales.shape)}")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
