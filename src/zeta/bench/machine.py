"""What a measurement was taken on."""

import datetime
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

EXTENSIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
"""Flags of a processor, as Linux names them, that say what it multiplies with."""
SETTINGS = ("ATEN_", "KMP_", "MKL_", "OMP_", "ONEDNN_")
"""How environment variables begin that change what a processor does, and how fast."""


def describe_machine() -> dict[str, str | int]:
    """Processor or GPU, threads, versions and date, for the head of a results file.

    The processor's name may say little where it is virtual; its family and model do, and
    ``extensions``, what it has of `EXTENSIONS`. ``instructions`` are those that torch uses.
    ``settings``, where there are any, are environment variables that hold libraries to less.
    """
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    found: dict[str, str | int] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(cpuinfo),
        "extensions": " ".join(flag for flag in EXTENSIONS if flag in flags),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    settings = sorted(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    if settings:
        found["settings"] = " ".join(f"{name}={value}" for name, value in settings)
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda or ""
        found["cudnn"] = torch.backends.cudnn.version() or 0
    return found


def installed_version(package: str) -> str:
    """The version of a package, or ``"not installed"``."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor(cpuinfo: dict[str, str]) -> str:
    if "model name" not in cpuinfo:
        return platform.processor() or platform.machine()
    numbers = (f"{name} {cpuinfo[key]}" for name, key in _NUMBERS.items() if key in cpuinfo)
    return ", ".join((cpuinfo["model name"], *numbers))


_NUMBERS = {"family": "cpu family", "model": "model", "stepping": "stepping"}


def _cpuinfo() -> dict[str, str]:
    """Linux's words on the first processor, or nothing."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first, _, _ = path.read_text().partition("\n\n")
    lines = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in lines}
