"""Finding TensorRT-LLM's classes and keywords, in every layout, and saying what is not there."""

from __future__ import annotations

import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from trtllm_fakes import install
from trtllm_paper import FILE, LAYOUTS, Fake, signatures

from opkit.errors import ToolMissing
from opkit.layers.backends.trtllm import probe
from opkit.layers.backends.trtllm.probe import Upstream, parameters
from opkit.layers.op import Case, LaunchMode, Phase
from opkit.layers.plan import Plan, PlannedCase
from opkit.layers.registry import build_mock, find_op

# Names without a signature: an enumeration, a base class, a function of the bindings' types.
UNSIGNED = {"TrtllmAttention", "QuantAlgo", "CacheType", "DataType", "torch_dtype_to_binding"}
MODELS = Path(probe.__file__).parents[2] / "models"


def test_every_signature_names_its_source() -> None:
    for layout in LAYOUTS:
        for place, names in signatures(layout)["modules"].items():
            for name, entry in names.items():
                where = f"{layout} {place}.{name}"
                assert entry["path"].startswith("tensorrt_llm/"), where
                known = re.fullmatch("[0-9a-f]{40}", entry["commit"])
                assert known or entry["content"], where


def test_every_name_that_the_backend_looks_for_has_a_signature() -> None:
    for layout in LAYOUTS:
        recorded = {name for names in signatures(layout)["modules"].values() for name in names}
        assert set(probe._PLACES) - UNSIGNED <= recorded


def test_the_docs_name_every_commit() -> None:
    page = (Path(__file__).parents[2] / "docs" / "backend-trtllm.md").read_text()
    commits = set(re.findall(r'"commit": "([0-9a-f]{40})"', FILE.read_text()))
    assert len(commits) > 10
    assert [commit for commit in commits if commit[:7] not in page] == []


@pytest.mark.parametrize(
    ("layout", "place"),
    [("old", "attention_backend.utils"), ("new", "attention.backends.utils")],
)
def test_names_are_found_in_each_layout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layout: str, place: str
) -> None:
    fake = install(monkeypatch, tmp_path, layout)
    upstream = Upstream()
    for name in probe._PLACES:
        assert upstream.get(name) is fake.named(name)
    assert upstream.version == fake.version
    assert upstream.places()["get_attention_backend"] == f"tensorrt_llm._torch.{place}"


def test_a_name_that_is_nowhere_is_told_with_the_version_and_the_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, tmp_path, "new")
    for name in [name for name in sys.modules if ".attention" in name and "tensorrt" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ToolMissing) as told:
        Upstream().get("get_attention_backend")
    assert str(told.value) == (
        f"TensorRT-LLM {fake.version}: no get_attention_backend in "
        "tensorrt_llm._torch.attention.backends.utils or "
        "tensorrt_llm._torch.attention_backend.utils"
    )
    assert "docs/backend-trtllm.md" in str(told.value.hint)


def test_a_module_that_lacks_something_else_is_no_other_layout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, tmp_path, "old")
    package = tmp_path / "site" / "attention"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import flashinfer_of_paper\n")
    fake.modules["tensorrt_llm._torch"].__path__ = [str(package.parent)]  # type: ignore[attr-defined]
    with pytest.raises(ToolMissing, match=f"{fake.version}.*needs flashinfer_of_paper"):
        Upstream().get("get_attention_backend")


