"""Take private things out of free text, and find those that are left.

Free text in an export (NVTX texts, diagnostics, a manifest's command) may carry paths, hosts, users
and environment variables. Kernel names are free text too, but code: ``::``, ``lambda(int)#1`` and
``/`` between template arguments must come through unchanged.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

URL = "URL"
SECRET = "secret"
EMAIL = "e-mail address"
PATH = "absolute path"
ENVIRONMENT = "environment variable"
ADDRESS = "IP address"
HOST = "host or user name"

# Order matters: a URL holds a path, an environment variable's value often is one.
_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (URL, re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>\0]+")),
    (SECRET, re.compile(r"\b(?:hf_|sk-|ghp_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}")),
    (SECRET, re.compile(r"(?<=--)(?:api-key|hf-token|auth-token|password)[= ](?!<)[^\s\0]+")),
    # Capitals only, and not a bare number: `BLOCK=128` is a label, `HOME=/root` is not.
    (
        ENVIRONMENT,
        re.compile(r"\b[A-Z][A-Z0-9_]{2,}=(?![\d.,]*(?:$|[\s;,)\]\0]))(?!<)[^\s=\0][^\s\0]*"),
    ),
    (ENVIRONMENT, re.compile(r"\b[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSW(?:OR)?D)=(?!<)[^\s\0]+")),
    (EMAIL, re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b")),
    (
        PATH,
        re.compile(
            r"(?<![A-Za-z0-9])[A-Za-z]:[\\/](?:[^\\/:*?\"'<>|\r\n\0]+[\\/])*[^\\/\s\"'<>|,;)\0]*"
        ),
    ),
    # Two parts at least; not after a word: `tokens/s/gpu` and `./x/y` are no absolute paths.
    (PATH, re.compile(r"(?<![\w.>~*/)\]-])/[\w.+@~-]*[A-Za-z_][\w.+@~-]*(?:/[\w.+@~-]+)+/?")),
    (PATH, re.compile(r"(?<![\w/])~[\w-]*/[\w.+@~/-]+")),
    (ADDRESS, re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")),
    (ADDRESS, re.compile(r"(?<![\w:])(?:[0-9A-Fa-f]{1,4}:){7}[0-9A-Fa-f]{1,4}(?![\w:])")),
)
# With so many variables a text is a dump of an environment; values may hold blanks: all goes.
_DUMP_OF_VARIABLES = 5
_HOME = re.compile(r"(?:/home|/Users|[A-Za-z]:[\\/]Users)[\\/][^\\/]+[\\/]?")
_HARMLESS_ADDRESSES = frozenset({"127.0.0.1", "0.0.0.0", "255.255.255.255"})
# A JSON member with this name holds version numbers, and 12.4.5.8 is a library, not an address.
_VERSIONS = "versions"
_SECRET_OPTION = re.compile(r"--(?:api-key|hf-token|auth-token|password)")
# Names of a host or a user that say nothing, and would tear other words apart.
_PLAIN_NAMES = frozenset(
    """admin attention computer context cuda generation local localhost model node none nvidia
    python root server sglang trtllm ubuntu unknown user vllm worker""".split()  # noqa: SIM905
) | {"local (cli)"}
_SHORTEST_NAME = 4


@dataclass
class Scrubber:
    """Replaces private parts of texts and counts them.

    Attributes:
        names: host and user names known from the same file, replaced as whole words.
        counts: replacements made, by kind.
    """

    names: frozenset[str] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        usable = sorted(filter(is_telling, self.names), key=lambda name: (-len(name), name))
        joined = "|".join(re.escape(name) for name in usable)
        self._names = re.compile(rf"(?<!\w)(?:{joined})(?!\w)", re.I) if usable else None

    def code(self, text: str) -> str:
        """Scrub the name of a kernel or function: all but host names, which code does not hold."""
        if _is_dump(text):
            self.counts[ENVIRONMENT] += 1
            return "<environment>"
        for kind, pattern in _PATTERNS:
            text = pattern.sub(self._replacement(kind), text)
        return text

    def text(self, text: str) -> str:
        """Scrub one free text."""
        text = self.code(text)
        if self._names is None:
            return text
        text, replaced = self._names.subn("<host>", text)
        if replaced:
            self.counts[HOST] += replaced
        return text

    def json(self, text: str) -> str:
        """Scrub every string inside a JSON text but version numbers; other text as it is."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError:
            return self.text(text)
        return json.dumps(self._walk(data))

    def _walk(self, data: Any) -> Any:
        if isinstance(data, dict):
            return {
                self.text(key): value if key == _VERSIONS else self._walk(value)
                for key, value in data.items()
            }
        if isinstance(data, list):
            # A command is a list: the secret stands behind its option.
            secret = [False, *(bool(_SECRET_OPTION.fullmatch(str(item))) for item in data[:-1])]
            return [
                "<secret>" if hide else self._walk(item)
                for hide, item in zip(secret, data, strict=bool(data))
            ]
        return self.text(data) if isinstance(data, str) else data

    def _replacement(self, kind: str) -> Callable[[re.Match[str]], str]:
        def replace(found: re.Match[str]) -> str:
            if _is_harmless(kind, found[0]):
                return found[0]
            self.counts[kind] += 1
            return _stand_in(kind, found[0])

        return replace


