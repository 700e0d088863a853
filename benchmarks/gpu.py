"""Check the methods on an NVIDIA GPU, reveal their accumulation orders and precisions, and time them.

python benchmarks/gpu.py [--out FILE] [--budget SECONDS] [--batch IMAGES] [--quick]

The command writes one JSON file, and writes it again after every step: a run that is cut off keeps what it had. If a
section fails, the file says so, and the next section runs. Without a GPU the command makes a dry run, to see that it
works: tiny sizes on the CPU, whose times mean nothing. docs/accelerators.md explains the figures.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import torch

import jaxdw
from bridge import Case
from bridge._implementations import implementation, torch_
from bridge.accumulation import AccumulationOrder, divergence, reveal
from bridge.bench import jax_peers, torch_peers
from bridge.bench.copies import copy_milliseconds, copy_record
from bridge.bench.measure import first_line, measure
from bridge.bench.problems import INPUTS, Problem, Way, work
from bridge.bench.reference import Arrays, Check, convolve, exactly, gradients
from bridge.bench.schema import CopyRecord, RowRecord, SummaryRecord, compact_json, summaries
from bridge.bench.suites import DepthwiseLayer, layers_of
from bridge.case import DTYPES
from bridge.environment import environment
from bridge.files import check_writable, write_atomically
from bridge.numerics import (
    BFLOAT16,
    TF32,
    Arithmetic,
    ExactSum,
    error_bound,
    exact,
    exact_input_gradient,
    exact_kernel_gradient,
    same_bits,
)
from bridge.records import Record
from bridge.report.schema import OrderRecord

SCHEMA: Literal["jaxdw.gpu/2"] = "jaxdw.gpu/2"
RESULTS = Path(__file__).parent / "results"

#: (x, kernel, options): the methods are checked on these.
GEOMETRIES: Sequence[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = (
    ((2, 14, 14, 33), (3, 3, 1, 33), {"padding": 1}),
    ((2, 28, 28, 64), (3, 3, 1, 64), {"strides": 2, "padding": 1}),
    ((1, 28, 28, 40), (5, 5, 1, 40), {}),
    ((2, 14, 14, 96), (7, 7, 1, 96), {}),
    ((1, 20, 17, 12), (17, 17, 1, 12), {"padding": 8}),
    ((2, 9, 130, 6), (3, 3, 1, 12), {"padding": "VALID"}),
    ((2, 15, 13, 24), (3, 3, 1, 24), {"kernel_dilation": (2, 3)}),
    ((2, 7, 6, 24), (4, 3, 1, 24), {"input_dilation": (2, 3), "padding": 2}),
    ((2, 12, 10, 16), (3, 5, 1, 16), {"padding": "CIRCULAR", "strides": (2, 1)}),
    ((3, 50, 20), (4, 1, 40), {"padding": "CAUSAL"}),
    ((1, 6, 9, 8, 16), (3, 3, 3, 1, 16), {}),
    ((16, 56, 56, 32), (3, 3, 1, 32), {}),
)
QUICK = (((1, 5, 6, 9), (3, 3, 1, 9), {"padding": 1}),)
METHODS = (
    ("pallas", None),
    ("taps", None),
    ("grouped", None),
    ("grouped", "highest"),
    ("patches", None),
    ("patches", "highest"),
)

#: (x, kernel side, stride, dtype): the accumulation orders of these convolutions are revealed.
REVEALED = (
    ((2, 14, 14, 32), 3, 1, "float32"),
    ((2, 14, 14, 32), 3, 2, "float32"),
    ((1, 28, 28, 64), 5, 1, "float32"),
    ((2, 14, 14, 32), 3, 1, "bfloat16"),
    ((2, 14, 14, 32), 3, 1, "float16"),
    ((32, 14, 14, 128), 3, 1, "float32"),
)
OF_JAX = (
    "pallas",
    "grouped",
    "grouped[precision=high]",
    "grouped[precision=highest]",
    "taps",
    "rows",
    "patches",
    "patches[precision=highest]",
)

#: Methods of jaxdw that are timed against peers.
OURS = ("pallas", "taps")
#: PyTorch's peers: (memory format, precision of float32).
OF_TORCH = {
    "torch": ("contiguous", "ieee"),
    "torch[tf32]": ("contiguous", "tf32"),
    "torch.channels_last": ("channels_last", "ieee"),
    "torch.channels_last[tf32]": ("channels_last", "tf32"),
}
#: Layers that are compiled together. Rounds, and milliseconds of calls in each round; the same for a quick run.
CHUNK, ROUNDS, QUICK_ROUNDS = 8, (9, 8.0), (2, 1.0)
#: Positions whose dy is not zero: the sum of 512 products of 4095 and 2 is less than 2^24.
POSITIONS = 512
#: Bytes that the copies move: one half is read, one half is written.
COPIES = tuple(1 << power for power in range(22, 33))


class SectionRecord(Record):
    """One section of the run.

    Attributes:
      failed: the reason for a failure; empty if there was none.
      left_out: what was left out for lack of time, or for the reason that the entry gives.
    """

    name: str
    seconds: float
    failed: str = ""
    left_out: list[str] = pydantic.Field(default_factory=list)


class CorrectnessRecord(Record):
    """One result against the exact one.

    Attributes:
      quantity: "y", "dx" or "dkernel".
      misrounded: the number of elements that are not the exact result rounded once.
      bound_ratio: the greatest error over the bound of float32 sums in any order, rounded once; None if not finite.
      within: the first arithmetic whose bound holds for every element; empty if no bound does.
    """

    geometry: str
    dtype: str
    method: str
    quantity: str = ""
    elements: int = 0
    misrounded: int = 0
    bound_ratio: float | None = None
    within: str = ""
    failed: str = ""


class FingerprintRecord(Record):
    """The accumulation order and arithmetic of an implementation, compared with oneDNN on this machine's processor.

    Attributes:
      same_order: true if every element has the same tree as in oneDNN.
      same_bits: the share of elements, for normal random numbers, that have oneDNN's bits.
      divergence: the first step at which the two orders differ, in words.
    """

    geometry: str
    implementation: str
    order: OrderRecord | None = None
    same_order: bool | None = None
    same_bits: float | None = None
    divergence: str = ""
    failed: str = ""


class TimesRecord(RowRecord):
    """A row of `bridge.bench.schema`. Its milliseconds are per call, of many calls that were enqueued together.

    A way whose result is wrong is timed too: a peer that rounds its inputs to TF32 is a peer, and `wrong` says it.

    Attributes:
      copy_gigabytes_a_second: 10^9 bytes per second of the copy whose size is nearest to this row's bytes.
      fraction_of_copy: each way's bandwidth over the copy's, every operand counted once.
    """

    copy_gigabytes_a_second: float | None
    fraction_of_copy: dict[str, float]


class TimesSuiteRecord(Record):
    """A suite; `summaries` has, for each timed method of jaxdw, the ratios of its times to the peers' times."""

    suite: str
    rows: list[TimesRecord] = pydantic.Field(default_factory=list)
    summaries: dict[str, list[SummaryRecord]] = pydantic.Field(default_factory=dict)


