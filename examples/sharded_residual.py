"""Sequence parallelism in one call: each rank keeps the residual of its own rows, and gets every row's norm as FP8 codes.

torchrun --nproc-per-node 2 examples/sharded_residual.py
"""

import torch
import torch.distributed as dist

import collogue

TOKENS, HIDDEN, LAYERS = 10, 512, 3


def main() -> None:
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    quant = collogue.FP8PerToken()
    norm = collogue.RMSNorm(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16))
    with collogue.Communicator(dist.group.WORLD, max_tokens=TOKENS, hidden_size=HIDDEN) as comm, torch.inference_mode():
        stream = torch.ones(TOKENS, HIDDEN, device=device, dtype=torch.bfloat16)
        shard = comm.shard(stream).clone()  # [R, H]: the rows that this rank owns
        for layer in range(LAYERS):
            partial = torch.full_like(stream, 0.125 * (comm.rank + layer))
            whole = comm.all_reduce(partial, residual=stream, norm=norm, quant=quant)
            mine = comm.all_reduce(partial, residual=shard, norm=norm, quant=quant, sharded=True)
            assert torch.equal(mine.codes.view(torch.uint8), whole.codes.view(torch.uint8))  # the same bits on every rank
            stream, shard = whole.residual, mine.residual
        assert torch.equal(comm.unshard(shard, TOKENS), stream)
        print(f"rank {comm.rank}: kept {shard.shape[0]} of {TOKENS} rows of the residual, has the codes of all")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
