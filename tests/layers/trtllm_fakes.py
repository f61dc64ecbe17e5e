"""A TensorRT-LLM of paper (``trtllm_paper``): its modules, classes and what they do.

That is the least that the next step needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trtllm_paper import Fake, Module, Tensor, torch_of

_MODELS = "tensorrt_llm._torch.models.fake"  # where the layers of the fakes say they are from
_ATTENTION = ("attention_backend.utils", "attention.backends.utils")


def install(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    layout: str,
    sm: tuple[int, int] = (9, 0),
    change: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Fake:
    """Put a fake TensorRT-LLM of a layout, and a fake torch, in the place of the real ones.

    ``change`` may alter the recorded modules before anything is made of them.
    """
    fake = Fake(layout, sm)
    change(fake.spec["modules"])
    source = tmp_path / "tensorrt_llm_source.py"
    source.write_text("# stands for every file of the fake\n")

    def module(name: str) -> types.ModuleType:
        if name not in fake.modules:
            made = types.ModuleType(name)
            made.__file__ = str(source)
            made.__path__ = []  # type: ignore[attr-defined]
            fake.modules[name] = made
            if "." in name:
                module(name.rpartition(".")[0])
        return fake.modules[name]

    module("tensorrt_llm").__version__ = fake.version  # type: ignore[attr-defined]
    _fill(fake, module)
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, made in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setitem(sys.modules, "torch", torch_of(fake))
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = lambda: None  # type: ignore[attr-defined]
    nvml.nvmlSystemGetDriverVersion = lambda: "580.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return fake


def _fill(fake: Fake, module: Callable[[str], types.ModuleType]) -> None:
    """Make every recorded class and function, and the few that have no signature."""
    bodies = _bodies(fake)
    entries = [
        (place, name, entry)
        for place, names in fake.spec["modules"].items()
        for name, entry in names.items()
    ]
    for place, name, entry in sorted(entries, key=lambda item: "base" in item[2]):
        kind, parameters = entry["kind"], entry["parameters"]
        if kind == "function":
            made = fake.strict(name, parameters, bodies[name], bound=True)
        elif kind in ("fields", "dataclass"):
            made = _record(fake, name, entry, place)
        elif kind == "class":
            made = _class(fake, name, entry, place, bodies)
        else:  # what the engine calls itself
            continue
        setattr(module(place), name, made)
    utils = next(place for place in fake.modules if place.endswith(_ATTENTION))
    attention = module(f"{utils.removesuffix('.utils')}.trtllm")
    attention.TrtllmAttention = _plain("TrtllmAttention", attention.__name__)  # type: ignore[attr-defined]
    attention.TrtllmAttention.Metadata = fake.named("AttentionMetadata")
    attention.DSATrtllmAttention = type("DSATrtllmAttention", (attention.TrtllmAttention,), {})  # type: ignore[attr-defined]
    hidden = fake.named("AttentionMetadata")

    def swallow(self: Any, *args: Any, **kwargs: Any) -> None:
        hidden.__init__(self, *args, **kwargs)

    # Upstream's __init__ takes *args, **kwargs: only the fields tell what it knows.
    attention.DSATrtllmAttention.Metadata = type(
        "DSAtrtllmAttentionMetadata", (hidden,), {"__init__": swallow}
    )
    quantisation = module("tensorrt_llm.quantization.mode")
    quantisation.QuantAlgo = types.SimpleNamespace(FP8="FP8")  # type: ignore[attr-defined]
    bindings = module("tensorrt_llm.bindings")
    bindings.DataType = types.SimpleNamespace(FP8="DataType.FP8", BF16="DataType.BF16")  # type: ignore[attr-defined]
    kinds = types.SimpleNamespace(SELF="SELF", SELFKONLY="SELFKONLY")
    module("tensorrt_llm.bindings.internal.batch_manager").CacheType = kinds  # type: ignore[attr-defined]
    module(_MODELS)
    module("tensorrt_llm._utils").torch_dtype_to_binding = lambda _: "DataType.BF16"  # type: ignore[attr-defined]


def _plain(name: str, place: str) -> Any:
    return type(name, (), {"__module__": place})


def _record(fake: Fake, name: str, entry: dict[str, Any], place: str) -> Any:
    """A dataclass, or what reads like a pydantic model, that keeps what it is given."""
    known = fake.strict(name, entry["parameters"], lambda **_: None)

    def init(self: Any, **kwargs: Any) -> None:
        for text in entry["parameters"]:
            setattr(self, text.removesuffix("="), _DEFAULTS.get(text))
        known(self, **kwargs)
        for key, value in kwargs.items():
            setattr(self, key, value)

    contents: dict[str, Any] = {"__module__": place}
    if entry["kind"] == "fields":
        contents |= {
            "__init__": init,
            "model_fields": {t.removesuffix("="): 0 for t in entry["parameters"]},
        }
        return type(name, (), contents)
    fields = [
        (text.removesuffix("="), Any, dataclasses.field(default=None))
        if text.endswith("=")
        else (text, Any)
        for text in entry["parameters"]
    ]
    made = dataclasses.make_dataclass(name, fields, kw_only=True)
    made.__module__, made.__init__ = place, init  # type: ignore[misc]
    for method, parameters in entry.get("methods", {}).items():
        body = _copied if method == "create_cuda_graph_metadata" else (lambda **_: None)
        setattr(made, method, fake.strict(f"{name}.{method}", parameters, body))
    return made


_DEFAULTS = {"enable_autotuner=": True, "attn_backend=": "TRTLLM"}  # all others are None


def _copied(self: Any, **_: Any) -> Any:
    made = type(self).__new__(type(self))
    made.__dict__.update(self.__dict__, is_cuda_graph=True)
    return made


def _class(
    fake: Fake, name: str, entry: dict[str, Any], place: str, bodies: dict[str, Callable[..., Any]]
) -> Any:
    base: Any = Module if name == "Linear" else object
    if "base" in entry:
        base = fake.named(entry["base"].rpartition(".")[2])
    contents: dict[str, Any] = {
        "__module__": place,
        "__init__": fake.strict(name, entry["parameters"], bodies[name]),
    }
    for method, parameters in entry.get("methods", {}).items():
        owner = name if f"{name}.{method}" in bodies else base.__name__
        contents[method] = fake.strict(f"{name}.{method}", parameters, bodies[f"{owner}.{method}"])
    for method, parameters in entry.get("static", {}).items():
        made = fake.strict(f"{name}.{method}", parameters, bodies[f"{name}.{method}"], bound=True)
        contents[method] = staticmethod(made)
    if name == "Mapping":  # upstream's chooses a class in __new__, with a catch-all signature
        contents["__new__"] = lambda cls, *args, **kwargs: object.__new__(cls)  # noqa: ARG005
    if name == "Linear":
        contents["forward"] = fake.strict(
            "Linear.forward", fake.entry("Linear.forward")["parameters"], _linear
        )
        contents["to"] = lambda self, *_: self
    return type(name, (base,), contents)


def _linear(self: Any, input: Any, **_: Any) -> Tensor:
    return Tensor((input.shape[0], self.out_features))


def _bodies(fake: Fake) -> dict[str, Callable[..., Any]]:
    """What the recorded functions and methods do."""

    def keep(self: Any, **given: Any) -> None:
        self.__dict__.update(given)

    def linear(self: Any, **given: Any) -> None:
        keep(self, **given)
        self.weight = Tensor((self.out_features, self.in_features))

    def backend(backend_name: str, **sparse: Any) -> Any:  # noqa: ARG001
        wanted = "DSATrtllmAttention" if any(sparse.values()) else "TrtllmAttention"
        return fake.named(wanted)

    def manager(model_config: Any, **_: Any) -> Any:
        sparse = model_config.sparse_attention_config is not None
        return fake.named("DSACacheManager" if sparse else "KVCacheManager")

    @contextlib.contextmanager
    def attributes(attrs: dict[str, Any]) -> Iterator[None]:
        fake.extra, before = attrs, fake.extra
        try:
            yield
        finally:
            fake.extra = before

    def requests(self: Any, request_ids: list[int], token_nums: list[int], **_: Any) -> Any:
        if not fake.rooms:
            return None
        size, start, self.rows = self.tokens_per_block, 0, {}
        for number, tokens in zip(request_ids, token_nums, strict=True):
            count = -(-tokens // size)
            self.rows[number], start = list(range(start, start + count)), start + count
        assert start * size <= self.kv_cache_config.max_tokens, "more blocks than were asked for"
        return [types.SimpleNamespace(py_request_id=number) for number in request_ids]

    def buffers(self: Any, **_: Any) -> Tensor:
        blocks = self.kv_cache_config.max_tokens // self.tokens_per_block
        return Tensor((blocks, 1, self.tokens_per_block, self.num_kv_heads, self.head_dim))

    def indexer(self: Any, **_: Any) -> Tensor:
        blocks = self.kv_cache_config.max_tokens // self.tokens_per_block
        return Tensor((blocks, self.tokens_per_block, 1, 132), "torch.uint8")

    return {
        "Mapping": keep,
        "DSACacheManager": keep,
        "KVCacheManager": keep,
        "ModelLoader": keep,
        "Linear": linear,
        "Linear.load_weights": lambda **_: None,
        "Linear.post_load_weights": lambda **_: None,
        "model_extra_attrs": attributes,
        "get_model_extra_attrs": lambda: fake.extra,
        "autotune": lambda **_: contextlib.nullcontext(),
        "get_attention_backend": backend,
        "get_kv_cache_manager_cls": manager,
        "_construct_checkpoint_loader": lambda **_: "checkpoint loader",
        "ModelLoader.load": lambda self, checkpoint_dir, **_: (
            Model(fake, Path(checkpoint_dir), self.llm_args), None,
        ),
        "ModelLoader.load_config_and_apply_defaults": lambda llm_args, **_: llm_args,
        "KVCacheManager.add_dummy_requests": requests,
        "KVCacheManager.get_batch_cache_indices": lambda self, request_ids, **_: [
            [*self.rows[number], -1] for number in request_ids
        ],
        "KVCacheManager.get_buffers": buffers,
        "KVCacheManager.free_resources": lambda **_: None,
        "KVCacheManager.shutdown": lambda **_: None,
        "DSACacheManager.get_indexer_k_cache_buffers": indexer,
    }  # fmt: skip


class Model(Module):
    """A model of one layer, made from a folder's config.json as TensorRT-LLM's loader makes one."""

    def __init__(self, fake: Fake, folder: Path, args: Any) -> None:
        self.read = config = json.loads((folder / "config.json").read_text())
        pretrained = types.SimpleNamespace(**config)
        sparse = None
        if "index_topk" in config:
            sparse = _sparse(fake)
        self.model_config = types.SimpleNamespace(
            pretrained_config=pretrained,
            extra_attrs={},
            attn_backend=args.attn_backend,
            sparse_attention_config=sparse,
            quant_config=types.SimpleNamespace(kv_cache_quant_algo=fake.cache_algorithm),
            torch_dtype="torch.bfloat16",
            enable_flash_mla="kv_lora_rank" in config and fake.sm == (9, 0),
        )
        layer = _layer(fake, config)
        entry = fake.entry("DecoderModel.forward")
        body = fake.strict("DecoderModel.forward", entry["parameters"], _run)
        self.model = type("DecoderModel", (Module,), {"forward": body, "layers": [layer]})()


def _run(self: Any, **given: Any) -> Tensor:
    """A step: the layer is called with what the model is given."""
    states: Tensor = self.layers[0](
        given["position_ids"], given["input_ids"], given["attn_metadata"]
    )
    return states


def _sparse(fake: Fake) -> Any:
    methods = {}
    if fake.layout == "new":
        entry = fake.entry("DeepSeekSparseAttentionConfig")
        for name, parameters in entry["methods"].items():
            methods[name] = fake.strict(name, parameters, lambda **_: "lowered")
    return type("DeepSeekSparseAttentionConfig", (), methods)()


def _layer(fake: Fake, config: dict[str, Any]) -> Any:
    """A decoder layer whose modules call each other as upstream's do."""
    place = _MODELS
    linear = fake.named("Linear")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", 0)
    hidden, size = config["hidden_size"], config.get("head_dim", 128)

    def attention(self: Any, hidden_states: Any, attn_metadata: Any, **_: Any) -> Any:
        qkv = self.qkv_proj(hidden_states)
        out = self.forward_impl(
            qkv, None, None, attn_metadata, "causal", None, None, mrope_config=None
        )
        return self.o_proj(out, all_reduce_params=None)

    def core(q: Any, attn_metadata: Any, **_: Any) -> Tensor:
        assert fake.extra["attention_metadata"]() is attn_metadata
        return Tensor((q.shape[0], heads * size))

    def latent(hidden_states: Any, attn_metadata: Any, **_: Any) -> Tensor:
        assert fake.extra["attention_metadata"]() is attn_metadata
        return Tensor(hidden_states.shape)

    contents: dict[str, Any] = {"__module__": place}
    if "kv_lora_rank" in config:
        entry = fake.entry("MLA.forward")
        contents["forward"] = fake.strict("MLA.forward", entry["parameters"], latent)
    else:
        for name, body in (("forward", attention), ("forward_impl", core)):
            entry = fake.entry(f"Attention.{name}")
            contents[name] = fake.strict(f"Attention.{name}", entry["parameters"], body)
    self_attn = type("SelfAttention", (Module,), contents)()
    self_attn.o_proj = linear(heads * size, hidden)
    if "kv_lora_rank" in config:
        self_attn.mqa, self_attn.mha = fake.attention(), None
        if "index_topk" in config:
            self_attn.mqa.indexer = "the indexer"
    else:
        self_attn.qkv_proj = linear(hidden, (heads + 2 * kv_heads) * size)
        self_attn.attn = fake.attention()
    layer = type("PaperDecoderLayer", (Module,), {"__module__": place, "forward": _forward})()
    layer.fake, layer.hidden, layer.self_attn = fake, hidden, self_attn
    experts = (
        config.get("first_k_dense_replace") == 0
        or "num_experts" in config
        or "num_local_experts" in config
    )
    block = type("Block", (Module,), {"__module__": place})()
    if experts:
        entry = fake.entry("MoE.forward")
        run = fake.strict("MoE.forward", entry["parameters"], lambda x, **_: Tensor(x.shape))
        block.experts = type("CutlassFusedMoE", (Module,), {"__module__": place, "forward": run})()
        block.gate = linear(hidden, 8)
    else:
        width = config["intermediate_size"]
        block.gate_up_proj, block.down_proj = linear(hidden, 2 * width), linear(width, hidden)
    mixtral = config["architectures"][0] == "MixtralForCausalLM"
    setattr(layer, "block_sparse_moe" if mixtral else "mlp", block)
    layer.block = block
    return layer


def _forward(self: Any, position_ids: Any, input_ids: Any, attn_metadata: Any) -> Any:
    states = Tensor((input_ids.shape[0], self.hidden))
    states = self.self_attn(
        position_ids=position_ids, hidden_states=states, attn_metadata=attn_metadata,
        all_reduce_params=None,
    )  # fmt: skip
    if hasattr(self.block, "experts"):
        logits = self.block.gate(states)
        return self.block.experts(states, logits, do_finalize=True, all_rank_num_tokens=None)
    return self.block.down_proj(self.block.gate_up_proj(states))