class GpuReport(Record):
    """A whole run, or the part of it that was done when it was cut off.

    Attributes:
      dry_run: "dry run on cpu" if there was no GPU; else empty.
      without_torch: the reason why PyTorch did not compute on the GPU; empty if it did.
      call_microseconds: the time of a call that computes almost nothing, of many that are enqueued. No way is faster.
    """

    schema_: Literal["jaxdw.gpu/2"] = SCHEMA
    dry_run: str
    quick: bool
    batch: int
    budget_seconds: float
    without_torch: str = ""
    machine: dict[str, str] = pydantic.Field(default_factory=dict)
    sections: list[SectionRecord] = pydantic.Field(default_factory=list)
    copies: list[CopyRecord] = pydantic.Field(default_factory=list)
    call_microseconds: dict[str, float] = pydantic.Field(default_factory=dict)
    correctness: list[CorrectnessRecord] = pydantic.Field(default_factory=list)
    fingerprints: list[FingerprintRecord] = pydantic.Field(default_factory=list)
    suites: list[TimesSuiteRecord] = pydantic.Field(default_factory=list)


@dataclasses.dataclass
class Run:
    """A run in progress.

    Attributes:
      path: the file of the report.
      torch_device: where PyTorch computes; None if it cannot.
      until: when the current section must end, by `time.perf_counter`.
    """

    report: GpuReport
    path: Path
    torch_device: str | None
    until: float = math.inf

    @property
    def quick(self) -> bool:
        return self.report.quick

    @property
    def rounds(self) -> tuple[int, int, float]:
        """Rounds, seed, and milliseconds of the calls in each round."""
        rounds, milliseconds = QUICK_ROUNDS if self.quick else ROUNDS
        return rounds, 0, milliseconds

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.until

    def save(self) -> None:
        write_atomically(self.path, compact_json(json.loads(self.report.model_dump_json(by_alias=True)), depth=4))


