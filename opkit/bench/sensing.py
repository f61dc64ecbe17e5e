"""Which sensors a benchmark reads: those of this machine, when the engine runs on it."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from dataclasses import dataclass

from opkit.bench.backends.openai_url import parse_url
from opkit.bench.measure import Say
from opkit.bench.plan import BenchOptions
from opkit.sensors.detect import KINDS, detect
from opkit.sensors.levels import NoSensors, Sensors

SENSORS = KINDS  # what --sensors takes


@dataclass(frozen=True)
class Sensing:
    """What was asked of the sensors.

    Attributes:
        kind, gpus, rails: see :func:`opkit.sensors.detect.detect`.
    """

    kind: str = "auto"
    gpus: str = ""
    rails: tuple[str, ...] = ()

    def open(
        self, options: BenchOptions, say: Say, find: Callable[..., Sensors] = detect
    ) -> Sensors:
        """The sensors for one model, and a word about what they are.

        Raises:
            ToolMissing: those asked for are not there.
            BadInput: there is no such GPU or rail.
        """
        host = parse_url(options.url).host if options.url else ""
        if host and not is_here(host) and self.kind == "auto":
            say(f"no power, heat or clocks: {host} is another machine (--sensors reads this one's)")
            return NoSensors()
        found = find(self.kind, self.gpus, gpus_of(options), self.rails)
        if found.scope:
            say(f"sensors: {found.kind}, {found.scope}")
            others = found.facts().get("listed", 1) > 1 and not self.gpus
            if host and others:
                say("which GPUs the server uses is not known here: name them with --gpus")
        else:
            say(f"sensors: {found.kind}; no power is measured")
        return found


# Keywords of vLLM and TensorRT-LLM; an engine runs on as many GPUs as their product.
_SPREAD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def gpus_of(options: BenchOptions) -> int:
    """On how many GPUs an engine runs, by its keywords."""
    sizes = [options.engine_args.get(name, 1) for name in _SPREAD]
    return math.prod(size for size in sizes if isinstance(size, int) and size > 0)


def is_here(host: str) -> bool:
    """Whether a name or address is this machine's own, as far as its name tells."""
    own = {"localhost", "::1", "0.0.0.0", socket.gethostname().lower()}
    return host.lower() in own or host.startswith("127.")
