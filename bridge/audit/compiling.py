"""Programs compiled ahead of time, for a platform that need not be present.

Programs for this machine's CPU are compiled in this process. All others are compiled in a process of their own, with
the environment variables that their compiler reads once at its start. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import pydantic
from jax import lax
from jax.sharding import SingleDeviceSharding

from bridge._implementations import ImplementationError, user
from bridge._implementations.jax_ import method, user_compute
from bridge.audit.platforms import Platform, platform
from bridge.audit.steps import HAND_WRITTEN
from bridge.case import DTYPES
from bridge.process import last_line, run_module
from jaxdw._compat import mesh_of_no_axis
from jaxdw.auto import choose
from jaxdw.geometry import Geometry
from jaxdw.methods import METHODS

_log = logging.getLogger("bridge")

#: Seconds that one program may take to compile in a process of its own.
TIME_LIMIT = 300.0

#: The precisions that a method may be compiled at.
PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True)
class AuditSubject:
    """A convolution without data.

    Attributes:
      geometry: its sizes.
      dtype: of its arrays: "float32" and so on.
      bias: add a bias.
      gradient: compile the gradients by input, kernel and bias, instead of the convolution.
      precision: a `lax.Precision`'s name, for the methods that name none of their own.
    """

    geometry: Geometry
    dtype: str = "float32"
    bias: bool = False
    gradient: bool = False
    precision: str = "default"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"`precision` is {self.precision!r}, expected one of {', '.join(PRECISIONS)}")
        for name, shape in self.arguments.items():
            if 0 in shape:
                raise ValueError(f"`{name}` has shape {shape}, expected no size of zero: there is nothing to compile")
        if 0 in self.geometry.output_shape:
            raise ValueError(
                f"the output has shape {self.geometry.output_shape} for {self.geometry.x_shape} and a kernel of "
                f"{self.geometry.kernel_size}, expected no size of zero: there is nothing to compile"
            )

    @property
    def arguments(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a program's arguments."""
        g = self.geometry
        shapes = {"x": g.x_shape, "kernel": g.kernel_shape}
        if self.bias:
            shapes["bias"] = (g.features,)
        if self.gradient:
            shapes["dy"] = g.output_shape
        return shapes


@dataclasses.dataclass(frozen=True)
class AuditMethod:
    """A function to compile.

    Attributes:
      name: "taps", "grouped[precision=highest]", "auto", or "package.module:function".
      base: the name without brackets.
      precision: a `lax.Precision`'s name; empty if the brackets have none.
    """

    name: str
    base: str
    precision: str = ""

    @classmethod
    def parse(cls, name: str) -> AuditMethod:
        """Return the method of that name, or a function of the user's own.

        Raises:
          ValueError: there is no such method, setting or function; the message lists those that exist.

        >>> AuditMethod.parse("grouped[precision=highest]").precision
        'highest'
        """
        match = re.fullmatch(r"(?P<base>[\w.]+(:\w+)?)(\[(?P<settings>[^\[\]]*)\])?", name)
        base = match["base"] if match else name
        known = ("auto", *METHODS)
        if match is None or (base not in known and ":" not in base):
            raise ValueError(
                f"`METHOD` is {name!r}, expected one of {', '.join(known)}, or a function of your own as "
                "package.module:function"
            )
        precision = ""
        for item in filter(None, (match["settings"] or "").split(",")):
            key, _, value = (part.strip() for part in item.partition("="))
            if key != "precision" or value not in PRECISIONS:
                raise ValueError(
                    f"`METHOD` is {name!r} with {item.strip()!r}, expected [precision=] one of {', '.join(PRECISIONS)}"
                )
            precision = value
        if ":" in base and _framework(base) not in ("jax", ""):
            raise ValueError(f"`METHOD` is {name!r}, a PyTorch function, expected a JAX function: XLA compiles it")
        return cls(base + (f"[precision={precision}]" if precision else ""), base, precision)