@pytest.mark.parametrize("error", [OSError("libnvinfer.so.10: cannot open"), RuntimeError("CUDA")])
def test_a_package_that_cannot_load_is_as_good_as_missing(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(_: str) -> Any:
        raise error

    monkeypatch.setattr(probe, "importlib", types.SimpleNamespace(import_module=broken))
    with pytest.raises(ImportError, match=f"tensorrt_llm cannot be loaded: {error}"):
        probe.root()


@pytest.mark.parametrize("op", ["dsa", "mla", "gqa", "moe", "gemm"])
def test_without_the_package_the_registry_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    monkeypatch.delitem(sys.modules, f"opkit.layers.{op}.trtllm", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_llm", None)  # type: ignore[arg-type]
    plan = Plan(op, "trtllm", "model", (), "mock.json")
    with pytest.raises(ToolMissing, match="trtllm, which cannot be imported") as told:
        build_mock(find_op(op), "trtllm", plan)
    assert "release container" in str(told.value.hint)


class Base:
    def __init__(self, size: int, *, dtype: str = "") -> None:
        self.size, self.dtype = size, dtype


class Passing(Base):
    def __new__(cls, *args: Any, **kwargs: Any) -> Passing:  # noqa: ARG004
        return object.__new__(cls)

    def __init__(self, *, sparse: Any, **kwargs: Any) -> None:
        super().__init__(1, **kwargs)
        self.sparse = sparse


@dataclasses.dataclass
class Record:
    lengths: list[int]
    made: int = dataclasses.field(init=False, default=0)


class Hidden(Record):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Model:
    model_fields = {"max_tokens": None}  # noqa: RUF012  # as pydantic has it


def takes(size: int, *, dtype: str = "", **rest: Any) -> None:
    del size, dtype, rest


@pytest.mark.parametrize(
    ("function", "known"),
    [
        (takes, {"size", "dtype"}),
        (Base, {"size", "dtype"}),
        (Passing, {"sparse", "size", "dtype"}),
        (Record, {"lengths"}),
        (Hidden, {"lengths"}),
        (Model, {"max_tokens"}),
    ],
)
def test_parameters_are_those_that_have_a_name(function: Any, known: set[str]) -> None:
    assert parameters(function) == known


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Upstream:
    install(monkeypatch, tmp_path, "new")
    return Upstream()


def test_keywords_are_chosen_by_the_signature(upstream: Upstream) -> None:
    found = upstream.keywords(takes, must={"size": 1}, may={"dtype": 2, "unknown": 3})
    assert found == {"size": 1, "dtype": 2}
    names = {"newest": lambda: "new", "dtype": lambda: "old"}
    assert upstream.keywords(Base, one_of=names) == {"dtype": "old"}


def test_an_open_signature_gets_the_newest_name(upstream: Upstream) -> None:
    names = {"newest": lambda: "new", "older": lambda: "old"}
    assert upstream.keywords(takes, one_of=names) == {"newest": "new"}


def test_a_missing_keyword_names_the_version_and_what_there_is(upstream: Upstream) -> None:
    with pytest.raises(ToolMissing) as told:
        upstream.keywords(Base, must={"sizes": 1})
    assert str(told.value) == (
        f"TensorRT-LLM {upstream.version}: Base takes no sizes; it takes dtype, size"
    )
    with pytest.raises(ToolMissing, match="Base takes no newest or older"):
        upstream.keywords(Base, one_of={"newest": lambda: 1, "older": lambda: 2})


def test_a_compiled_function_may_tell_nothing(upstream: Upstream) -> None:
    with pytest.raises(ToolMissing, match="does not tell what it takes"):
        upstream.keywords(min, must={"iterable": ()})


CASE = Case(Phase.CONTEXT, 2, 96, 0)


def run(tmp_path: Path, op: str = "gqa", model: str = "llama", case: Case = CASE) -> None:
    """Build and run an op's mock on what is installed."""
    sys.modules.pop(f"opkit.layers.{op}.trtllm", None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text((MODELS / f"{model}.json").read_text())
    planned = PlannedCase(case, LaunchMode.EAGER)
    mock = build_mock(find_op(op), "trtllm", Plan(op, "trtllm", str(folder), (planned,), "m.json"))
    assert mock.prepare(planned)() is not None
    mock.close()


def without(place: str, name: str, parameter: str) -> Any:
    def change(modules: dict[str, Any]) -> None:
        modules[place][name]["parameters"].remove(parameter)

    return change


@pytest.mark.parametrize(
    ("place", "name", "parameter"),
    [
        # Until 1.2.0rc2 it was pytorch_backend_config.
        ("_torch.pyexecutor.model_loader", "ModelLoader", "llm_args"),
        ("_torch.attention.backends.interface", "AttentionMetadata", "enable_flash_mla="),
        ("_torch.pyexecutor.resource_manager", "KVCacheManager", "tokens_per_block"),
        ("_torch.metadata", "KVCacheParams", "num_cached_tokens_per_seq"),
        ("llmapi.llm_args", "TorchLlmArgs", "load_format="),
    ],
)
def test_a_parameter_that_is_gone_is_told_with_the_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, name: str, parameter: str
) -> None:
    changed = without(f"tensorrt_llm.{place}", name, parameter)
    fake = install(monkeypatch, tmp_path, "new", change=changed)
    asked = parameter.removesuffix("=")
    with pytest.raises(ToolMissing, match=f"{re.escape(fake.version)}: {name} takes no {asked}"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("place", "name", "parameter"),
    [
        ("_torch.attention.backends.interface", "AttentionMetadata", "num_heads_per_kv="),
        ("_torch.autotuner", "autotune", "cache_path="),
        ("_torch.pyexecutor.resource_manager", "KVCacheManager", "max_num_tokens="),
    ],
)
def test_what_may_be_missing_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, name: str, parameter: str
) -> None:
    changed = without(f"tensorrt_llm.{place}", name, parameter)
    fake = install(monkeypatch, tmp_path, "new", change=changed)
    run(tmp_path)
    assert fake.made(name)


def test_the_second_cache_manager_is_told_to_hold_the_past_and_to_fill_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, tmp_path, "new")
    run(tmp_path, case=Case(Phase.GENERATION, 2, 1, 64))
    last = fake.made("KVCacheManager.add_dummy_requests")[-1]
    assert (last["is_gen"], last["materialize_history"]) == (True, True)
    assert fake.made("KvCacheConfig")[-1]["max_util_for_resume"] == 1.0


