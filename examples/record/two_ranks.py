"""A program of two ranks whose traces hold what a tensor-parallel engine's hold, and little else.

Each rank, under an nsys of its own:

    for r in 0 1; do RANK=$r WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 nsys profile \
        -t cuda,nvtx --cuda-graph-trace=node --sample=none --cpuctxsw=none -o rank$r \
        python3 two_ranks.py & done; wait

Steps labelled as vLLM labels them, modules as layerwise NVTX markers do, eager and replayed from a
graph that is captured inside module ranges, an all-reduce after each layer.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

torch: Any = import_module("torch")
dist: Any = import_module("torch.distributed")

WIDTH, LAYERS, REPLAYS = 4096, 4, 6


def forward(x: Any, weights: list[Any]) -> Any:
    """One pass: a matrix product, an activation and an all-reduce a layer."""
    nvtx = torch.cuda.nvtx
    for layer, weight in enumerate(weights):
        shape = f"'Inputs': [[{x.shape[0]}, {WIDTH}]]"
        nvtx.range_push(f"{{'Module': 'model.layers.{layer}.mlp', {shape}}}")
        x = torch.nn.functional.silu(x @ weight)
        nvtx.range_pop()
        nvtx.range_push(f"{{'Module': 'model.layers.{layer}.all_reduce', {shape}}}")
        dist.all_reduce(x)
        nvtx.range_pop()
    return x


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [torch.randn(WIDTH, WIDTH, **kind) for _ in range(LAYERS)]
    for tokens in (512, 512, 1024, 512):
        x = torch.randn(tokens, WIDTH, **kind)
        torch.cuda.nvtx.range_push(f"execute_context_1({tokens})_generation_0(0)")
        forward(x, weights)
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
    x = torch.randn(4, WIDTH, **kind)
    with torch.cuda.stream(torch.cuda.Stream()):
        forward(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward(x, weights)
    for _ in range(REPLAYS):
        torch.cuda.nvtx.range_push("execute_context_0(0)_generation_4(4)")
        graph.replay()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
    dist.barrier()
    torch.cuda.synchronize()
    del graph
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