def machine(run: Run) -> list[str]:
    """Record the card, its driver, and versions."""
    run.report.machine = {"device": jax.devices()[0].device_kind} | environment()
    run.report.machine["torch cuda"] = str(torch.version.cuda)
    run.report.machine["torch cudnn"] = str(torch.backends.cudnn.version())
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.memory,power.limit"
    with contextlib.suppress(FileNotFoundError):
        asked = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        told = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
        run.report.machine["nvidia-smi"] = told.stdout.strip() or told.stderr.strip()
    return []


def copies(run: Run) -> list[str]:
    """Time copies by XLA and PyTorch, and a call that copies almost nothing."""
    run.report.call_microseconds = {name: ms * 1e3 for name, ms in _copy_times(run, 8).items()}
    sizes = COPIES[:2] if run.quick else COPIES
    for done, nbytes in enumerate(sizes):
        if run.late:
            return [f"copies of {size} bytes" for size in sizes[done:]]
        run.report.copies.append(copy_record(nbytes, _copy_times(run, nbytes)))
        run.save()
    return []


def correctness(run: Run) -> list[str]:
    """Hold each method's y and gradients to the exact sums, with the bounds of `bridge.numerics`."""
    geometries = QUICK if run.quick else GEOMETRIES
    dtypes = ("float32",) if run.quick else ("float32", "bfloat16", "float16")
    for done, (x_shape, kernel_shape, options) in enumerate(geometries):
        if run.late:
            return [_words(*rest) for rest in geometries[done:]]
        cases = {dtype: _case(x_shape, kernel_shape, options, DTYPES[dtype]) for dtype in dtypes}
        jobs = {
            (dtype, *method): (_with_gradients(options, *method), (case.x, case.kernel, dy))
            for dtype, (case, dy) in cases.items()
            for method in METHODS
            if method[1] is None or dtype == "float32"
        }
        programs = compiled({key: (program, *arrays) for key, (program, arrays) in jobs.items()})
        for dtype, (case, dy) in cases.items():
            sums = {
                "y": exact(case),
                "dx": exact_input_gradient(case, dy),
                "dkernel": exact_kernel_gradient(case, dy),
            }
            judges = {quantity: _judge(total) for quantity, total in sums.items()}
            for key, program in programs.items():
                if key[0] == dtype:
                    name = key[1] if key[2] is None else f"{key[1]}[precision={key[2]}]"
                    told = {"geometry": _words(x_shape, kernel_shape, options), "dtype": dtype, "method": name}
                    run.report.correctness += _judged(program, (case.x, case.kernel, dy), judges, told)
        run.save()
    return []


