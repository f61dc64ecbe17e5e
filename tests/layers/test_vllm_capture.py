"""The worker extension of vLLM that stores inputs: steps in, files out. Needs torch alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opkit.layers.captured import Captured, read_info
from opkit.layers.op import Case, Phase
from opkit.layers.prompts import prompt_tokens

torch = pytest.importorskip("torch", reason="torch is not installed: make test-torch")
import fake_vllm  # noqa: E402  # needs torch

SEED, LAYER = 7, 1
HIDDEN = "self_attn/hidden_states"
# Of one step: request, the tokens computed before, the tokens of the step.
Part = tuple[str, int, int]


class Server:
    """As much of a worker and its runner as the extension looks at."""

    def __init__(self, extension: Any, folder: Path, rank: int = 0) -> None:
        torch.manual_seed(3)
        config = fake_vllm.config(layers=fake_vllm.LAYERS)
        self.runner = SimpleNamespace(
            model=fake_vllm.Engine(vllm_config=config),
            model_config=SimpleNamespace(get_vocab_size=lambda: fake_vllm.VOCAB),
            requests={},
        )
        self.folder = folder
        self.tokens: dict[str, list[int]] = {}
        self.worker = type("Worker", (extension,), {"model_runner": self.runner, "rank": rank})()

    def start(self, **changes: Any) -> Any:
        spec = {
            "op": "dsa", "backend": "vllm", "layer": LAYER, "seed": SEED, "model_sha256": "ab",
            "command": "vllm serve m", "created": "2026-11-21T20:00:00+00:00",
            "region": r"layers\.(?P<layer>\d+)\.self_attn$", "folder": str(self.folder),
        }  # fmt: skip
        return self.worker.opkit_capture_start(json.dumps(spec | changes))

    def request(self, name: str, tokens: list[int], decoded: int = 0) -> None:
        """A request whose prompt is followed by ``decoded`` tokens of its own."""
        self.runner.requests[name] = SimpleNamespace(prompt_token_ids=list(tokens))
        self.tokens[name] = [*tokens, *range(decoded)]

    def wave(self, name: str, number: int, prompt: int, decoded: int = 0) -> None:
        """A request of the recorded waves."""
        self.request(name, prompt_tokens(SEED, number, prompt, fake_vllm.VOCAB), decoded)

    def step(self, *parts: Part, padding: int = 0) -> None:
        """One forward step over parts of requests."""
        ids: list[int] = []
        bounds = [0]
        for name, computed, count in parts:
            ids += self.tokens[name][computed : computed + count]
            bounds.append(len(ids))
        self.runner.input_batch = SimpleNamespace(
            num_reqs=len(parts),
            req_ids=[name for name, *_ in parts] + ["left over"],
            num_computed_tokens_cpu=[computed for _, computed, _ in parts] + [99],
        )
        self.runner.query_start_loc = SimpleNamespace(np=[*bounds, 99])
        ids += [0] * padding
        self.runner.model(torch.tensor(ids), torch.ones(len(ids)))

    def expected(self, name: str) -> Any:
        """What the layer's attention is given for all tokens of a request."""
        hidden = self.runner.model.model.embed_tokens(torch.tensor(self.tokens[name]))
        for layer in self.runner.model.model.layers[:LAYER]:
            hidden = layer(torch.ones(len(hidden)), hidden)
        fused = self.runner.model.model.layers[LAYER].before(hidden)
        return fused[:, fake_vllm.WIDTH : 2 * fake_vllm.WIDTH]

    def stop(self) -> Any:
        return self.worker.opkit_capture_stop()

    def stored(self, key: str) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.folder / f"sequence-{key}.pt", weights_only=True)
        return found


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake_vllm.install(monkeypatch)
    return importlib.import_module("opkit.layers.backends.vllm.capture").CaptureExtension


@pytest.fixture
def server(extension: Any, tmp_path: Path) -> Server:
    return Server(extension, tmp_path / "deep" / "captured")


def close(found: Any, wanted: Any) -> bool:
    return bool(found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-6))


def test_prompts_and_decode_steps_are_stored_in_the_order_of_their_tokens(server: Server) -> None:
    assert server.start() == {"modules": ["self_attn"]}
    server.wave("a", 0, 12, decoded=2)
    server.wave("b", 1, 12, decoded=2)
    server.step(("a", 0, 12), ("b", 0, 12))
    server.step(("b", 12, 1), ("a", 12, 1))
    server.step(("a", 13, 1), ("b", 13, 1))
    assert server.stop() == {"12-0": 14, "12-1": 14}
    assert set(server.stored("12-0")) == {HIDDEN}  # positions are no floating-point rows
    assert close(server.stored("12-0")[HIDDEN], server.expected("a"))
    assert close(server.stored("12-1")[HIDDEN], server.expected("b"))


