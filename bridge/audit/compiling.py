"""Programs compiled ahead of time, for a platform that need not be there.

For this machine's CPU that happens here. Everything else is compiled in a process of its own, with the variables that
its compiler reads once. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
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
from jax import lax
from jax.sharding import SingleDeviceSharding

from bridge._implementations import ImplementationError, user
from bridge._implementations.jax_ import method
from bridge.audit.platforms import Platform, environment_for, platform
from bridge.audit.steps import HAND_WRITTEN
from bridge.case import DTYPES
from bridge.process import last_line, run_module
from jaxdw._compat import mesh_of_no_axis
from jaxdw.auto import choose
from jaxdw.geometry import Geometry
from jaxdw.methods import METHODS

_log = logging.getLogger("bridge")

#: Seconds a program may take to compile in a process of its own.
TIME_LIMIT = 300.0

#: What a method may be compiled at.
PRECISIONS = ("default", "high", "highest")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A convolution without data.

    Attributes:
      geometry: its sizes.
      dtype: of its arrays: "float32" and so on.
      bias: whether it has one.
      gradient: whether the gradients by input, kernel and bias are compiled, and not the convolution.
      precision: a `lax.Precision`'s name, for the ways that name none of their own.
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
        """Names and shapes of what a program takes."""
        g = self.geometry
        shapes = {"x": g.x_shape, "kernel": g.kernel_shape}
        if self.bias:
            shapes["bias"] = (g.features,)
        if self.gradient:
            shapes["dy"] = g.output_shape
        return shapes


@dataclasses.dataclass(frozen=True)
class Way:
    """A function to compile.

    Attributes:
      name: "taps", "grouped[precision=highest]", "auto", or "package.module:function".
      base: without brackets.
      precision: a `lax.Precision`'s name; empty where nothing is said.
    """

    name: str
    base: str
    precision: str = ""

    @classmethod
    def parse(cls, name: str) -> Way:
        """The method of that name, or a function of the user's own.

        Raises:
          ValueError: there is no such method, setting or function; the message lists what there is.

        >>> Way.parse("grouped[precision=highest]").precision
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
        if ":" in base and _framework(base) != "jax":
            raise ValueError(f"`METHOD` is {name!r}, a PyTorch function, expected one of JAX: XLA compiles it")
        return cls(base + (f"[precision={precision}]" if precision else ""), base, precision)


def _framework(function: str) -> str:
    """ "torch" or "jax"; an error names the argument of this command."""
    try:
        return user.load(function)[1]
    except ValueError as error:
        raise ValueError(str(error).replace("`implementation`", "`METHOD`", 1)) from None


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler made of a way.

    Attributes:
      way: its name; method: what "auto" stands for there, else empty.
      text: the optimised HLO.
      optimal_seconds: the compiler's own estimate; None where it has none.
      flops, bytes_accessed: as the compiler counts them; None where it does not.
      temporary_bytes, argument_bytes, output_bytes: of its memory analysis.
      compile_seconds: how long it took.
      error: why there is no program; empty where there is one.
      scheduled: for a TPU, with hand-written kernels: the program once more, with the cycles that the compiler counts
        in the instructions which it made of them; empty where it would not.
    """

    way: str
    method: str = ""
    text: str = ""
    optimal_seconds: float | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    temporary_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    compile_seconds: float = 0.0
    error: str = ""
    scheduled: str = ""


#: Makes libtpu count the cycles of hand-written kernels, which are in no estimate otherwise; the estimate in seconds
#: then leaves them out. It takes a folder.
_COUNTS_CYCLES = "--xla_jf_dump_static_llo_profile_to="

#: Programs that one process counts cycles of.
COUNTED_TOGETHER = 6

#: What is compiled: a way, of a convolution.
Job = tuple[Way, Subject]


def compile_ways(jobs: Sequence[Job], target: Platform) -> list[Compiled]:
    """The programs of the ways, in their order; one that cannot be compiled has its error.

    Raises:
      ModuleNotFoundError: the platform's compiler is not installed; the message says which extra has it.
    """
    if target.missing:
        raise ModuleNotFoundError(target.missing)
    if target.backend == "cpu":
        return [compile_here(way, subject, target) for way, subject in jobs]
    found: list[Compiled] = []
    while len(found) < len(jobs):  # a compiler that ends its process takes one way with it
        found += _elsewhere(jobs[len(found) :], target)
    return _scheduled(found, jobs, target) if target.backend == "tpu" else found


def _scheduled(found: Sequence[Compiled], jobs: Sequence[Job], target: Platform) -> list[Compiled]:
    """With the cycles of hand-written kernels, from other processes: the compiler's memory grows as it counts."""
    again = [n for n, each in enumerate(found) if any(f'"{name}"' in each.text for name in HAND_WRITTEN)]
    texts: dict[int, str] = {}
    for start in range(0, len(again), COUNTED_TOGETHER):
        part = again[start : start + COUNTED_TOGETHER]
        with tempfile.TemporaryDirectory() as profiles:
            flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_COUNTS_CYCLES}{profiles}".strip()
            counted = _elsewhere([jobs[n] for n in part], target, {"LIBTPU_INIT_ARGS": flags})
        texts |= {n: each.text for n, each in zip(part, counted)}
    return [dataclasses.replace(each, scheduled=texts.get(n, "")) for n, each in enumerate(found)]