def _framework(function: str) -> str:
    """Return "torch", "jax" or "" if its code does not say; an error names the argument of this command."""
    try:
        return user.load(function).framework
    except ValueError as error:
        raise ValueError(str(error).replace("`implementation`", "`METHOD`", 1)) from None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled method.

    Attributes:
      way: its name.
      method: the method that "auto" stands for there; empty for other names.
      text: the optimised HLO.
      optimal_seconds: the compiler's own estimate; None if it has none.
      flops, bytes_accessed: as the compiler counts them; None if it does not.
      temporary_bytes: of the compiler's memory analysis.
      compile_seconds: the time that compiling took.
      error: the reason why there is no program; empty if there is one.
      scheduled: for a TPU and hand-written kernels: the text of a second compilation, in which the compiler notes the
        cycles that it counts in the instructions of these kernels; empty if that compilation failed.
    """

    way: str
    method: str = ""
    text: str = ""
    optimal_seconds: float | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    temporary_bytes: int = 0
    compile_seconds: float = 0.0
    error: str = ""
    scheduled: str = ""


#: This flag makes libtpu count the cycles of hand-written kernels, which are in no estimate otherwise. The estimate in
#: seconds then leaves these kernels out. The flag takes a folder.
_COUNTS_CYCLES = "--xla_jf_dump_static_llo_profile_to="

#: Programs whose cycles one process counts.
COUNTED_TOGETHER = 6

#: A function to compile, and its convolution.
Job = tuple[AuditMethod, AuditSubject]


@dataclasses.dataclass(frozen=True)
class _Order:
    """The jobs of a child process, as its file `jobs.json` has them."""

    platform: str
    jobs: Sequence[Job]


_ORDER, _COMPILED = pydantic.TypeAdapter(_Order), pydantic.TypeAdapter(Compiled)


def compile_methods(jobs: Sequence[Job], target: Platform) -> list[Compiled]:
    """Return the program of each job, in the given order. A job that cannot be compiled has its error.

    Raises:
      ModuleNotFoundError: the platform's compiler is not installed; the message names the extra that has it.
    """
    if target.missing:
        raise ModuleNotFoundError(target.missing)
    if target.backend == "cpu":
        return [compile_here(method, subject, target) for method, subject in jobs]
    found: list[Compiled] = []
    while len(found) < len(jobs):  # if the compiler ends its process, only the job that it worked on is lost
        found += _elsewhere(jobs[len(found) :], target)
    return _scheduled(found, jobs, target) if target.backend == "tpu" else found


def _scheduled(found: Sequence[Compiled], jobs: Sequence[Job], target: Platform) -> list[Compiled]:
    """Add the cycles of hand-written kernels, from several processes: the compiler's memory grows as it counts."""
    again = [n for n, each in enumerate(found) if any(f'"{name}"' in each.text for name in HAND_WRITTEN)]
    texts: dict[int, str] = {}
    for start in range(0, len(again), COUNTED_TOGETHER):
        part = again[start : start + COUNTED_TOGETHER]
        with tempfile.TemporaryDirectory() as profiles:
            flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_COUNTS_CYCLES}{profiles}".strip()
            counted = _elsewhere([jobs[n] for n in part], target, {"LIBTPU_INIT_ARGS": flags})
        texts |= {n: each.text for n, each in zip(part, counted)}
    return [dataclasses.replace(each, scheduled=texts.get(n, "")) for n, each in enumerate(found)]


