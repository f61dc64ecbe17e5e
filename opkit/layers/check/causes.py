"""For each rule: why a mock usually fails it, and what to do. Texts only."""

from __future__ import annotations

# rule → (likely cause, fix)
ADVICE: dict[str, tuple[str, str]] = {
    "forward": (
        "the module is built or called in another way than the engine builds and calls it",
        "read the log of the check for the traceback; compare with the engine's decoder layer",
    ),
    "input format": (
        "the inputs are not made as the engine makes them",
        "take them from the engine's embedding and norm (--inputs tokens), in the model's type, a "
        "row a token",
    ),
    "output shape": (
        "the probe expects another output, or the module was given other sizes than the model's",
        "check heads and hidden size against config.json; a mock returns the module's own output",
    ),
    "output dtype": (
        "the module was built in another default type, or a cast is missing or too many",
        "build it under the model's dtype, as the engine does",
    ),
    "finite output": (
        "weights were never drawn, caches hold garbage, or a kernel skipped rows",
        "draw the weights, fill the caches of the tokens before (prefill them), give every token "
        "its slot",
    ),
    "KV cache present": (
        "the mock was built without the engine's KV cache manager",
        "allocate the engine's cache and give its blocks to the metadata; say them in probe()",
    ),
    "KV cache written": (
        "the new tokens' slots are missing from the metadata, or lie elsewhere",
        "check the slot mapping: every new token has a slot in the block that probe() names",
    ),
    "KV cache read": (
        "the lengths in the metadata leave the cached tokens out, or the block table names other "
        "blocks",
        "check sequence lengths and block table: past and new tokens both count",
    ),
    "batch 1, length 1": (
        "the smallest step takes a path of its own that the mock does not provide for",
        "run it alone and compare its metadata with the engine's for one token",
    ),
    "large batch": (
        "requests are mixed up, or buffers are too small for the batch",
        "check that a request's rows, blocks and lengths stand at the same place everywhere",
    ),
    "CUDA graph": (
        "the forward allocates, copies to the host or waits while it is captured",
        "keep host work in prepare(); capture with buffers that stay where they are",
    ),
    "graph = eager": (
        "the graph was captured over other buffers than those that the step fills",
        "let the graph read the very tensors that prepare() fills, metadata included",
    ),
    "repeatable": (
        "a forward changes what the next one reads, or adds up into a buffer that is not cleared",
        "give each forward the same state: lengths, caches, workspaces",
    ),
    "input untouched": (
        "the module works in place on its input (fused norms and rotary embeddings do)",
        "copy the input into the module's buffer in every forward, outside what is measured",
    ),
    "context = generation": (
        "positions, cached tokens or lengths of the generation step are off by one, or the two "
        "phases use other weights or scales",
        "compare positions and lengths: the new token is at position `past`; with near-equal "
        "router or indexer scores give real weights (`opkit model make`)",
    ),
    "operands": (
        "zero or constant weights or inputs reach a large kernel: it then runs 10 to 15 % too fast",
        "draw weights and inputs (--inputs tokens, normal or captured), never zeros or equal rows",
    ),
    "collected cases": (
        "the op's own cases (routed tokens, single products) are not driven as they are collected",
        "run the case alone and read the traceback in the log of the check",
    ),
}
