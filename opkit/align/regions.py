"""Regions: the kernels of the op in one layer of one step (E2E) or in one iteration (mock).

Three ways to find them in an E2E trace, best first, as the report says: the module's NVTX range
    around the
launch; around the creation of the graph node; by sequence (``sequence``) where NVTX does not reach.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from opkit.align.result import Method
from opkit.align.shapes import CaseSteps
from opkit.errors import BadInput
from opkit.layers.op import MOCK_RANGE_PREFIX, Case, LaunchMode, RegionPattern, parse_mock_range
from opkit.nsys_parsers.names import KernelName, parse_name
from opkit.nsys_parsers.ranges import MODULE_SQL, assign
from opkit.nsys_parsers.trace import Trace

Dim = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel, copy or fill of a region. Times in ns since the session's start."""

    name: KernelName
    start: int
    end: int
    grid: Dim | None
    block: Dim | None
    from_graph: bool

    @property
    def duration(self) -> int:
        """Execution time in ns."""
        return self.end - self.start


@dataclass(frozen=True)
class Region:
    """The kernels of the op, once, in launch order.

    Attributes:
        case: the shape that ran.
        launches: kernels, copies and fills in launch order.
        layer: layer number in the model, None for a mock.
        variant: ``mock`` or ``strict`` for a mock's iteration, empty for E2E.
    """

    case: Case
    launches: tuple[Launch, ...]
    layer: int | None = None
    variant: str = ""

    @property
    def signature(self) -> tuple[str, ...]:
        """Demangled names in launch order."""
        return tuple(launch.name.demangled for launch in self.launches)

    @property
    def gpu_ns(self) -> int:
        """Sum of execution times."""
        return sum(launch.duration for launch in self.launches)

    @property
    def elapsed_ns(self) -> int:
        """Last end minus first start."""
        return max(x.end for x in self.launches) - min(x.start for x in self.launches)

    @property
    def mode(self) -> LaunchMode:
        """Graph when most kernels were replayed from one."""
        replayed = sum(launch.from_graph for launch in self.launches)
        return LaunchMode.GRAPH if 2 * replayed > len(self.launches) else LaunchMode.EAGER


@dataclass(frozen=True)
class Times:
    """Launches of one short name and their summed execution time in ns."""

    name: str
    launches: int
    gpu_ns: int


@dataclass(frozen=True)
class StepKernels:
    """One forward step of the engine: all its kernels in launch order, each with its layer or
    None."""

    step: int
    launches: tuple[Launch, ...]
    layers: tuple[int | None, ...]
    by_node: bool  # some layer was found by the graph node's creation
    unlinked: int  # kernels on the GPU meanwhile that no launch row explains
    lost: tuple[Times, ...] = ()  # these, by name


@dataclass(frozen=True)
class CaseRegions:
    """The E2E regions of one case, how they were found, and how much they explain."""

    steps: CaseSteps
    regions: tuple[Region, ...]
    method: Method
    attributed: float
    explained: float
    unattributed: int
    silent_steps: int = 0  # steps of this shape in which no kernel of the op was found
    gpu_ns: int = 0  # of all kernels of these steps
    lost: tuple[Times, ...] = ()  # kernels that no launch row explains
    outside: tuple[Times, ...] = ()  # kernels of these steps in no region


_KERNEL_COLUMNS = """
    k.name, k.start, k."end", k.grid_x, k.grid_y, k.grid_z, k.block_x, k.block_y, k.block_z,
    k.graph_node IS NOT NULL
"""
# Launch order: the launch call, then, inside one graph launch, the order in which nodes were
# captured.
_ORDER = "k.launch_start, k.node_start NULLS FIRST, k.graph_node NULLS FIRST, k.start"


def _launch(row: tuple[object, ...]) -> Launch:
    name, start, end, gx, gy, gz, bx, by, bz, graph = row
    return Launch(
        parse_name(str(name)),
        int(start),  # type: ignore[call-overload]
        int(end),  # type: ignore[call-overload]
        None if gx is None else (gx, gy, gz),  # type: ignore[arg-type]
        None if bx is None else (bx, by, bz),  # type: ignore[arg-type]
        bool(graph),
    )