def fingerprints(run: Run) -> list[str]:
    """Reveal the orders and precisions of every implementation on the card, and compare them with oneDNN's."""
    shapes = [((1, 5, 5, 4), 3, 1, "float32")] if run.quick else REVEALED
    for done, (x_shape, side, stride, dtype) in enumerate(shapes):
        if run.late:
            return [_words(*rest) for rest in shapes[done:]]
        options = {"strides": stride, "padding": side // 2}
        case, _ = _case(x_shape, (side, side, 1, x_shape[-1]), options, DTYPES[dtype])
        onednn = implementation("torch.conv2d")
        expected, theirs = reveal(onednn, case), onednn.run(case)
        subjects = {onednn.name: onednn.run, **_subjects(run)}
        for number, (name, subject) in enumerate(subjects.items()):
            if run.late:
                return [*list(subjects)[number:], *(_words(*rest) for rest in shapes[done + 1 :])]
            record = FingerprintRecord(geometry=f"{_words(x_shape, side, options)}, {dtype}", implementation=name)
            try:
                order = reveal(subject, case)
                record.order = OrderRecord.model_validate(order.to_json() | {"implementation": name})
                record.same_order = _same_trees(order, expected)
                record.same_bits = float(same_bits(subject(case), theirs).mean())
                record.divergence = divergence(expected, dataclasses.replace(order, implementation=name))
            except Exception as error:  # a library raises any kind, and the others still count
                record.failed = first_line(error)
            run.report.fingerprints.append(record)
            run.save()
    return []


def times(run: Run, suite: str) -> list[str]:
    """Check the layers of a suite on whole numbers that TF32 cannot hold, then time them in turns."""
    record = TimesSuiteRecord(suite=suite)
    run.report.suites.append(record)
    known = {DepthwiseLayer.parse("6x5x4:3:1"): ("none",)} if run.quick else layers_of(suite)
    layers = sorted(known, key=lambda layer: -work(suite, layer, 1)[0])  # so that the small layers are left out, if any
    left_out = []
    for start in range(0, len(layers), CHUNK):
        if run.late:
            return left_out + [str(layer) for layer in layers[start:]]
        chunk = layers[start : start + CHUNK]
        jobs = {(layer, name): job for layer in chunk for name, job in _jobs(suite, layer, run.report.batch).items()}
        programs = compiled(jobs)
        for number, layer in enumerate(chunk, start):
            if run.late:
                return left_out + [str(layer) for layer in layers[number:]]
            of_layer = {name: program for (of, name), program in programs.items() if of == layer}
            try:
                record.rows.append(_times_of(run, suite, layer, known[layer], of_layer))
            except Exception as error:  # a library or the card raises any kind, such as out of memory
                left_out.append(f"{layer}: {first_line(error)}")
            record.summaries = {name: summaries(record.rows, name) for name in OURS}
            run.save()
    return left_out


#: Each section, and its share of the budget. The next sections may use what one leaves.
SECTIONS: dict[str, tuple[Callable[[Run], list[str]], float]] = {
    "machine": (machine, 0.02),
    "copies": (copies, 0.05),
    "correctness": (correctness, 0.18),
    "fingerprints": (fingerprints, 0.15),
    "forward": (functools.partial(times, suite="layers"), 0.28),
    "gradients": (functools.partial(times, suite="gradients"), 0.32),
}


def run_sections(run: Run) -> None:
    """Run every section in turn, also after a failure."""
    began, share = time.perf_counter(), 0.0
    for name, (section, part) in SECTIONS.items():
        share += part
        run.until = began + share * run.report.budget_seconds
        start, failed, left_out = time.perf_counter(), "", []
        try:
            left_out = section(run)
        except Exception as error:  # a compiler, a library or the card raises any kind
            failed = first_line(error)
        seconds = time.perf_counter() - start
        run.report.sections.append(SectionRecord(name=name, seconds=seconds, failed=failed, left_out=left_out))
        run.save()
        print(f"{name}: {seconds:.0f} s{', failed: ' * bool(failed)}{failed}", file=sys.stderr)


def compiled(jobs: Mapping[Any, tuple[Callable[..., Any], *tuple[Any, ...]]]) -> dict[Any, Any]:
    """Compile each job (a function, and arrays or their shapes) on all processors; return the program or the error."""

    def program(job: tuple[Any, ...]) -> Any:
        try:
            return jax.jit(job[0]).lower(*job[1:]).compile()
        except Exception as error:  # the compiler raises any kind
            return error

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(program, jobs.values())))


def _words(x_shape: Sequence[int], kernel: Any, *options: Any) -> str:
    return f"x {tuple(x_shape)}, kernel {kernel}, " + ", ".join(map(str, options))


