"""A policy file changes single thresholds; what it cannot mean is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from opkit.align.policy import HARD_CEILING, Policy, Role, changes, load_policy
from opkit.errors import BadInput


def load(text: str, folder: Path) -> Policy:
    path = folder / "policy.toml"
    path.write_text(text)
    return load_policy(path)


def test_without_a_file_the_defaults_stand() -> None:
    policy = load_policy(None)
    assert policy == Policy()
    assert (policy.min_attributed, policy.min_regions, policy.key_share) == (0.95, 3, 0.01)
    assert (policy.launches, policy.latency, policy.strict) == (0.10, 0.10, 0.01)
    assert HARD_CEILING == 2.0


def test_a_file_changes_what_it_names_and_no_more(tmp_path: Path) -> None:
    policy = load("latency = 0.05\nmin_regions = 5\nrequire_operands = false\n", tmp_path)
    assert policy == Policy(latency=0.05, min_regions=5, require_operands=False)


def test_a_whole_number_is_good_for_a_share(tmp_path: Path) -> None:
    policy = load("latency = 1", tmp_path)
    assert policy.latency == 1.0
    assert isinstance(policy.latency, float)


def test_roles_are_read(tmp_path: Path) -> None:
    policy = load('[[roles]]\nmock = "topKPerRow"\ne2e = "cooperative_topk"\n', tmp_path)
    assert policy.roles == (Role("topKPerRow", "cooperative_topk"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency = ", "not a readable policy"),
        ("tolerance = 0.1", "unknown key 'tolerance'"),
        ("[latency]\nmax = 1", "latency must be a number"),
        ('latency = "10 %"', "latency must be a number"),
        ("latency = true", "latency must be a number"),
        ("require_operands = 1", "require_operands must be a truth value"),
        ("latency = 1.01", "above the hard ceiling of 2.0×"),
        ("latency = -0.1", "latency must not be negative"),
        ("min_regions = -1", "min_regions must not be negative"),
        ("latency = nan", "latency must be a finite number"),
        ("kernel_spread = inf", "kernel_spread must be a finite number"),
        ("min_regions = 2.5", "min_regions must be a whole number"),
        ("[[roles]]\nmock = 'a'", "roles need `mock` and `e2e`"),
        ("roles = 3", "roles need `mock` and `e2e`"),
        ("[[roles]]\nmock = '('\ne2e = 'b'", r"no regular expression.*'\('"),
    ],
)
def test_what_a_policy_cannot_mean_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        load(text, tmp_path)


def test_unknown_keys_come_with_those_known(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        load("latencies = 0.1", tmp_path)
    assert "known keys: glue_share" in str(caught.value.hint)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="not a readable policy"):
        load_policy(path)


def test_the_digest_names_the_thresholds() -> None:
    assert Policy().digest() == Policy().digest()
    assert len(Policy().digest()) == 12
    digests = {
        p.digest() for p in (Policy(), Policy(latency=0.05), Policy(roles=(Role("a", "b"),)))
    }
    assert len(digests) == 3


def test_what_differs_from_the_default_is_told(tmp_path: Path) -> None:
    text = 'latency = 0.05\nmin_regions = 3\n[[roles]]\nmock = "a"\ne2e = "b"\n'
    stored = json.loads(json.dumps(asdict(load(text, tmp_path))))
    found = changes({**stored, "of_another_time": 1})
    assert found == {"latency": (0.05, 0.1), "roles": ([{"mock": "a", "e2e": "b"}], [])}
    assert changes(asdict(Policy())) == changes({}) == {}