def mock_regions(trace: Trace, op: str) -> list[Region]:
    """Every iteration of every case of the mock's trace.

    Raises:
        BadInput: no iteration range of this op holds a kernel.
    """
    assign(trace.db, "mock_of", f"starts_with(text, '{MOCK_RANGE_PREFIX}')")
    rows = trace.rows(
        f"""
        SELECT n.id, n.text, {_KERNEL_COLUMNS}
        FROM mock_of m JOIN kernel k ON k.id = m.kernel_id JOIN nvtx n ON n.id = m.range_id
        ORDER BY n.start, {_ORDER}
        """
    )
    found: dict[int, tuple[str, list[Launch]]] = {}
    for row in rows:
        found.setdefault(row[0], (row[1], []))[1].append(_launch(row[2:]))
    regions = []
    for text, launches in found.values():
        about = parse_mock_range(text)
        if about is not None and about.op == op and isinstance(about.case, Case):
            regions.append(Region(about.case, tuple(launches), variant=about.variant))
    if not regions:
        raise BadInput(
            f"{trace.facts.path}: no kernel was launched inside an `opkit {op} …` range",
            "a mock's trace must come from `opkit align` (or `python -m opkit.layers.drive`), with "
            "NVTX on",
        )
    return regions


def silent_iterations(trace: Trace, op: str) -> dict[Case, int]:
    """Iterations of the mock that hold no kernel: their launches are not in the export."""
    rows = trace.rows(
        f"""
        SELECT text FROM nvtx WHERE starts_with(text, '{MOCK_RANGE_PREFIX}')
        AND id NOT IN (SELECT range_id FROM mock_of)
        """
    )
    return _cases_of(op, rows)


def intruders(trace: Trace, op: str) -> dict[Case, int]:
    """Kernels that ran amid the mock's iterations without a launch inside them: another thread's,
    or one whose launch is not in the export."""
    rows = trace.rows(
        """
        WITH span AS (
            SELECT m.range_id, k.pid, min(k.start) AS start, max(k."end") AS "end"
            FROM mock_of m JOIN kernel k ON k.id = m.kernel_id GROUP BY 1, 2),
        strange AS (SELECT pid, start FROM kernel
                    WHERE id NOT IN (SELECT kernel_id FROM mock_of))
        SELECT n.text FROM strange x ASOF JOIN span s ON s.pid = x.pid AND s.start <= x.start
        JOIN nvtx n ON n.id = s.range_id WHERE x.start <= s."end"
        """
    )
    return _cases_of(op, rows)


def _cases_of(op: str, rows: list[tuple[str]]) -> dict[Case, int]:
    """How often each case of the op's steps is named by range texts."""
    about = [parse_mock_range(text) for (text,) in rows]
    return Counter(
        found.case
        for found in about
        if found is not None and found.op == op and isinstance(found.case, Case)
    )


def mark_layers(trace: Trace, pattern: RegionPattern) -> int:
    """Create table ``layer_of(kernel_id, layer, by_node)`` from module ranges; return its row
    count."""
    texts = trace.rows(
        "SELECT DISTINCT text FROM nvtx WHERE contains(text, '''Module'':') "
        "AND NOT contains(text, '''Outputs'':')"
    )
    chosen: list[tuple[str, int]] = []
    for (text,) in texts:
        module = re.search(MODULE_SQL, text)
        found = re.search(pattern.module, module[1]) if module else None
        if found:
            chosen.append((text, int(found["layer"])))
    trace.db.execute("CREATE OR REPLACE TABLE module_text (text VARCHAR, layer INTEGER)")
    if chosen:
        trace.db.executemany("INSERT INTO module_text VALUES (?, ?)", chosen)
    where = "text IN (SELECT text FROM module_text)"
    assign(trace.db, "by_launch", where, "launch")
    assign(trace.db, "by_node", where, "node")
    trace.db.execute(
        """
        CREATE OR REPLACE TABLE layer_of AS
        SELECT coalesce(l.kernel_id, n.kernel_id) AS kernel_id, t.layer, l.kernel_id IS NULL AS
        by_node FROM by_launch l FULL JOIN by_node n ON n.kernel_id = l.kernel_id
        JOIN nvtx r ON r.id = coalesce(l.range_id, n.range_id)
        JOIN module_text t ON t.text = r.text
        """
    )
    return int(trace.rows("SELECT count(*) FROM layer_of")[0][0])