def compile_here(way: AuditMethod, subject: AuditSubject, target: Platform) -> Compiled:
    """Compile in this process, which must have had the platform's `environment` before it imported JAX."""
    _log.info("compiling %s", way.name)
    wide = subject.dtype == "float64"
    try:
        with jax.enable_x64(True) if wide else contextlib.nullcontext():
            function, method = function_of(way, subject, target.backend)
            device = _device(target)
            place = SingleDeviceSharding(device)
            arrays = [
                jax.ShapeDtypeStruct(shape, DTYPES[subject.dtype], sharding=place)
                for shape in subject.arguments.values()
            ]
            start = time.perf_counter()
            platforms = ("cuda",) if target.backend == "gpu" else (target.backend,)
            with jax.sharding.use_abstract_mesh(_described(device)):
                lowered = jax.jit(function, keep_unused=True).trace(*arrays).lower(lowering_platforms=platforms)
            program = lowered.compile()
            seconds = time.perf_counter() - start
            cost, memory, text = program.cost_analysis() or {}, program.memory_analysis(), program.as_text()
            cost = {name: figure for name, figure in cost.items() if figure >= 0}  # -1: unknown, of a custom call
    except ImplementationError as error:  # of the user's function, which the message names
        return Compiled(way.name, error=_first_line(str(error)))
    except Exception as error:
        return Compiled(way.name, error=f"{type(error).__name__}: {_first_line(str(error))}")
    if not text:
        return Compiled(way.name, method, error="the compiler gave no text of its program")
    return Compiled(
        way.name,
        method,
        text,
        cost.get("optimal_seconds") if target.backend == "tpu" else None,
        cost.get("flops"),
        cost.get("bytes accessed"),
        memory.temp_size_in_bytes if memory else 0,
        seconds,
    )


def _device(target: Platform) -> Any:
    if target.backend == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(**target.topology).devices[0]


def _described(device: Any) -> jax.sharding.AbstractMesh:
    """Return a mesh of no axis with the device's name.

    Pallas asks the mesh which TPU to make a kernel for; without a mesh it asks the default device.
    """
    return mesh_of_no_axis(device.device_kind, getattr(device, "num_cores", None), device.platform)


def function_of(way: AuditMethod, subject: AuditSubject, backend: str) -> tuple[Callable[..., Any], str]:
    """Return the function of the arrays in `subject.arguments`, and the method that "auto" stands for."""
    g, chosen, precision = subject.geometry, "", way.precision or subject.precision
    if way.base == "auto":
        chosen = choose(g, backend)
    if ":" in way.base:
        own = user_compute(user.load(way.base))

        def forward(x, kernel, bias=None):
            with contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision):
                return own(x, kernel, bias, g, None)
    else:
        compute = method(way.base)

        def forward(x, kernel, bias=None):
            return compute(x, kernel, bias, g, None if precision == "default" else lax.Precision(precision))

    if not subject.gradient:
        return forward, chosen

    def gradient(*arrays):
        *primals, dy = arrays
        return jax.vjp(forward, *primals)[1](dy)

    return gradient, chosen


def _elsewhere(
    jobs: Sequence[Job], target: Platform, environment: Mapping[str, str] = MappingProxyType({})
) -> list[Compiled]:
    """Compile in a process of its own; if that ended early, the last entry is the job that ended it."""
    _log.info("compiling %s for %s", ", ".join(way.name for way, _ in jobs), target.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_bytes(_ORDER.dump_json(_Order(target.name, jobs)))
        failure = _process(folder, TIME_LIMIT * len(jobs), target, environment)
        found: list[Compiled] = []
        for number, (way, _) in enumerate(jobs):
            result = folder / f"{number}.json"
            if not result.exists():
                return [*found, Compiled(way.name, error=failure)]
            found.append(_COMPILED.validate_json(result.read_bytes()))
    return found


def _process(folder: Path, limit: float, target: Platform, environment: Mapping[str, str]) -> str:
    """Compile the folder's jobs, into the folder. Return the reason for a missing result."""
    try:
        done = run_module(__name__, str(folder), time_limit=limit, environment={**target.environment, **environment})
    except TimeoutError:
        return f"compiling for {target.name} took longer than {limit:g} s"
    return f"the process that compiles for {target.name} ended: {last_line(done.stderr)}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _main(folder: Path) -> None:
    order = _ORDER.validate_json((folder / "jobs.json").read_bytes())
    target = platform(order.platform)
    for number, (way, subject) in enumerate(order.jobs):
        part = folder / f"{number}.part"
        part.write_bytes(_COMPILED.dump_json(compile_here(way, subject, target)))
        part.rename(folder / f"{number}.json")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