def private_parts(text: str, names: frozenset[str] = frozenset()) -> list[tuple[str, str]]:
    """What is private in a text, as (kind, the text's part), each once.

    Args:
        text: the text of one cell.
        names: host and user names that are known.
    """
    if _is_dump(text):
        return [(ENVIRONMENT, text[:60])]
    found = [
        (kind, match[0])
        for kind, pattern in _PATTERNS
        for match in pattern.finditer(text)
        if not _is_harmless(kind, match[0])
    ]
    for name in filter(is_telling, sorted(names)):
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.I):
            found.append((HOST, name))
    return list(dict.fromkeys(found))


def without_versions(text: str) -> str:
    """A JSON text without its version numbers, which look like addresses; other texts unchanged."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return text
    if isinstance(data, dict):
        data.pop(_VERSIONS, None)
    # One string a line: JSON's own escapes would hide a Windows path.
    return "\n".join(_strings(data))


def _strings(data: Any) -> list[str]:
    if isinstance(data, dict):
        return [text for pair in data.items() for part in pair for text in _strings(part)]
    if isinstance(data, list):
        return [text for item in data for text in _strings(item)]
    return [data] if isinstance(data, str) else []


def is_telling(name: str) -> bool:
    """Whether a host or user name tells anything, and is long enough to be looked for."""
    return len(name) >= _SHORTEST_NAME and name.lower() not in _PLAIN_NAMES and not name.isdigit()


def _is_dump(text: str) -> bool:
    assignments = re.findall(r"(?:^|[\0\s;])[A-Za-z_][A-Za-z0-9_]*=", text)
    capitals = sum(1 for item in assignments if item.strip("\0 \n;=").isupper())
    return ("\0" in text and bool(assignments)) or capitals >= _DUMP_OF_VARIABLES


def _is_harmless(kind: str, part: str) -> bool:
    if kind != ADDRESS or ":" in part:
        return False
    return part in _HARMLESS_ADDRESSES or any(int(octet) > 255 for octet in part.split("."))


def _stand_in(kind: str, part: str) -> str:
    if kind == PATH:
        if _HOME.fullmatch(part):
            return "~"
        return re.split(r"[\\/]", part.rstrip("\\/"))[-1] or "<path>"
    if kind == ENVIRONMENT:
        return part.split("=", 1)[0] + "=<value>"
    if kind == SECRET:
        return re.sub(r"(?<=[= ]).*|^(?!.*[= ]).*", "<secret>", part, count=1)
    return {URL: "<url>", EMAIL: "<email>", ADDRESS: "<address>"}[kind]
