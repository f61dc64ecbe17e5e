"""A run: model after model, test after test, each written down as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from opkit import __version__
from opkit.bench import files
from opkit.bench.backends.backend import Backend, Served
from opkit.bench.clock import Clock
from opkit.bench.cooling import cool
from opkit.bench.measure import Effort, Measured, Say, measure
from opkit.bench.plan import BenchOptions, BenchTest
from opkit.bench.prompts import Prompts, encoded, synthetic, vocabulary
from opkit.bench.recorder import Record
from opkit.bench.result import Bench, Context, Failure, make_row, utc
from opkit.errors import BadInput, OpkitError, RunFailed, WrongUsage
from opkit.sensors.levels import Sensors

MakeBackend = Callable[[BenchOptions, Path], Backend]
MakeSensors = Callable[[BenchOptions], Sensors]
_FOR_POWER = "after its repetitions, while power was measured: "


def run_bench(
    models: Sequence[BenchOptions],
    make_backend: MakeBackend,
    make_sensors: MakeSensors,
    record: Record,
    output_dir: Path,
    clock: Clock,
    say: Say,
) -> Bench:
    """Measure every test of every model.

    A test that fails costs that test; an engine that died costs its model; Ctrl-C ends the run and
    keeps what was measured. All of it is in the result and in ``summary.json`` of the run's folder.

    Raises:
        OpkitError: nothing could begin: tests that make no sense, sensors that are not there, a
            server whose vocabulary nobody knows.
    """
    plans = [(options, options.tests(), make_sensors(options)) for options in models]
    for options in models:
        if options.url:
            _require_vocabulary(options, make_backend(options, output_dir))
    started = utc(clock.unix_ns())
    folder = files.new_folder(output_dir, started)
    bench = Bench(opkit=__version__, started=started, folder=str(folder))
    try:
        for number, (options, tests, sensors) in enumerate(plans):
            if number:
                cool(options, sensors, clock, say)
            one = _Model(bench, options, sensors, record, folder, clock, say)
            one.run(tests, make_backend(options, folder))
            if bench.interrupted:
                break
    except KeyboardInterrupt:
        bench.interrupted = True
    save(folder, bench, say)
    return bench


def save(folder: Path, bench: Bench, say: Say) -> None:
    """Write the summary; on a full disk the result is still returned, and printed."""
    try:
        files.write_summary(folder, bench)
    except OSError as error:
        say(f"{folder / files.SUMMARY} could not be written ({error.strerror})")


class _Model:
    """One model's part of a run."""

    def __init__(
        self,
        bench: Bench,
        options: BenchOptions,
        sensors: Sensors,
        record: Record,
        folder: Path,
        clock: Clock,
        say: Say,
    ) -> None:
        self._bench = bench
        self._options = options = _seeded(options, clock)
        self._sensors = sensors
        self._record = record
        self._folder = folder
        self._clock = clock
        self._say = say
        self._name = options.name or options.model or str(options.engine_dir or options.url)

    def run(self, tests: Sequence[BenchTest], backend: Backend) -> None:
        """Start the engine, run the tests, end it whatever happens."""
        options = self._options
        try:
            self._say(f"{self._name}: {_beginning(options)}")
            served = backend.start()
            prompts = _prompts(options, served)
            self._bench.models.append(_context(options, served, self._sensors))
            for number, test in enumerate(tests):
                if number:
                    cool(options, self._sensors, self._clock, self._say)
                if not self._test(test, served, backend, prompts):
                    self._not_run(tests[number + 1 :])
                    break
        except OpkitError as error:
            self._fail("", error)
        finally:
            if not options.url:
                self._say(f"{self._name}: ending {options.backend}")
            backend.close()

    def _test(self, test: BenchTest, served: Served, backend: Backend, prompts: Prompts) -> bool:
        """One test; whether another makes sense."""
        options, sensors = self._options, self._sensors
        effort = Effort(options.repetitions, options.warmup, options.power_s, options.sample_ms)
        try:
            _check_length(test, served)
            done = measure(
                test, effort, backend, prompts, sensors, self._clock, self._record, self._say
            )
        except OpkitError as error:
            self._fail(test.label, error)
            return backend.alive()
        self._bench.interrupted = done.interrupted
        path, notes = self._written(done, served)
        row = make_row(done, options, served, sensors, path, notes)
        self._bench.rows.append(row)
        if done.failed is not None:
            self._fail(test.label, done.failed, _FOR_POWER)
        save(self._folder, self._bench, self._say)
        watts = "" if row.watts is None else f", {row.watts:.0f} W"
        self._say(f"{test.label}: {row.avg_ts:,.1f} tokens/s{watts}")
        return not self._bench.interrupted and (done.failed is None or backend.alive())

    def _written(self, done: Measured, served: Served) -> tuple[str, list[str]]:
        """The test's file, or why there is none: a full disk or Ctrl-C costs the file, not the
        number."""
        options = self._options
        name = files.detail_name(options.name or served.model, done)
        try:
            path = files.write_detail(self._folder, name, done, self._sensors, options.sample_ms)
        except OSError as error:
            return "", [f"its detail file could not be written ({error.strerror})"]
        except KeyboardInterrupt:
            self._bench.interrupted = True
            return "", ["its detail file was not written: Ctrl-C came before"]
        return str(path), []

    def _not_run(self, tests: Sequence[BenchTest]) -> None:
        if not self._bench.interrupted:  # that says it all
            for test in tests:
                self._fail(test.label, RunFailed("not run, since the engine is gone"))

    def _fail(self, test: str, error: OpkitError, when: str = "") -> None:
        why = when + str(error) + (f" ({error.hint})" if error.hint else "")
        self._bench.failures.append(Failure(self._name, self._options.backend, test, why))
        self._say(f"{test or self._name}: {why}")


