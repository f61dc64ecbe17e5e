"""The backend for OpenAI-compatible servers, against a real one on this machine."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_openai import Behaviour, serving

from opkit.bench.backends.openai_url import Address, OpenAiUrl, parse_url
from opkit.errors import BadInput, RunFailed


def ticking(step: int = 10) -> Callable[[], int]:
    """A clock that moves by ``step`` ns with every look at it."""
    return itertools.count(1000, step).__next__


def test_what_is_asked_of_the_server() -> None:
    with serving(seen := Behaviour()) as url:
        backend = OpenAiUrl(url, api_key="secret")
        backend.start()
        backend.generate([[5, 6, 7]], 4)
    assert seen.bodies == [
        {
            "model": "m",
            "prompt": [5, 6, 7],
            "max_tokens": 4,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]
    assert seen.headers[0]["Authorization"] == "Bearer secret"


def test_what_the_server_tells_of_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 32000}))
    behaviour = Behaviour()
    behaviour.models[0]["root"] = str(tmp_path)
    with serving(behaviour) as url:
        served = OpenAiUrl(url).start()
    assert (served.model, served.version, served.vocab, served.max_length) == (
        "m", "0.24.0", 32000, 8192,
    )  # fmt: skip


def test_a_server_without_a_version_is_fine() -> None:
    with serving(Behaviour(version=None)) as url:
        assert OpenAiUrl(url, vocab=10).start().version == ""


def test_times_of_a_stream() -> None:
    """The clock is looked at once before, and once for each line of the stream."""
    with serving(Behaviour(per_chunk=1)) as url:
        backend = OpenAiUrl(url, clock=ticking())
        backend.start()
        turn = backend.generate([[1, 2]], 3)
    # Each event is two lines: data, and an empty one.
    assert turn.began_ns == 1000
    reply = turn.replies[0]
    assert (reply.first_ns, reply.last_ns, turn.ended_ns) == (1010, 1050, 1050)
    assert reply.gaps == ((20, 1), (20, 1))
    assert (reply.tokens, reply.first_tokens, reply.cached) == (3, 1, None)


def test_tokens_are_counted_by_usage_not_by_chunks() -> None:
    with serving(Behaviour(per_chunk=3)) as url:
        backend = OpenAiUrl(url, clock=ticking())
        backend.start()
        reply = backend.generate([[1]], 8).replies[0]
    assert reply.tokens == 8
    assert reply.first_tokens == 3
    assert [count for _, count in reply.gaps] == [3, 2]


@pytest.mark.parametrize("text", ["", "word"])
def test_a_server_that_counts_only_at_the_end(text: str) -> None:
    """Each chunk's number of tokens is unknown, and nothing is made of it but first and last."""
    with serving(Behaviour(continuous=False, text=text)) as url:
        backend = OpenAiUrl(url, clock=ticking())
        backend.start()
        reply = backend.generate([[1]], 4).replies[0]
    assert (reply.tokens, reply.gaps) == (4, ())
    assert reply.first_ns == 1010
    assert reply.last_ns is not None
    assert reply.last_ns > reply.first_ns


def test_requests_of_a_batch_are_sent_together() -> None:
    """The server answers none of them before all are there."""
    with serving(seen := Behaviour(together=3)) as url:
        backend = OpenAiUrl(url)
        backend.start()
        turn = backend.generate([[1], [2], [3]], 2)
    assert sorted(body["prompt"][0] for body in seen.bodies) == [1, 2, 3]
    assert len(turn.replies) == 3
    assert turn.ended_ns == max(reply.last_ns or 0 for reply in turn.replies)


def test_the_prefix_cache_is_told() -> None:
    with serving(Behaviour(cached=16)) as url:
        backend = OpenAiUrl(url)
        backend.start()
        assert backend.generate([[1] * 20], 1).replies[0].cached == 16


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        (Behaviour(short=1), "3 output tokens came back instead of 4"),
        (Behaviour(status=400), "answered 400: .*the prompt is too long"),
        (Behaviour(error="out of memory"), "out of memory"),
        (Behaviour(cut=2), "the stream ended early"),
        (
            Behaviour(status=307, location="http://other/v1"),
            "answered 307: .* leads to http://other",
        ),
        (Behaviour(odd="[]"), "no JSON object"),
        (Behaviour(odd="{"), "not JSON"),
        (Behaviour(odd='{"choices": [1]}'), "not as OpenAI's API has it"),
        (Behaviour(odd='{"choices": {"a": 1}}'), "not as OpenAI's API has it"),
        (Behaviour(odd='{"usage": [1]}'), "not as OpenAI's API has it"),
        (Behaviour(odd='{"usage": {"completion_tokens": "4"}}'), "not as OpenAI's API has it"),
        (Behaviour(usage=False, continuous=False), "no usage, so its tokens cannot be counted"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_bad_answer_is_a_sentence_and_no_number(
    behaviour: Behaviour, sentence: str, batch: int
) -> None:
    with serving(behaviour) as url:
        backend = OpenAiUrl(url)
        backend.start()
        with pytest.raises(RunFailed, match=sentence):
            backend.generate([[1, 2]] * batch, 4)
        assert backend.alive()


def test_a_key_that_is_refused() -> None:
    with serving(Behaviour(status=401)) as url:
        backend = OpenAiUrl(url)
        backend.start()
        with pytest.raises(RunFailed) as caught:
            backend.generate([[1]], 4)
    assert "OPENAI_API_KEY" in (caught.value.hint or "")


def test_a_stream_that_never_ends_has_a_limit() -> None:
    """Each piece comes in time, so the socket's own limit never strikes."""
    with serving(Behaviour(endless=True)) as url:
        backend = OpenAiUrl(url, limit_s=1.0, clock=ticking(100_000_000))
        backend.start()
        with pytest.raises(RunFailed, match="no answer within 1 s"):
            backend.generate([[1]], 4)


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        backend = OpenAiUrl(url)
        with pytest.raises(RunFailed, match="no answer"):
            backend.start()
        assert not backend.alive()


def test_a_server_that_went_away() -> None:
    with serving(Behaviour()) as url:
        backend = OpenAiUrl(url)
        backend.start()
    with pytest.raises(RunFailed, match="cannot connect"):
        backend.generate([[1]], 1)
    assert not backend.alive()


def test_a_model_that_is_not_served() -> None:
    with serving(Behaviour()) as url, pytest.raises(RunFailed, match=r"does not serve x; .* m"):
        OpenAiUrl(url, model="x").start()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://h:8000", Address(False, "h", 8000, "")),
        ("http://h:8000/v1/", Address(False, "h", 8000, "")),
        ("https://h/serve", Address(True, "h", 443, "/serve")),
        ("h:80", Address(False, "h", 80, "")),
    ],
)
def test_urls(url: str, address: Address) -> None:
    assert parse_url(url) == address


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:port", "http://[::1"])
def test_no_urls(url: str) -> None:
    with pytest.raises(BadInput, match="--url"):
        parse_url(url)