def test_the_folder_tells_what_it_holds_and_is_read_back(server: Server) -> None:
    server.start()
    server.wave("a", 0, 12, decoded=1)
    server.step(("a", 0, 12))
    server.step(("a", 12, 1))
    server.stop()
    info = read_info(server.folder)
    assert (info.op, info.backend, info.layer, info.seed) == ("dsa", "vllm", LAYER, SEED)
    assert (info.command, info.model_sha256) == ("vllm serve m", "ab")
    assert info.versions["vllm"] == "0.24.0"
    assert "opkit" in info.versions
    captured = Captured(server.folder, "dsa", "vllm")
    captured.select(Case(Phase.GENERATION, 1, 1, 12))
    assert close(captured.rows(HIDDEN, [(0, 12, 1)]), server.expected("a")[12:])


def test_a_prompt_in_chunks_beside_others_comes_out_whole(server: Server) -> None:
    server.start()
    server.wave("a", 0, 20)
    server.wave("b", 3, 9, decoded=1)
    server.request("stranger", [1] * 10)
    server.step(("stranger", 0, 10), ("a", 0, 8))
    server.step(("b", 0, 9), ("a", 8, 8))
    server.step(("a", 16, 4), ("b", 9, 1), padding=3)
    assert server.stop() == {"20-0": 20, "9-3": 10}
    assert close(server.stored("20-0")[HIDDEN], server.expected("a"))
    assert close(server.stored("9-3")[HIDDEN], server.expected("b"))
    assert not list(server.folder.glob("sequence-10-*"))


def test_a_prompt_that_two_waves_send_is_stored_once(server: Server) -> None:
    server.start()
    for name in ("first", "second"):
        server.wave(name, 0, 10)
        server.step((name, 0, 10))
    assert server.stop() == {"10-0": 10}
    assert close(server.stored("10-0")[HIDDEN], server.expected("first"))


def test_a_prompt_whose_beginning_was_cached_is_left_out(server: Server) -> None:
    server.start()
    server.wave("whole", 0, 10)
    server.wave("cached", 1, 10)
    server.step(("whole", 0, 10), ("cached", 4, 6))
    assert server.stop() == {"10-0": 10}
    assert read_info(server.folder).lengths == {"10-0": 10}
    assert not (server.folder / "sequence-10-1.pt").exists()


def test_what_follows_a_gap_has_no_place(server: Server) -> None:
    server.start()
    server.wave("a", 0, 12)
    server.step(("a", 0, 6))
    server.step(("a", 8, 4))
    assert server.stop() == {"12-0": 6}
    assert close(server.stored("12-0")[HIDDEN], server.expected("a")[:6])


def test_only_the_layer_that_was_asked_for_is_watched(server: Server) -> None:
    assert server.start(region=r"layers\.(?P<layer>\d+)\.(self_attn\.inner|mlp)$", layer=2) == {
        "modules": ["mlp", "self_attn.inner"]
    }
    server.wave("a", 0, 8)
    server.step(("a", 0, 8))
    server.stop()
    assert set(server.stored("8-0")) == {"mlp/input", "self_attn.inner/input"}
    layers = server.runner.model.model.layers
    assert not torch.equal(layers[1].self_attn.inner.weight, layers[2].self_attn.inner.weight)
    assert not any(part._forward_pre_hooks for part in server.runner.model.modules())


@pytest.mark.parametrize("changes", [{"layer": 9}, {"region": r"layers\.(?P<layer>\d+)\.experts$"}])
def test_a_layer_without_the_op_is_refused(server: Server, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no module of layer"):
        server.start(**changes)


def test_nothing_of_the_waves_stores_nothing_and_says_so(server: Server) -> None:
    server.start()
    server.request("stranger", [1] * 10)
    server.step(("stranger", 0, 10))
    assert server.stop() == {}
    assert read_info(server.folder).lengths == {}


def test_of_several_ranks_the_first_writes(extension: Any, tmp_path: Path) -> None:
    server = Server(extension, tmp_path / "captured", rank=1)
    assert server.start() == {"modules": []}
    server.wave("a", 0, 8)
    server.step(("a", 0, 8))
    assert server.stop() == {}
    assert not server.folder.exists()


def test_a_second_capture_begins_anew(server: Server) -> None:
    for number in (0, 1):
        server.start()
        server.wave("a", number, 8)
        server.step(("a", 0, 8))
        assert server.stop() == {f"8-{number}": 8}
    assert read_info(server.folder).lengths == {"8-1": 8}