def compile_here(way: Way, subject: Subject, target: Platform) -> Compiled:
    """One way compiled in this process, which must have had the platform's `environment` before it imported JAX."""
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
    except ImplementationError as error:  # of the user's function, which it names
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
        memory.argument_size_in_bytes if memory else 0,
        memory.output_size_in_bytes if memory else 0,
        seconds,
    )


def _device(target: Platform) -> Any:
    if target.backend == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies

    return topologies.get_topology_desc(**target.topology).devices[0]


def _described(device: Any) -> jax.sharding.AbstractMesh:
    """The device by name, on no axis: Pallas asks the mesh, else the default device, for which TPU a kernel is made."""
    return mesh_of_no_axis(device.device_kind, getattr(device, "num_cores", None), device.platform)


def function_of(way: Way, subject: Subject, backend: str) -> tuple[Callable[..., Any], str]:
    """The function of a way, of arrays as `subject.arguments` has them, and the method that "auto" stands for."""
    g, chosen, precision = subject.geometry, "", way.precision or subject.precision
    if way.base == "auto":
        chosen = choose(g, backend)
    if ":" in way.base:
        own, _ = user.load(way.base)

        def forward(x, kernel, bias=None):
            with contextlib.nullcontext() if precision == "default" else jax.default_matmul_precision(precision):
                return user.call(way.base, own, jax.Array, g.output_shape, x, kernel, bias)
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
    """Compiled in a process of its own; where it ended early, up to the way that ended it."""
    _log.info("compiling %s for %s", ", ".join(way.name for way, _ in jobs), target.name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        described = [{"way": way.name, "subject": dataclasses.asdict(subject)} for way, subject in jobs]
        (folder / "jobs.json").write_text(json.dumps({"platform": target.name, "jobs": described}))
        failure = _process(folder, TIME_LIMIT * len(jobs), target, environment)
        found: list[Compiled] = []
        for number, (way, _) in enumerate(jobs):
            result = folder / f"{number}.json"
            if not result.exists():
                return [*found, Compiled(way.name, error=failure)]
            found.append(Compiled(**json.loads(result.read_text())))
    return found


def _process(folder: Path, limit: float, target: Platform, environment: Mapping[str, str]) -> str:
    """Compiles what the folder describes, into it; returns why the process ended, should something be missing there."""
    added = {**environment_for(target), **environment}
    try:
        done = run_module(__name__, str(folder), time_limit=limit, environment=added)
    except TimeoutError:
        return f"compiling for {target.name} took longer than {limit:g} s"
    return f"the process that compiles for {target.name} ended: {last_line(done.stderr)}"


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _subject(fields: dict[str, Any]) -> Subject:
    given = fields["geometry"]
    pairs = tuple((low, high) for low, high in given["padding"])
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    plain["padding"] = pairs
    return Subject(**{**fields, "geometry": Geometry(**plain)})


def _main(folder: Path) -> None:
    whole = json.loads((folder / "jobs.json").read_text())
    target = platform(whole["platform"])
    for number, job in enumerate(whole["jobs"]):
        found = compile_here(Way.parse(job["way"]), _subject(job["subject"]), target)
        part = folder / f"{number}.part"
        part.write_text(json.dumps(dataclasses.asdict(found)))
        part.rename(folder / f"{number}.json")


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
