"""A mock and an engine of four layers with the same kernels, as small exports.

The engine is recorded as vLLM is: prompts launched eagerly with module ranges, decode replayed from
CUDA graphs that were captured before the window opened, every step labelled, two waves of requests.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_export import Export, module
from made_export import TID
from real_names import NAMES

from opkit.layers.op import Case, LaunchMode, MockRange, Phase

LAYERS = 4
NORM, FIRST_NORM = "fused_add_rms_norm_kernel", "rms_norm_kernel"
MLP = (("nvjet_sm90_tst_256x160_64x4", 60.0), ("act_and_mul_kernel", 9.0), (NORM, 8.0))
# One layer's self attention: short name, µs at 1,024 tokens or one request.
Kernels = tuple[tuple[str, float], ...]
CONTEXT: Kernels = (
    ("nvjet_sm90_tst_64x128_64x8_TNN", 31.9),
    (FIRST_NORM, 2.4),
    ("[memset]", 0.7),
    ("nvjet_sm90_tst_256x128_64x4_TNT", 54.6),
    ("BatchQKApplyRotaryPosIdsCosSinCacheHeadParallelismKernel", 6.1),
    ("splitKreduce_kernel", 2.1),
    ("vectorized_layer_norm_kernel", 3.4),
    ("CatArrayBatchedCopy", 15.3),
    ("per_token_group_quant_8bit_kernel", 10.4),
    ("vectorized_elementwise_kernel(MulFunctor)", 4.8),
    ("indexer_k_quant_and_cache_kernel", 2.4),
    ("sm90_fp8_mqa_logits", 6.9),
    ("topKPerRowPrefill", 3.2),
    ("concat_and_cache_mla_kernel", 3.1),
    ("sparse_attn_fwd_kernel", 124.0),
    ("nvjet_sm90_tst_128x256_64x4_TNN", 39.1),
)
GENERATION: Kernels = (
    ("fused_a_gemm_kernel", 7.2),
    (FIRST_NORM, 2.2),
    ("nvjet_sm90_tst_128x8_64x12_2x1_v_bz_splitK_TNT", 12.0),
    ("splitKreduce_kernel", 1.9),
    ("BatchQKApplyRotaryPosIdsCosSinCacheHeadParallelismKernel", 2.3),
    ("vectorized_elementwise_kernel(MulFunctor)", 1.2),
    ("indexer_k_quant_and_cache_kernel", 1.7),
    ("sm90_fp8_paged_mqa_logits", 6.3),
    ("cooperative_topk_cs8", 9.8),
    ("concat_and_cache_mla_kernel", 1.9),
    ("sparse_attn_fwd_kernel", 31.0),
    ("[memcpy DtoD]", 1.1),
    ("nvjet_sm90_tst_192x8_64x8_TNT", 28.0),
)
WAVES = ((1, 1024, 6), (4, 512, 6))  # requests, prompt, output
CASES = (
    Case(Phase.CONTEXT, 1, 1024, 0),
    Case(Phase.CONTEXT, 4, 512, 0),
    Case(Phase.GENERATION, 1, 1, 1026),
    Case(Phase.GENERATION, 4, 1, 514),
)
OPERAND = {"name": "o_proj.weight", "shape": [7168, 16384], "dtype": "bfloat16",
           "distinct": 0.9, "zeros": 0.0, "equal_rows": 0.0}  # fmt: skip


@dataclass
class Timeline:
    """Launches on one thread: the CPU goes ahead, the GPU runs one kernel after another."""

    export: Export = field(default_factory=Export)
    cpu: int = 1_000_000
    gpu: int = 1_000_000
    seed: int = 7
    graphs: dict[Case, list[tuple[str, float, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise = random.Random(self.seed)

    def _run(self, short: str, us: float, correlation: int, size: int, **more: Any) -> None:
        ns = round(us * 1000 * self.noise.uniform(0.99, 1.01))
        self.gpu = max(self.gpu, self.cpu + 4_000)
        name = NAMES.get(short, short)
        self.export.kernel(name, self.gpu, correlation, ns=ns, grid=(size, 1, 1), **more)
        self.gpu += ns + 300

    def eager(self, kernels: Sequence[tuple[str, float]], size: int = 1, scale: float = 1) -> None:
        """Launch kernels one call each."""
        for short, us in kernels:
            correlation = self.export.correlation()
            self.export.call(self.cpu, correlation)
            self._run(short, us * scale, correlation, size)
            self.cpu += 5_000

    def capture(self, case: Case, layers: Sequence[Kernels], modules: Sequence[str]) -> None:
        """Create a graph's nodes, each part in its module's range, and instantiate the graph."""
        number = 2 * len(self.graphs) + 1
        nodes: list[tuple[str, float, int]] = []
        for part, path in zip(layers, modules, strict=True):
            begin = self.cpu
            for short, us in part:
                node = number << 32 | len(nodes)
                clone = (number + 1) << 32 | len(nodes)
                self.cpu += 100
                self.export.node(node, self.cpu)
                self.export.node(clone, self.cpu + 10_000_000, origin=node)
                self.export.node(clone, self.cpu + 10_000_000)
                nodes.append((short, us, clone))
            self.cpu += 50
            if path:
                self.export.range(module(path), begin + 50, self.cpu)
                self.export.range(module(path, outputs=True), self.cpu - 10, self.cpu)
        self.cpu += 20_000_000
        self.graphs[case] = nodes

    def replay(self, case: Case, batch: int) -> None:
        """One launch of a graph."""
        correlation = self.export.correlation()
        self.export.call(self.cpu, correlation, api="cudaGraphLaunch")
        for short, us, node in self.graphs[case]:
            self._run(short, us, correlation, batch, node=node)
        self.cpu = max(self.cpu + 10_000, self.gpu)

    def range(self, text: str, begin: int) -> None:
        self.export.range(text, begin, self.cpu)
        self.cpu += 2_000


def decode(batch: int) -> Case:
    return Case(Phase.GENERATION, batch, 1, 0)


def scale_of(tokens: int) -> float:
    return tokens / 1024


def engine(*, from_start: bool = False, attention: tuple[Kernels, Kernels] | None = None) -> Export:
    """The engine's recording; ``from_start``: ranges at the capture of graphs are in it."""
    prefill, step = attention or (CONTEXT, GENERATION)
    line = Timeline()
    for batch, *_ in WAVES:
        parts: list[Kernels] = []
        paths: list[str] = []
        for layer in range(LAYERS):
            parts += [((NORM if layer else FIRST_NORM, 2.0),), step, ((NORM, 2.0), *MLP[:2])]
            paths += ["", f"model.layers.{layer}.self_attn" if from_start else "", ""]
        line.capture(decode(batch), [*parts, ((NORM, 2.0),)], [*paths, ""])
    # A small request primes the window, as the runner of the engine does.
    for requests, prompt, output in ((1, 16, 2), *WAVES):
        _prompt_step(line, requests, prompt, prefill)
        for _ in range(output - 1):
            begin = line.cpu
            line.eager((("[memcpy DtoD]", 0.9),))
            line.replay(decode(requests), requests)
            line.eager((("nvjet_sm90_tst_384x8_64x4_TNT", 650.0),))
            line.range(f"execute_context_0(0)_generation_{requests}({requests})", begin)
            line.eager((("reduce_kernel(ArgMaxOps)", 28.0),))
    waves = [dict(zip(("requests", "prompt", "output"), wave, strict=True)) for wave in WAVES]
    line.export.manifest(manifest("e2e", waves=waves))
    return line.export