def _seeded(options: BenchOptions, clock: Clock) -> BenchOptions:
    """With a seed, so that the summary tells it."""
    if options.seed is not None:
        return options
    return replace(options, seed=clock.unix_ns() // 10**6 if options.url else 0)


def _beginning(options: BenchOptions) -> str:
    return f"asking {options.url}" if options.url else f"starting {options.backend}"


def _check_length(test: BenchTest, served: Served) -> None:
    needed = test.sent + test.asked
    if served.max_length and needed > served.max_length:
        raise BadInput(
            f"{needed:,} tokens do not fit the engine's longest context of {served.max_length:,}"
        )


def _prompts(options: BenchOptions, served: Served) -> Prompts:
    """Raises WrongUsage when the model's vocabulary is not known."""
    if options.tokenizer_dir is not None:
        return encoded(options.seed or 0, options.tokenizer_dir)
    vocab = options.vocab_size or served.vocab or _vocabulary_of_model(options)
    if vocab < 1:
        raise WrongUsage(
            f"{served.model}: the size of its vocabulary is not known",
            "give --vocab-size, or --model DIR with a config.json",
        )
    return synthetic(options.seed or 0, vocab)


def _vocabulary_of_model(options: BenchOptions) -> int:
    """The vocabulary's size by the model's folder; 0 when there is none or it does not say."""
    folder = options.engine_dir or (Path(options.model) if options.model else None)
    return vocabulary(folder) if folder else 0


def _require_vocabulary(options: BenchOptions, server: Backend) -> None:
    """Ask a running server, which costs nothing, before a run is begun that could send nothing.

    Raises:
        WrongUsage: neither it nor the options tell the size of its vocabulary.
    """
    known = options.vocab_size or _vocabulary_of_model(options)
    if known or options.tokenizer_dir is not None:
        return
    try:
        served = server.start()
    except RunFailed:  # the run's own failure to tell
        return
    _prompts(options, served)


def _context(options: BenchOptions, served: Served, sensors: Sensors) -> Context:
    asked: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return Context(
        model=options.name or served.model,
        backend=options.backend,
        engine_version=served.version,
        timed_by=served.timed_by,
        engine={"max_length": served.max_length, "vocab": served.vocab, **served.facts},
        sensors={"kind": sensors.kind, "scope": sensors.scope, **sensors.facts()},
        options=asked,
    )
