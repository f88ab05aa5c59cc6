"""A decode loop in a CUDA graph: kernels are prepared, one step is captured, and replayed for every token.

torchrun --nproc-per-node 2 examples/cuda_graph_decode.py   (without GPUs the same step runs eagerly)
"""

import torch
import torch.distributed as dist

import collogue

BATCH, HIDDEN, LAYERS, STEPS = 4, 512, 3, 5


def main() -> None:
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    torch.manual_seed(dist.get_rank())
    weights = [(torch.randn(HIDDEN, HIDDEN) / HIDDEN).to(device, torch.bfloat16) for _ in range(LAYERS)]
    norms = [collogue.RMSNorm(torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)) for _ in range(LAYERS)]
    stream = torch.ones(BATCH, HIDDEN, device=device, dtype=torch.bfloat16)  # the step's input and output

    with collogue.Communicator(dist.group.WORLD, max_tokens=BATCH, hidden_size=HIDDEN) as comm, torch.inference_mode():
        comm.prepare(BATCH, norm=norms[0])  # kernels cannot be loaded while a graph is captured

        def step() -> None:
            normed = residual = stream
            for weight, norm in zip(weights, norms, strict=True):
                out = comm.all_reduce(normed @ weight, residual=residual, norm=norm)
                normed, residual = out.norm, out.residual
            stream.copy_(normed)

        run = step
        if device == "cuda":
            for _ in range(2):  # warms cuBLAS up
                step()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
            run = graph.replay
        for _ in range(STEPS):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        comm.check()  # raises what a kernel found: a peer that did not come, for one
        print(f"rank {comm.rank}: {STEPS} steps, {float(stream.float().square().mean()):.3f} mean square")


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
