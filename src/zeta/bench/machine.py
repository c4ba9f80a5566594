"""What a measurement was taken on."""

import datetime
import platform
from pathlib import Path

import torch


def describe_machine() -> dict[str, str | int]:
    """Processor or GPU, threads, versions and date, for the head of a results file."""
    found: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = torch.backends.cudnn.version() or 0
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
