"""TensorRT-LLM: mocks out of its own classes. Written against its sources; it has not been run.

Which files of which commits were read is in ``docs/backend-trtllm.md`` and, signature by
signature, in ``tests/layers/trtllm_signatures.json``. Its internals move with every release
candidate, so every class and keyword is probed for
(:mod:`opkit.layers.backends.trtllm.probe`).
"""