def _case(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], options: Mapping[str, Any], dtype: np.dtype
) -> tuple[Case, np.ndarray]:
    """Return a case of normal random numbers, and a dy."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.standard_normal(shape).astype(dtype) for shape in (x_shape, kernel_shape))
    case = Case(x, kernel, **options)
    return case, rng.standard_normal(case.geometry.output_shape).astype(dtype)


def _with_gradients(options: Mapping[str, Any], method: str, precision: Any) -> Callable[..., Any]:
    return jax_peers.with_gradients(
        lambda x, kernel: jaxdw.depthwise_conv(x, kernel, method=method, precision=precision, **options)
    )


def _judge(total: ExactSum) -> Callable[[np.ndarray], dict[str, Any]]:
    """Return a function that compares a result with the exact sum."""
    once = Arithmetic.of(total.value.dtype, flushes_subnormals=True)
    known = {"float32 sums, rounded once": once}
    if total.value.dtype == np.float32:
        known["inputs cut to TF32"] = dataclasses.replace(once, input=TF32, input_truncated=True)
        known["inputs rounded to bfloat16"] = dataclasses.replace(once, input=BFLOAT16)
    else:
        rounded = dataclasses.replace(once, product=once.output, accumulator=once.output)
        known[f"partial sums rounded to {once.output.name}"] = rounded
    allowed = {name: error_bound(each, total) + total.reference_error for name, each in known.items()}

    def judged(result: np.ndarray) -> dict[str, Any]:
        error = np.abs(result.astype(np.float64) - total.reference)
        ratio = np.divide(error, allowed["float32 sums, rounded once"], out=np.zeros_like(error), where=error != 0)
        worst = float(ratio.max(initial=0.0))
        return {
            "elements": result.size,
            "misrounded": int((~same_bits(result, total.value)).sum()),
            "bound_ratio": worst if math.isfinite(worst) else None,
            "within": next((name for name, most in allowed.items() if (error <= most).all()), ""),
        }

    return judged


def _judged(
    program: Any, arrays: Sequence[np.ndarray], judges: Mapping[str, Callable[..., Any]], told: Mapping[str, str]
) -> Iterator[CorrectnessRecord]:
    """Yield the record of y and of each gradient; or one record if the program could not be compiled, or failed."""
    try:
        if isinstance(program, Exception):
            raise program
        results = [np.asarray(each) for each in program(*arrays)]
    except Exception as error:  # a compiler or the card raises any kind
        yield CorrectnessRecord(**told, failed=first_line(error))
        return
    for (quantity, judge), result in zip(judges.items(), results):
        yield CorrectnessRecord(**told, quantity=quantity, **judge(result))


def _subjects(run: Run) -> dict[str, Callable[[Case], np.ndarray]]:
    """Return every implementation to reveal; of PyTorch its own kernel and cuDNN's, if it computes on the card."""
    names = [f"jax.{name}" for name in (OF_JAX[:2] if run.quick else OF_JAX)]
    found: dict[str, Callable[[Case], np.ndarray]] = {name: implementation(name).run for name in names}
    if run.torch_device is None:
        return found
    for kernel in ("auto", "native", "cudnn"):
        for name, (form, precision) in list(OF_TORCH.items())[: 1 if run.quick else None]:
            setting = {"device": run.torch_device, "form": form, "precision": precision, "kernel": kernel}
            found[f"{name}, {kernel} kernel, on {run.torch_device}"] = functools.partial(_torch_on, **setting)
    return found


def _torch_on(case: Case, *, device: str, form: str, precision: str, kernel: str) -> np.ndarray:
    """Run `F.conv2d` of a case on a device, in a memory format; return y channels last, as the case has it."""
    x = torch_.to_tensor(np.moveaxis(case.x, -1, 1))
    weight = torch_.to_tensor(np.moveaxis(case.kernel, (-1, -2), (0, 1)))
    x, weight = (each.to(device).contiguous(memory_format=torch_peers.FORMS[form]) for each in (x, weight))
    with _torch_setting(precision, kernel), torch.inference_mode():
        y = torch_.conv(x, weight, None, case.geometry)
    return torch_.to_numpy(y.movedim(1, -1).cpu())


@contextlib.contextmanager
def _torch_setting(precision: str, kernel: str = "auto") -> Iterator[None]:
    """Set the precision of float32 convolutions on the card, and choose the depthwise kernel."""
    of_all, of_convolutions = torch.backends.cudnn, torch.backends.cudnn.conv
    before = of_convolutions.fp32_precision, of_all.depthwise_kernel
    try:
        of_convolutions.fp32_precision, of_all.depthwise_kernel = precision, kernel
        yield
    finally:
        of_convolutions.fp32_precision, of_all.depthwise_kernel = before


def _same_trees(order: AccumulationOrder, other: AccumulationOrder) -> bool:
    """Return true if every element has the same tree in both."""
    pairs = {(int(a), int(b)) for a, b in zip(order.labels.ravel(), other.labels.ravel())}
    return all(min(a, b) >= 0 and order.trees[a] == other.trees[b] for a, b in pairs)


