"""The machine and the versions on which a result was computed."""

from __future__ import annotations

import importlib
import os
import platform

import numpy as np

from bridge._implementations import FRAMEWORKS

#: Instruction sets that decide which kernels run, by the names in /proc/cpuinfo.
_INSTRUCTION_SETS = ("avx", "fma", "f16c", "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "sve")


def environment() -> dict[str, str]:
    """Return versions, processor, threads and flags, as words for a report."""
    info = {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instruction sets": " ".join(_instruction_sets()),
        "numpy": np.__version__,
    }
    for module in FRAMEWORKS.values():
        info |= getattr(importlib.import_module(module), "environment", dict)()
    return info


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:  # not Linux
        return ""
    return next((value.strip() for name, _, value in lines if name.strip() == field), "")


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    present = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in _INSTRUCTION_SETS if name in present]
