"""What opkit uses of vLLM is there in vLLM 0.24.0, as recorded from its sources."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import record_vllm
from test_sglang_signatures import keywords

RECORDED: dict[str, Any] = json.loads(
    (Path(__file__).parent / "vllm-0.24.0.json").read_text("utf-8")
)
LAYERS = record_vllm.LAYERS
FILES = record_vllm.FILES
MEMBERS: dict[str, list[str]] = RECORDED["members"]
METHODS: dict[str, list[str]] = RECORDED["methods"]


def source(path: str) -> str:
    return (LAYERS / path).read_text()


def call(text: str, name: str) -> ast.Call:
    """The one call of a function or method of that name."""
    (found,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and name == getattr(node.func, "attr", getattr(node.func, "id", ""))
    )
    return found


def given(text: str, name: str) -> set[str]:
    """The keywords of that call."""
    return {keyword.arg for keyword in call(text, name).keywords if keyword.arg is not None}


def test_every_import_is_recorded() -> None:
    used = {module: sorted(names) for module, names in record_vllm.used().items()}
    assert used == {module: sorted(names) for module, names in RECORDED["names"].items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(LAYERS).as_posix())
def test_calls_use_parameters_that_exist(file: Path) -> None:
    text = file.read_text()
    names = {
        name: RECORDED["names"][module][name]
        for module, imported in record_vllm.imports(text).items()
        for name in imported
    }
    unknown = [found for found in keywords(text, names) if found[1] not in names[found[0]]]
    assert unknown == []


def test_calls_with_keywords_are_seen_at_all() -> None:
    wanted: dict[str, list[str]] = {
        "NewRequestData": [], "DeepseekV2MLAAttention": [], "ReplicatedLinear": [],
        "initialize_model": [], "set_forward_context": [],
    }  # fmt: skip
    seen = [found for file in FILES for found in keywords(file.read_text(), wanted)]
    assert {name for name, _ in seen} == set(wanted)
    assert ("NewRequestData", "num_computed_tokens") in seen
    assert ("DeepseekV2MLAAttention", "topk_indices_buffer") in seen


def test_a_request_says_all_that_the_scheduler_says() -> None:
    # Those left out have defaults.
    fields = RECORDED["names"]["vllm.v1.core.sched.output"]["NewRequestData"]
    asked = given(source("backends/vllm/worker.py"), "NewRequestData")
    assert asked == set(fields[: len(asked)])


@pytest.mark.parametrize("place", record_vllm.MEMBERS, ids=":".join)
def test_every_member_is_recorded(place: tuple[str, str]) -> None:
    path, owner = place
    assert MEMBERS[f"{path}:{owner}"] == sorted(record_vllm.MEMBERS[place])


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("backends/vllm/worker.py", "v1/core/sched/output.py:SchedulerOutput"),
        ("backends/vllm/config.py", "engine/arg_utils.py:EngineArgs"),
    ],
)
def test_what_is_replaced_in_the_engines_objects_exists(file: str, place: str) -> None:
    replaced = {
        keyword.arg
        for node in ast.walk(ast.parse(source(file)))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "replace"
        for keyword in node.keywords
        if keyword.arg is not None
    }
    assert replaced
    assert replaced <= set(MEMBERS[place])


def test_limits_that_are_raised_are_the_engines() -> None:
    limits = {"max_model_len", "max_num_seqs", "max_num_batched_tokens"}
    text = source("backends/vllm/config.py")
    assert all(f'"{name}"' in text for name in limits)
    assert limits <= set(MEMBERS["engine/arg_utils.py:EngineArgs"])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("_dummy_run", "GPUModelRunner._dummy_run"),
        ("create_engine_config", "EngineArgs.create_engine_config"),
        ("WorkerWrapperBase", "WorkerWrapperBase.__init__"),
        ("CUDAGraphWrapper", "CUDAGraphWrapper.__init__"),
    ],
)
def test_methods_take_what_they_are_called_with(name: str, method: str) -> None:
    texts = [file.read_text() for file in FILES if f"{name}(" in file.read_text()]
    (text,) = texts
    assert given(text, name) <= set(METHODS[method])


def test_a_worker_is_built_with_the_executors_arguments() -> None:
    (built,) = (
        node
        for node in ast.walk(ast.parse(source("backends/vllm/worker.py")))
        if isinstance(node, ast.FunctionDef) and node.name == "_worker_arguments"
    )
    (made,) = (node for node in ast.walk(built) if isinstance(node, ast.Dict))
    names = {key.value for key in made.keys if isinstance(key, ast.Constant)}
    # The lock is taken by the wrapper itself.
    assert names - {"shared_worker_lock"} == set(METHODS["Worker.__init__"])


def test_the_ops_modules_take_the_arguments_that_mocks_name() -> None:
    dsa, moe = source("dsa/vllm.py"), source("moe/vllm.py")
    for name in METHODS["DeepseekV2MLAAttention.forward"]:
        assert f"{{_PATH}}/{name}" in dsa
    assert '"hidden_states": hidden, "router_logits": logits' in moe
    assert METHODS["MoERunner.forward"][:2] == ["hidden_states", "router_logits"]
    assert METHODS["Attention.forward"][:3] == ["query", "key", "value"]


def test_the_indexers_operands_stand_where_they_are_sampled() -> None:
    positions = {"q": 1, "k": 2, "weights": 3}
    assert str(positions).replace("'", '"') in source("dsa/vllm.py")
    names = METHODS["SparseAttnIndexer.forward_native"]
    assert names[0] == "hidden_states"
    for name, position in positions.items():
        assert names[position].startswith(name)


def test_no_method_of_the_extension_hides_one_of_the_worker() -> None:
    # vLLM refuses an extension that does.
    text = source("backends/vllm/capture.py")
    (extension,) = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name == "CaptureExtension"
    )
    methods = [node.name for node in extension.body if isinstance(node, ast.FunctionDef)]
    assert methods == ["opkit_capture_start", "opkit_capture_stop"]
    assigned = [node for node in extension.body if isinstance(node, ast.Assign)]
    assert assigned == []


def test_a_recording_finds_what_it_reads(tmp_path: Path) -> None:
    package = tmp_path / "vllm" / "sub"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from .a import *\nfrom .b import *\nfrom .c import X as Y"
    )
    (package / "a.py").write_text("one = 1\n")
    (package / "b.py").write_text("from ..other import f\n")
    (package / "c.py").write_text("class X:\n    def __init__(self, x, *, y): self.z = x\n")
    (package.parent / "other.py").write_text("def f(a, *, b): ...\nasync def g(): ...\n")
    file, node = record_vllm.definition(tmp_path, "vllm.sub", "f")
    assert (file.name, record_vllm.parameters(node)) == ("other.py", ["a", "b"])
    file, node = record_vllm.definition(tmp_path, "vllm.sub", "Y")
    assert (file.name, record_vllm.parameters(node)) == ("c.py", ["x", "y"])
    assert record_vllm.definition(tmp_path, "vllm", "other")[1] is None
    assert record_vllm.members(package.parent / "other.py", "") == {"f", "g"}
    with pytest.raises(LookupError, match=r"vllm\.sub has no Z"):
        record_vllm.definition(tmp_path, "vllm.sub", "Z")