def _copy_times(run: Run, nbytes: int) -> dict[str, float]:
    """Return the milliseconds of a copy that reads half of the bytes and writes the other half."""
    ways = [jax_peers.copy_way(nbytes // 8, waits=False)]
    if run.torch_device is not None:
        ways.append(torch_peers.copy_way(nbytes // 8, run.torch_device))
    return copy_milliseconds(ways, *run.rounds)


def _whole(
    xp: Any, suite: str, layer: DepthwiseLayer, batch: int, images: Any, turn: Any = 0, **where: Any
) -> dict[str, Any]:
    """Return x, w and, for gradients, dy of some of the images, the same in NumPy, JAX and PyTorch.

    They are whole numbers whose sums float32 holds. x has one bit more than TF32 holds. dy is zero except at some
    positions of the first and the last image, since dw sums over all positions.
    """
    g = layer.geometry(batch)

    def numbers(images: Any, shape: tuple[int, ...], modulus: int) -> Any:
        size = math.prod(shape[1:])
        index = images.reshape(-1, 1) * size + xp.arange(size, dtype=xp.int32, **where)[None]
        found = (index + 1000 * turn) % modulus - modulus // 2
        return xp.asarray(found, dtype=xp.float32).reshape(-1, *shape[1:])

    one = xp.arange(1, dtype=xp.int32, **where)
    arrays = {"x": numbers(images, g.x_shape, 8191), "w": numbers(one, (1, *g.kernel_shape), 7)[0]}
    if suite == "gradients":
        height, width = g.output_spatial
        every = -(-2 * height * width // POSITIONS)
        chosen = xp.arange(height * width, dtype=xp.int32, **where).reshape(1, height, width, 1) % every == 0
        chosen = chosen & (images.reshape(-1, 1, 1, 1) % _last(batch) == 0)
        dy = numbers(images, g.output_shape, 5)
        arrays["dy"] = xp.where(chosen, dy, xp.zeros_like(dy))
    return arrays


def _last(batch: int) -> int:
    """Return the index of the last image, at least 1: the step of a slice that takes the first and the last image."""
    return max(1, batch - 1)


def _jobs(suite: str, layer: DepthwiseLayer, batch: int) -> dict[str, tuple[Any, ...]]:
    """Return what JAX has to compile for a layer: our methods, `lax`, and the function that makes the inputs."""

    def inputs(turn: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_whole(jnp, suite, layer, batch, jnp.arange(batch, dtype=jnp.int32), turn).values())

    computes = {name: jax_peers.convolution(layer, name) for name in OURS}
    computes["lax.grouped"] = jax_peers.grouped(layer)
    computes["lax.grouped[highest]"] = jax_peers.grouped(layer, "highest")
    g = layer.geometry(batch)
    shapes = (g.x_shape, g.kernel_shape, g.output_shape)[: 3 if suite == "gradients" else 2]
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    wrap = jax_peers.with_gradients if suite == "gradients" else lambda compute: lambda x, w: (compute(x, w),)
    return {"inputs": (inputs, jnp.int32(0))} | {name: (wrap(compute), *given) for name, compute in computes.items()}


def _times_of(
    run: Run, suite: str, layer: DepthwiseLayer, networks: tuple[str, ...], programs: Mapping[str, Any]
) -> TimesRecord:
    """Check the first and the last image and dw of every way, then time all ways; return the row."""
    batch, (rounds, seed, fill) = run.report.batch, run.rounds
    inputs = [programs["inputs"](jnp.int32(turn)) for turn in range(INPUTS)]
    ways = [_way_of_jax(name, program, inputs, batch) for name, program in programs.items() if name != "inputs"]
    if run.torch_device is not None:
        ways += [_way_of_torch(name, run.torch_device, suite, layer, batch, *how) for name, how in OF_TORCH.items()]
    each = _problem(suite, layer, networks, batch)
    assert each.nbytes is not None
    records = measure(each, ways, rounds, seed, fill=fill, time_wrong=True)
    copy = min(run.report.copies, key=lambda copy: abs(math.log(copy.nbytes / each.nbytes)), default=None)
    reached = {way.name: each.nbytes / way.median / 1e6 / copy.best for way in records if copy and way.median}
    return TimesRecord(
        name=each.name,
        networks=networks,
        batch=batch,
        nbytes=each.nbytes,
        flops=each.flops,
        ways=records,
        copy_gigabytes_a_second=copy.best if copy else None,
        fraction_of_copy=reached,
    )


def _problem(suite: str, layer: DepthwiseLayer, networks: tuple[str, ...], batch: int) -> Problem:
    """Return a problem whose inputs are numbers of turns: each framework makes the arrays of a turn on the card."""
    turns = [{"turn": np.array(turn)} for turn in range(INPUTS)]
    nbytes, flops = work(suite, layer, batch)
    checks = [Check(turns[0], exactly(_expected(suite, layer, batch)))]
    return Problem(suite, str(layer), networks, layer, turns, lambda: checks, nbytes, flops)


def _way_of_jax(name: str, program: Any, inputs: Sequence[tuple[jax.Array, ...]], batch: int) -> Way:
    def start(arrays: Arrays) -> Callable[[], Any]:
        if isinstance(program, Exception):
            raise program
        given = inputs[int(arrays["turn"])]
        return lambda: program(*given)

    def fetch(results: Any) -> dict[str, np.ndarray]:
        return dict(zip(("y", "dx", "dw"), map(np.asarray, _ends(results, batch))))

    return Way(name, start, fetch, jax.block_until_ready)


def _way_of_torch(
    name: str, device: str, suite: str, layer: DepthwiseLayer, batch: int, form: str, precision: str
) -> Way:
    compute = torch_peers.convolution(layer)
    made = torch_peers.with_gradients(compute) if suite == "gradients" else torch_peers.forward(compute)

    def start(arrays: Arrays) -> Callable[[], Any]:
        images = torch.arange(batch, dtype=torch.int32, device=device)
        whole = _whole(torch, suite, layer, batch, images, int(arrays["turn"]), device=device)
        run = made({name: torch_peers.in_form(name, each, form) for name, each in whole.items()})

        def call() -> Any:
            with _torch_setting(precision):
                return run()

        return call

    def fetch(results: Any) -> dict[str, np.ndarray]:
        return torch_peers.fetched(_ends(results, batch))

    return Way(name, start, fetch, lambda _: torch_peers.synchronize(device))


def _ends(results: Sequence[Any], batch: int) -> list[Any]:
    """Return the first and the last image of y and dx, and the whole of dw."""
    return [each if number == 2 else each[:: _last(batch)] for number, each in enumerate(results)]


def _expected(suite: str, layer: DepthwiseLayer, batch: int) -> dict[str, np.ndarray]:
    """Return the results that `_ends` takes, by NumPy. The other images add nothing to dw."""
    arrays = _whole(np, suite, layer, batch, np.arange(0, batch, _last(batch), np.int32))
    expected = {"y": convolve(arrays["x"], arrays["w"], layer)}
    if suite == "gradients":
        expected["dx"], expected["dw"] = gradients(arrays["x"], arrays["w"], arrays["dy"], layer)
    return expected


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the JSON file; by default in benchmarks/results, by the card's name")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds, of which each section has its share")
    parser.add_argument("--batch", type=int, default=128, help="images at once in what is timed")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    given = parser.parse_args(arguments)
    for name, value in (("--budget", given.budget), ("--batch", given.batch)):
        if not 1 <= value < math.inf:
            parser.error(f"`{name}` is {value}, expected 1 or more")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX leaves PyTorch no memory
    dry_run = "" if jax.default_backend() == "gpu" else f"dry run on {jax.default_backend()}"
    quick = given.quick or bool(dry_run)
    path = given.out or _default_path(dry_run)
    if quick and path.resolve().is_relative_to(RESULTS.resolve()):
        parser.error(f"`--out` is {path}, expected a file elsewhere: {dry_run or 'a quick run'} is no result")
    try:
        check_writable(path, "jaxdw.gpu")
    except OSError as error:
        parser.error(f"`--out` is {path}: {error}")
    device, why_not = _torch_device(dry_run)
    report = GpuReport(
        dry_run=dry_run,
        quick=quick,
        batch=2 if quick else given.batch,
        budget_seconds=given.budget,
        without_torch=why_not,
    )
    run = Run(report, path, device)
    run_sections(run)
    print(f"{dry_run or report.machine.get('device')}: wrote {path}", file=sys.stderr)
    return 1 if any(section.failed for section in report.sections) else 0


def _default_path(dry_run: str) -> Path:
    if dry_run:
        return Path("gpu-dry-run.json")
    name = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    return RESULTS / f"{name}.json"


def _torch_device(dry_run: str) -> tuple[str | None, str]:
    """Return where PyTorch computes (the processor in a dry run), or the reason why it cannot use the card."""
    if dry_run:
        return "cpu", ""
    if torch.cuda.is_available():
        return "cuda", ""
    return None, f"PyTorch {torch.__version__} finds no card: a CUDA build of it must be installed"


if __name__ == "__main__":
    sys.exit(main())
