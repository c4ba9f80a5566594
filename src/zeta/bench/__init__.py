"""Measuring: interleaved times, peak memory, and a description of the machine."""

from zeta.bench.machine import describe_machine
from zeta.bench.memory import peak_bytes
from zeta.bench.timing import Timing, time_interleaved

__all__ = ["Timing", "describe_machine", "peak_bytes", "time_interleaved"]
