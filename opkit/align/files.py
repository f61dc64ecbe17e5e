"""The files that are judged: each a recording of its own, of the engine that was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from opkit.errors import BadInput
from opkit.layers.available import PACKAGES
from opkit.layers.manifest import Manifest, manifest_from_json
from opkit.nsys_parsers.export import TraceFacts, open_export
from opkit.nsys_parsers.ranks import Recording
from opkit.nsys_parsers.trace import Trace

# What the manifest of a program says whose engine opkit does not know.
UNKNOWN_ENGINE = "torch"


@dataclass
class Files:
    """The files of one question, as they are opened.

    Attributes:
        backend: the engine that the user named; empty: none.
        recordings: what was opened, beside which nothing may be opened again.
        engine: the first of the engine's files that names its backend, and that backend.
    """

    backend: str = ""
    recordings: list[Recording] = field(default_factory=list)
    engine: tuple[Path, str] | None = None

    def admit(self, trace: Trace, alone: bool = True) -> Manifest | None:
        """Take a file, or say why it cannot be judged; returns what it says of itself.

        Args:
            alone: it must be another recording than all before it, and so must all after it.

        Raises:
            BadInput: recorded without the kernels of CUDA graphs, given before under any name, or
                of another backend than was asked for or than the engine's other files.
        """
        refuse_graph_level(trace.facts)
        if alone:
            self._refuse_again(trace)
        manifest = read_manifest(trace.facts)
        refuse_other_backend(trace.facts.path, manifest, self.backend)
        if manifest is not None and manifest.side == "e2e" and (own := said_backend(manifest)):
            first, backend = self.engine = self.engine or (trace.facts.path, own)
            if own != backend:
                raise BadInput(
                    f"{first} is a recording of {backend}, {trace.facts.path} of {own}: these are "
                    "not ranks of one run",
                    "give one run's files",
                )
        return manifest

    def _refuse_again(self, trace: Trace) -> None:
        facts = trace.facts
        rows = trace.rows(
            """SELECT pid, count(*) FILTER (kind = 'kernel'), min(start), max("end")
            FROM kernel GROUP BY pid ORDER BY pid"""
        )
        own = Recording(facts.path, facts.epoch_ns, tuple(rows))
        for other in self.recordings:
            if own.same(other):
                twice = own.path == other.path
                raise BadInput(
                    f"{own.path}: given twice"
                    if twice
                    else f"{other.path} and {own.path} hold the same recording",
                    "the mock's trace and the engine's, one file a rank, each recorded on its own",
                )
        self.recordings.append(own)


def refuse_other_backend(path: Path, manifest: Manifest | None, backend: str) -> None:
    """Refuse a backend that contradicts what a file says of itself.

    Raises:
        BadInput: it does.
    """
    own = said_backend(manifest)
    if backend and own and own != backend:
        raise BadInput(
            f"{path} is a recording of {own}, and --backend says {backend}",
            f"leave --backend out, or give recordings of {backend}",
        )


def said_backend(manifest: Manifest | None) -> str:
    """The backend that a file names; empty when it names none."""
    if manifest is None or (manifest.side == "e2e" and manifest.backend == UNKNOWN_ENGINE):
        return ""
    return manifest.backend


def engine_backend(path: Path) -> str:
    """The backend of an engine's file whose mock names none; vLLM when it names none either."""
    with open_export(path) as export:
        return said_backend(read_manifest(export.facts)) or "vllm"


def two_frameworks(mock: Manifest | None, e2e: Manifest | None) -> str:
    """Both frameworks with their versions, where the files name two; else empty."""
    ours, theirs = said_backend(mock), said_backend(e2e)
    if mock is None or e2e is None or not ours or not theirs or ours == theirs:
        return ""
    said = [
        f"{name} {framework_version(of, name)}".strip()
        for of, name in ((mock, ours), (e2e, theirs))
    ]
    return f"mock {said[0]}, E2E {said[1]}"


def framework_version(manifest: Manifest, backend: str) -> str:
    """The version of a backend's package in a file; empty when it does not say."""
    versions = manifest.versions
    return versions.get(backend, "") or versions.get(PACKAGES.get(backend, ""), "")


def refuse_graph_level(facts: TraceFacts) -> None:
    """Refuse a trace that holds launches of whole CUDA graphs without their kernels.

    Raises:
        BadInput: it does.
    """
    if "CUPTI_ACTIVITY_KIND_GRAPH_TRACE" in facts.tables:
        raise BadInput(
            f"{facts.path}: recorded with --cuda-graph-trace=graph: kernels inside CUDA graphs are "
            "not in it",
            "record again with --cuda-graph-trace=node",
        )


def read_manifest(facts: TraceFacts) -> Manifest | None:
    """What a trace says of itself; None when it says nothing.

    Raises:
        BadInput: its manifest cannot be read.
    """
    return manifest_from_json(facts.manifest, str(facts.path)) if facts.manifest else None
