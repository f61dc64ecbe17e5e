"""Write a working op into a checkout of opkit: definition, torch mock, sweep, tests, page.

Templates are texts with ``$name``, ``$NAME`` and ``$title`` (:class:`string.Template`); what they
make passes the house's ruff, mypy and its own tests as it is.
"""

from __future__ import annotations

import contextlib
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from opkit.errors import BadInput
from opkit.layers.registry import BACKENDS

_NAME = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
LONGEST = 24  # letters of a name: longer ones would break the lines of the templates
REGISTRY = Path("opkit/layers/registry.py")
# template → where it goes
FILES = {
    "__init__.py.txt": "opkit/layers/{name}/__init__.py",
    "torch.py.txt": "opkit/layers/{name}/torch.py",
    "sweep.toml.txt": "opkit/layers/{name}/sweep.toml",
    "test.py.txt": "tests/layers/test_{name}.py",
    "op.md.txt": "docs/op-{name}.md",
}
_NAMES = re.compile(r"^NAMES = \(\n(?P<names>(?: {4}\"\w+\",\n)+)\)\n", flags=re.MULTILINE)


@dataclass(frozen=True)
class Written:
    """What was made, paths relative to the checkout.

    Attributes:
        files: new ones.
        registry: the file that the op's line was added to.
    """

    files: tuple[Path, ...]
    registry: Path = REGISTRY


def write_op(name: str, checkout: Path, title: str = "") -> Written:
    """Write the op ``name`` into ``checkout`` and register it; all of it or nothing.

    Args:
        name: the word that users will type.
        checkout: the folder that holds ``opkit/`` and ``tests/``.
        title: what the op is, in one line.

    Raises:
        BadInput: a name that cannot be one or is taken, no checkout, or a file that is there.
    """
    _check_name(name)
    registry = checkout / REGISTRY
    try:
        known = registry.read_text("utf-8")
    except OSError as error:
        raise BadInput(
            f"{checkout}: not a checkout of opkit (no {REGISTRY})",
            "run it in the folder that holds opkit/ and tests/, or name that with --into",
        ) from error
    registered = _registered(known, name)
    texts = _texts(name, title or name.replace("_", " "))
    _check_free(name, checkout, texts)
    _write({**texts, REGISTRY: registered}, checkout, known)
    return Written(tuple(texts))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name) or not 2 <= len(name) <= LONGEST:
        raise BadInput(
            f"{name!r} cannot be an op's name",
            f"2 to {LONGEST} lower-case letters, digits and single underscores, a letter first",
        )
    if name in BACKENDS:
        raise BadInput(f"{name} is a backend's name, not an op's")


def _registered(text: str, name: str) -> str:
    """The registry with the op's line in it."""
    found = _NAMES.search(text)
    if found is None:
        raise BadInput(f"{REGISTRY}: no list NAMES to add the op to")
    if f'"{name}"' in found["names"]:
        raise BadInput(f"there is an op {name} already", f"see opkit/layers/{name}/")
    end = found.end("names")
    return f'{text[:end]}    "{name}",\n{text[end:]}'


def _check_free(name: str, checkout: Path, texts: Mapping[Path, str]) -> None:
    """Refuse names of other parts of the package, and files that are there."""
    tests = (path.relative_to(checkout) for path in checkout.glob(f"tests/**/test_{name}.py"))
    taken = [
        Path("opkit/layers", name), Path("opkit/layers", f"{name}.py"), *texts, *tests,
    ]  # fmt: skip
    for path in taken:
        if (checkout / path).exists():
            raise BadInput(f"{path} is there already", "choose another name, or remove it")


def _texts(name: str, title: str) -> dict[Path, str]:
    """Every file's text."""
    if not title.isprintable() or '"' in title or "\\" in title or len(title) > 60:
        raise BadInput(f"{title!r} cannot be a title", "up to 60 letters, no quotation marks")
    words = {"name": name, "NAME": name.upper(), "title": title[0].upper() + title[1:]}
    folder = resources.files("opkit.layers.skeleton").joinpath("templates")
    return {
        Path(place.format(name=name)): Template(
            folder.joinpath(template).read_text("utf-8")
        ).substitute(words)
        for template, place in FILES.items()
    }


def _write(texts: Mapping[Path, str], checkout: Path, registry: str) -> None:
    """Write all files, the registry last; after a failure all is as it was."""
    made: list[Path] = []
    try:
        for path, text in texts.items():
            target = checkout / path
            if not target.parent.is_dir():
                target.parent.mkdir(parents=True)
                made.append(target.parent)
            if path != REGISTRY:
                made.append(target)
            target.write_text(text, "utf-8")
    except BaseException as error:  # Ctrl-C, too
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        with contextlib.suppress(OSError):
            (checkout / REGISTRY).write_text(registry, "utf-8")
        if isinstance(error, OSError):
            reason = f"{error.filename}: cannot be written ({error.strerror})"
            raise BadInput(reason) from error
        raise