def test_a_layout_in_between_is_put_together_name_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(modules: dict[str, Any]) -> None:
        for place in [place for place in modules if ".attention.backends." in place]:
            moved = place.replace(".attention.backends.", ".attention_backend.")
            modules[moved] = modules.pop(place)

    fake = install(monkeypatch, tmp_path, "new", change=change)
    run(tmp_path, "dsa", "deepseek-v32")
    assert "sparse_params" in fake.made("get_attention_backend")[-1]


def test_a_model_without_the_modules_of_an_op_is_told_with_the_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, tmp_path, "new")
    import trtllm_fakes

    plain = trtllm_fakes._layer

    def without_core(installed: Fake, config: dict[str, Any]) -> Any:
        layer = plain(installed, config)
        layer.self_attn.forward_impl = None
        return layer

    monkeypatch.setattr(trtllm_fakes, "_layer", without_core)
    with pytest.raises(ToolMissing, match=f"{fake.version}: SelfAttention .* has no forward_impl"):
        run(tmp_path)


def test_the_fakes_refuse_what_upstream_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = install(monkeypatch, tmp_path, "new")
    with pytest.raises(TypeError, match="sparse_attn_config"):
        fake.named("get_attention_backend")("TRTLLM", sparse_attn_config=1)
    with pytest.raises(TypeError, match="missing a required argument: 'llm_args'"):
        fake.named("ModelLoader")(mapping=1)
    needed = dict.fromkeys(
        ("num_layers", "num_kv_heads", "head_dim", "tokens_per_block", "max_seq_len", "mapping"), 1
    )
    with pytest.raises(TypeError, match="would swallow max_batch"):
        fake.named("KVCacheManager")(1, 2, max_batch_size=1, max_batch=1, **needed)
    with pytest.raises(TypeError, match="no_such_field"):
        fake.named("AttentionMetadata")(max_num_requests=1, max_num_tokens=1, no_such_field=1)