def read_steps(trace: Trace, steps: Iterable[int]) -> dict[int, StepKernels]:
    """The kernels of the given steps (ids of table ``step_of``'s ranges), in launch order."""
    wanted = ", ".join(str(step) for step in steps)
    if not wanted:
        return {}
    rows = trace.rows(
        f"""
        SELECT s.range_id, y.layer, y.by_node, k.pid, {_KERNEL_COLUMNS}
        FROM step_of s JOIN kernel k ON k.id = s.kernel_id
        LEFT JOIN layer_of y ON y.kernel_id = k.id
        WHERE s.range_id IN ({wanted})
        ORDER BY s.range_id, {_ORDER}
        """
    )
    grouped: dict[int, list[tuple[object, ...]]] = defaultdict(list)
    for row in rows:
        grouped[row[0]].append(row)
    unlinked = _unlinked(trace, wanted)
    return {
        step: StepKernels(
            step,
            tuple(_launch(row[4:]) for row in members),
            tuple(row[1] for row in members),  # type: ignore[misc]
            any(bool(row[2]) for row in members),
            sum(found.launches for found in unlinked.get(step, ())),
            tuple(unlinked.get(step, ())),
        )
        for step, members in grouped.items()
    }


def _unlinked(trace: Trace, wanted: str) -> dict[int, list[Times]]:
    """Kernels without a launch row that ran while the step's own kernels ran, per step."""
    rows = trace.rows(
        f"""
        WITH span AS (
            SELECT s.range_id AS step, k.pid, min(k.start) AS start, max(k."end") AS "end"
            FROM step_of s JOIN kernel k ON k.id = s.kernel_id
            WHERE s.range_id IN ({wanted}) GROUP BY 1, 2),
        lost AS (SELECT pid, start, "end" - start AS ns, name FROM kernel
                 WHERE launch_start IS NULL OR (graph_node IS NOT NULL AND node_start IS NULL)),
        placed AS (SELECT s.step, l.start, l.ns, l.name, s."end" FROM lost l
                   ASOF JOIN span s ON s.pid = l.pid AND s.start <= l.start)
        SELECT step, name, count(*), sum(ns)::BIGINT FROM placed WHERE start <= "end" GROUP BY 1, 2
        """
    )
    found: dict[int, list[Times]] = defaultdict(list)
    for step, name, launches, ns in rows:
        found[step].append(Times(parse_name(name).short, launches, ns))
    return found


def nvtx_regions(case: CaseSteps, steps: dict[int, StepKernels]) -> CaseRegions | None:
    """Regions by module ranges, or None when no kernel of these steps lies in one."""
    regions: list[Region] = []
    for step in (steps[i] for i in case.steps if i in steps):
        by_layer: dict[int, list[Launch]] = defaultdict(list)
        for launch, layer in zip(step.launches, step.layers, strict=True):
            if layer is not None:
                by_layer[layer].append(launch)
        regions += [Region(case.case, tuple(found), layer) for layer, found in by_layer.items()]
    if not regions:
        return None
    used = [steps[i] for i in case.steps if i in steps]
    method = Method.NODE_NVTX if any(s.by_node for s in used) else Method.LAUNCH_NVTX
    silent = len(case.steps) - sum(any(x is not None for x in step.layers) for step in used)
    return summarise(case, used, regions, method, silent)


def summarise(
    case: CaseSteps, used: list[StepKernels], regions: list[Region], method: Method, silent: int
) -> CaseRegions:
    """Bundle regions with how much of their steps is linked (attributed) and covered
    (explained)."""
    linked = sum(len(step.launches) for step in used)
    lost = sum(step.unlinked for step in used)
    total_ns = sum(launch.duration for step in used for launch in step.launches)
    covered = sum(region.gpu_ns for region in regions)
    return CaseRegions(
        case,
        tuple(regions),
        method,
        attributed=linked / (linked + lost) if linked else 0.0,
        explained=covered / total_ns if total_ns else 0.0,
        unattributed=lost,
        silent_steps=silent,
        gpu_ns=total_ns,
        lost=sum_times(found for step in used for found in step.lost),
        outside=_outside(used, regions),
    )


def sum_times(parts: Iterable[Times]) -> tuple[Times, ...]:
    """The parts added up by name, most time first."""
    sums: dict[str, Times] = {}
    for part in parts:
        old = sums.get(part.name, Times(part.name, 0, 0))
        sums[part.name] = Times(part.name, old.launches + part.launches, old.gpu_ns + part.gpu_ns)
    return tuple(sorted(sums.values(), key=lambda times: (-times.gpu_ns, times.name)))


def _outside(used: list[StepKernels], regions: list[Region]) -> tuple[Times, ...]:
    """What the steps ran beside the regions: all their launches less the regions' own."""
    ran = [(launch, 1) for step in used for launch in step.launches]
    own = [(launch, -1) for region in regions for launch in region.launches]
    sums = sum_times(Times(x.name.short, sign, sign * x.duration) for x, sign in ran + own)
    return tuple(times for times in sums if times.launches)
