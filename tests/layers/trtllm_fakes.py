"""A TensorRT-LLM and a torch of paper, made from ``trtllm_signatures.json``.

Every function and class takes exactly the parameters that the sources have, and writes down each
call; a call with any other parameter fails, also where upstream's ``**kwargs`` would swallow it.
What they do is the least that the next step needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parent / "trtllm_signatures.json"
LAYOUTS = ("old", "new")
_MODELS = "tensorrt_llm._torch.models.fake"  # where the layers of the fakes say they are from
_ATTENTION = ("attention_backend.utils", "attention.backends.utils")


def signatures(layout: str) -> dict[str, Any]:
    """The recorded signatures of one layout."""
    version: dict[str, Any] = json.loads(FILE.read_text())["versions"][layout]
    return version


def signature(parameters: list[str], *, bound: bool = False) -> inspect.Signature:
    """A signature from names as the file writes them; with ``self`` first where not bound."""
    kinds = inspect.Parameter
    kind, found = kinds.POSITIONAL_OR_KEYWORD, []
    for text in parameters if bound else ["self", *parameters]:
        if text == "*":
            kind = kinds.KEYWORD_ONLY
        elif text.startswith("**"):
            found.append(kinds(text[2:], kinds.VAR_KEYWORD))
        else:
            # Upstream's dataclasses mix fields with and without defaults: by keyword only.
            name, has_default = text.removesuffix("="), text.endswith("=")
            late = bool(found) and found[-1].default is not kinds.empty and not has_default
            kind = kinds.KEYWORD_ONLY if late else kind
            found.append(kinds(name, kind, default=None if has_default else kinds.empty))
    return inspect.Signature(found)


class Tensor:
    """A tensor that knows its shape and element type, and what was done to it.

    As torch has it, one that was made in inference mode may not be written to outside.
    """

    modes = 0  # how many inference modes are open

    def __init__(self, shape: tuple[int, ...], dtype: str = "torch.bfloat16", data: Any = None):
        self.shape, self.dtype, self.data = tuple(shape), dtype, data
        self.device, self.done = "cuda", []
        self.inference = bool(Tensor.modes)

    ndim = property(lambda self: len(self.shape))

    def is_floating_point(self) -> bool:
        return "float" in str(self.dtype)

    def to(self, *args: Any, **_: Any) -> Tensor:
        dtype = next((item for item in args if str(item).startswith("torch.")), self.dtype)
        return Tensor(self.shape, dtype)

    def tolist(self) -> Any:
        return self.data

    def copy_(self, other: Tensor) -> Tensor:
        return self._written("copy_", other)

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, slice):
            length = len(range(*key.indices(self.shape[0])))
            part = Tensor((length, *self.shape[1:]), self.dtype)
        else:
            part = Tensor(self.shape[1:], self.dtype, data=key)
        part.done, part.inference = self.done, self.inference
        return part

    def zero_(self) -> Tensor:
        return self._written("zero_", None)

    def _written(self, how: str, other: Any) -> Tensor:
        if self.inference and not Tensor.modes:
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode")
        self.done.append((how, other))
        return self

    def same(self, *_: Any, **__: Any) -> Tensor:
        return self

    float = abs = max = reshape = flatten = mul_ = detach = clone = expand_as = same
    __truediv__ = same


class Module:
    """What fake layers share with ``torch.nn.Module``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def modules(self) -> Iterator[Any]:
        yield self

    def parameters(self) -> Iterator[Tensor]:
        yield Tensor((8, 16, 16))

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield "w3_w1_weight", Tensor((8, 16, 16))


class Fake:
    """One installed fake: what was called, and what it shall do."""

    def __init__(self, layout: str, sm: tuple[int, int]) -> None:
        self.layout, self.sm, self.spec = layout, sm, signatures(layout)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.modules: dict[str, types.ModuleType] = {}
        self.version = self.spec["fake_version"]
        self.cache_algorithm: str | None = None
        self.attention: Callable[[], Any] = lambda: self.named("TrtllmAttention")()
        self.rooms = True  # whether the cache manager has room
        self.extra: Any = None

    def named(self, name: str) -> Any:
        """The fake class or function of that name."""
        for module in self.modules.values():
            if hasattr(module, name):
                return getattr(module, name)
        raise KeyError(name)

    def made(self, name: str) -> list[dict[str, Any]]:
        """The arguments of every call of a name."""
        return [arguments for called, arguments in self.calls if called == name]

    def entry(self, name: str) -> dict[str, Any]:
        """What the file says of a name."""
        for names in self.spec["modules"].values():
            if name in names:
                found: dict[str, Any] = names[name]
                return found
        raise KeyError(name)

    def strict(
        self, name: str, parameters: list[str], body: Callable[..., Any], *, bound: bool = False
    ) -> Callable[..., Any]:
        """A function that takes these parameters and no others, writes down and does ``body``."""
        known = signature(parameters, bound=bound)

        def call(*args: Any, **kwargs: Any) -> Any:
            found = known.bind(*args, **kwargs).arguments
            swallowed = next(
                (p.name for p in known.parameters.values() if p.kind == p.VAR_KEYWORD), ""
            )
            if found.get(swallowed):
                raise TypeError(f"{name}() would swallow {', '.join(found[swallowed])}")
            self.calls.append((name, {key: value for key, value in found.items() if key != "self"}))
            return body(**found)

        call.__signature__ = known  # type: ignore[attr-defined]
        call.__name__ = call.__qualname__ = name
        return call


def torch_of(fake: Fake) -> types.ModuleType:
    """A torch that has what the backend uses."""
    torch = types.ModuleType("torch")
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda: fake.sm,
        get_device_name=lambda *_: "Paper GPU",
        synchronize=lambda: None,
        empty_cache=lambda: fake.calls.append(("empty_cache", {})),
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: fake.calls.append(("replay", {}))),
        graph=lambda _: contextlib.nullcontext(),
    )

    def tensor(data: Any, dtype: str, device: str = "cpu") -> Tensor:
        rows = (1, len(data[0])) if data and isinstance(data[0], list) else (len(data),)
        made = Tensor(rows, dtype, data)
        made.device = device
        return made

    @contextlib.contextmanager
    def inference_mode() -> Iterator[None]:
        Tensor.modes += 1
        try:
            yield
        finally:
            Tensor.modes -= 1

    def drawn(*shape: Any, dtype: str = "torch.float32", **_: Any) -> Tensor:
        return Tensor(shape[0] if isinstance(shape[0], tuple) else shape, dtype)

    contents = {
        "Tensor": Tensor,
        "cuda": cuda,
        "version": types.SimpleNamespace(cuda="13.0"),
        "__version__": "2.13.0",
        "int": "torch.int32",
        "int32": "torch.int32",
        "bfloat16": "torch.bfloat16",
        "float8_e4m3fn": "torch.float8_e4m3fn",
        "tensor": tensor,
        "randn": drawn,
        "Generator": lambda *_: types.SimpleNamespace(manual_seed=lambda seed: seed),
        "inference_mode": inference_mode,
        "cat": lambda parts: Tensor((sum(item.shape[0] for item in parts), *parts[0].shape[1:])),
        "save": lambda stored, path: Path(path).write_text(
            json.dumps({name: value.shape for name, value in stored.items()})
        ),
    }
    for name, value in contents.items():
        setattr(torch, name, value)
    return torch


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
