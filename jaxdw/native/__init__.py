"""The compiled kernels: where they are, and whether this process can use them."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from pathlib import Path

import jax

#: The names under which XLA knows the kernels.
CONV, KERNEL_GRADIENT, MATMUL = "jaxdw_conv", "jaxdw_kernel_gradient", "jaxdw_matmul"
BATCH_NORM, BATCH_NORM_GRADIENT = "jaxdw_batch_norm", "jaxdw_batch_norm_gradient"
CROSS_ENTROPY, AXPBY, CAUSAL = "jaxdw_cross_entropy", "jaxdw_axpby", "jaxdw_causal"

#: Values of JAXDW_ISA; none: the widest that the processor has.
ISAS = ("scalar", "avx2", "avx512", "neon")


class UnavailableError(Exception):
    """The kernels cannot be used; the message says why."""


def is_available() -> bool:
    """Return whether XLA can call the kernels; warn once where there is a library that cannot be used."""
    return _status()[0] is not None


def status() -> str:
    """Return one line on the kernels: the instruction set that they use, or why they are not used."""
    library, reason = _status()
    return f"compiled kernels: {_isa(library)}" if library is not None else f"no compiled kernels: {reason}"


def library() -> ctypes.CDLL:
    """Return the library of the kernels.

    Raises:
      UnavailableError: there is none, or it cannot be used.
    """
    loaded, reason = _status()
    if loaded is None:
        raise UnavailableError(reason)
    return loaded


@functools.cache
def _status() -> tuple[ctypes.CDLL | None, str]:
    switch = os.environ.get("JAXDW_NATIVE", "on")
    if switch == "off":
        return None, "JAXDW_NATIVE is off"
    if switch == "on":
        files = [file for folder in __path__ for file in Path(folder).glob("libjaxdw_kernels.*")]
        if not files:
            return None, "there is no library; install jaxdw again where there is a C++ compiler"
    else:
        files = [Path(switch)]
        if not files[0].is_file():
            raise ValueError(f"`JAXDW_NATIVE` is {switch!r}, expected 'on', 'off' or the file of a library")
    try:
        loaded = ctypes.CDLL(str(files[0]))
        _check_isa(loaded)
        for name in (CONV, KERNEL_GRADIENT, MATMUL, BATCH_NORM, BATCH_NORM_GRADIENT, CROSS_ENTROPY, AXPBY, CAUSAL):
            handler = jax.ffi.pycapsule(getattr(loaded, f"{name}_ffi"))
            jax.ffi.register_ffi_target(name, handler, platform="cpu")
    except (
        OSError,
        AttributeError,
        RuntimeError,
    ) as error:  # a file of another machine, another version, another jaxlib
        reason = f"{files[0].name} cannot be used: {' '.join(str(error).split())}"
        warnings.warn(f"jaxdw computes without its compiled kernels: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    return loaded, ""


def _check_isa(loaded: ctypes.CDLL) -> None:
    named = os.environ.get("JAXDW_ISA", "")
    if named and named not in ISAS:
        raise ValueError(f"`JAXDW_ISA` is {named!r}, expected one of {', '.join(ISAS)}")
    if not _isa(loaded):
        raise ValueError(f"`JAXDW_ISA` is {named!r}, which this processor or this build of jaxdw does not have")


def _isa(loaded: ctypes.CDLL) -> str:
    loaded.jaxdw_isa.restype = ctypes.c_char_p
    return (loaded.jaxdw_isa(None) or b"").decode()