def _prompt_step(line: Timeline, requests: int, prompt: int, prefill: Kernels) -> None:
    tokens = requests * prompt
    begin = line.cpu
    line.eager((("indexSelectSmallIndex", 2.0), (FIRST_NORM, 5.0)), tokens)
    for layer in range(LAYERS):
        start = line.cpu
        line.eager(prefill, tokens, scale_of(tokens))
        line.range(module(f"model.layers.{layer}.self_attn"), start)
        line.eager(((NORM, 8.0), *MLP), tokens, scale_of(tokens))
    line.eager((("nvjet_sm90_tst_384x8_64x4_TNT", 650.0),), requests)
    line.range(f"execute_context_{requests}({tokens})_generation_0(0)", begin)
    line.eager((("reduce_kernel(ArgMaxOps)", 28.0),))


def mock(
    *,
    iterations: int = 10,
    context: Kernels = CONTEXT,
    generation: Kernels = GENERATION,
    cases: Sequence[Case] = CASES,
    eager: bool = False,
    operand: dict[str, Any] | None = None,
    scale: float = 1.0,
    variants: Sequence[str] = ("mock",),
) -> Export:
    """The mock's recording: every case in ranges, decode from a graph unless ``eager``."""
    line = Timeline(seed=11)
    scaled = tuple((short, us * scale) for short, us in generation)
    for case in cases:
        if case.phase is Phase.GENERATION:
            line.capture(case, [scaled], [""])
    for case in cases:
        graph = case.phase is Phase.GENERATION and not eager
        mode = LaunchMode.GRAPH if graph else LaunchMode.EAGER
        tokens = case.batch * case.tokens
        for variant in variants:
            for iteration in range(iterations):
                begin = line.cpu
                if graph:
                    line.replay(case, case.batch)
                elif case.phase is Phase.GENERATION:
                    line.eager(scaled, tokens)
                else:
                    line.eager(context, tokens, scale_of(tokens) * scale)
                line.range(MockRange("dsa", case, mode, iteration, variant).text(), begin)
    line.export.manifest(manifest("mock", op="dsa", operands=[operand or OPERAND]))
    return line.export


def session(made: Export, number: int) -> Export:
    """The export as one of a session of its own: equal kernels in another session are another
    rank's."""
    made.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=1_790_000_000_000_000_000 + number)
    return made


def manifest(side: str, **more: Any) -> str:
    said = {"schema": "opkit.manifest/1", "side": side, "backend": "vllm", **more}
    return json.dumps(said)


def write_pair(folder: Path, **engine_options: Any) -> tuple[Path, Path]:
    """Paths of the mock's and the engine's export."""
    return (
        mock().write(folder / "mock.sqlite"),
        engine(**engine_options).write(folder / "e2e.sqlite"),
    )


__all__ = ["CASES", "TID", "engine", "mock", "write_pair"]
