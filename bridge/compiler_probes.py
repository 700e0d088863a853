"""A check of JAX's compiler: small programs with known exact integer results, run in child processes.

A checker that says "bug" or "rounding" must know when the compiler itself is wrong. Each probe is a program on small
integers, compiled by `jax.jit` and run operation by operation, against the same integers computed by NumPy. There are
probes for known bugs of JAX's compiler, and for the operations that jaxdw rests on. They run in a child process: a
crash, a signal and a hang are findings like a wrong number, and the next probe runs in a new child.

`python -m bridge.compiler_probes` runs all of them; with names, it is the child.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bridge.process import Overtime, last_line, run_module

#: A function for `jax.jit`, its arguments, and the exact result.
Program = tuple[Callable[..., Any], tuple[np.ndarray, ...], np.ndarray]

#: Processor seconds after which a probe counts as hanging, whatever the load. A sound probe takes less than one.
TIME_LIMIT = 20

#: Seconds after which a child that uses no processor time counts as hanging.
CHILD_TIME_LIMIT = 300

#: Bytes of private memory that a child may have, with 64 MiB for each core: a compiler that never ends allocates on.
MEMORY_LIMIT = (2 << 30) + (64 << 20) * (os.cpu_count() or 1)

#: Probes that share a child, which takes most of a second to start.
BATCH = 12

#: What `python -m` starts as the child.
_MODULE = "bridge.compiler_probes"

_AVOID_YNN = "jaxlib 0.10.1 or 0.12.0, or XLA_FLAGS='--xla_cpu_experimental_ynn_fusion_type='"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A small program that must give exact integers.

    Attributes:
      name: what it computes.
      program: makes the function, the arguments and the exact result.
      quick: whether `jaxdw parity` runs it; `jaxdw doctor` runs all.
      issue: the upstream issue, for a known bug.
      affected: the versions that are wrong.
      avoid: the version or the flag that avoids it.
      tolerated: `jaxdw doctor` names it and does not fail: no version that is right elsewhere is right here, and jaxdw
        makes no such program.
    """

    name: str
    program: Callable[[], Program]
    quick: bool = False
    issue: str = ""
    affected: str = ""
    avoid: str = ""
    tolerated: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a probe: `wrong` says how it is wrong, `skipped` why it could not run; a right one has neither."""

    name: str
    wrong: str = ""
    skipped: str = ""


def _ints(*shape: int, low: int = -3, high: int = 3, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).integers(low, high + 1, shape).astype(dtype)


def _wide(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(np.int64) for array in arrays]


def _on_integers(
    function: Callable[[Any], Callable[..., Any]], *shapes: tuple[int, ...], dtype: str = "float32", most: int = 3
) -> Callable[[], Program]:
    """Return a program on integers up to `most`, written once for `jax.numpy` and for NumPy in 64 bits."""

    def program() -> Program:
        import jax.numpy as jnp

        arrays = [_ints(*shape, low=-most, high=most, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
        return function(jnp), tuple(arrays), function(np)(*_wide(*arrays))

    return program


def _rows_times_matrix() -> Program:
    rows = np.zeros((32_770, 3), np.float32)
    rows[:, 0] = np.arange(len(rows)) % 1000
    return _squares_of_rows(lambda x: x, rows, rows.astype(np.int64))


def _layer_then_rows_times_matrix() -> Program:
    import jaxdw

    x, kernel = _ints(1, 33_000, 3), _ints(3, 1, 3)
    layer = functools.partial(jaxdw.depthwise_conv, kernel=kernel, padding=1)
    return _squares_of_rows(lambda x: layer(x)[0], x, _convolved(*_wide(x, kernel), strides=(1,), padding=((1, 1),))[0])


def _squares_of_rows(rows: Callable[[Any], Any], x: np.ndarray, exact: np.ndarray) -> Program:
    """Return the sum of the squares of matrix @ row, per row: vmapped, which XLA hands to its library in blocks."""
    import jax
    import jax.numpy as jnp

    matrix = np.array([[1, 2, 0], [0, 1, -1], [1, 0, 1]], np.float32)
    squares = jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))
    return lambda x: squares(rows(x)), (x,), ((exact @ matrix.T.astype(np.int64)) ** 2).sum(-1)


def _chain_of_tensors() -> Program:
    import jax
    import jax.numpy as jnp

    def contracted(*tensors):
        joined = functools.reduce(lambda a, b: jnp.tensordot(a, b, ((a.ndim - 1,), (0,))), tensors)
        return jnp.sum(joined * joined)

    def gradients(*tensors):
        return jnp.stack(jax.grad(contracted, range(10))(*tensors))

    return gradients, (np.ones((2, 2, 2), np.float32),) * 10, np.full((10, 2, 2, 2), 2**28)


def _shifted_in_place() -> Program:
    from jax import lax

    def shifted(x):
        base = x + np.int32(1)
        return lax.dynamic_update_slice(base, base[:3], (1, 0, 0)).reshape(1, 4, 1)

    return shifted, (np.arange(4, dtype=np.int32).reshape(4, 1, 1),), np.array([1, 1, 2, 3]).reshape(1, 4, 1)


def _padded_then_sliced() -> Program:
    import jax.numpy as jnp
    from jax import lax

    def blocks(x):
        x = jnp.pad(x, ((0, 1), (0, 0)))

        def outer(_, i):
            block = lax.dynamic_slice(x, (i * 19, 0), (23, 4))

            def inner(_, j):
                return None, lax.dynamic_slice(block, (0, j * 2), (23, 2))

            return None, lax.scan(inner, None, jnp.arange(2))[1]

        return lax.scan(outer, None, jnp.arange(3))[1]

    x = _ints(60, 4)
    padded = np.pad(x, ((0, 1), (0, 0))).astype(np.int64)
    exact = np.array([[padded[i * 19 : i * 19 + 23, j * 2 : j * 2 + 2] for j in range(2)] for i in range(3)])
    return blocks, (x,), exact


def _arctangent() -> Program:
    import jax.numpy as jnp

    x = np.linspace(-3, 3, 400, dtype=np.float32)
    scaled = np.arctan(x.astype(np.float64)) * 1024
    clear = np.abs(scaled - np.floor(scaled) - 0.5) > 0.1  # no rounding error of arctan moves it to another integer
    return lambda x: jnp.round(jnp.arctan(x) * 1024), (x[clear],), np.rint(scaled[clear]).astype(np.int64)


def _sums(axis: int | tuple[int, ...] | None) -> Callable[[], Program]:
    return _on_integers(lambda np: lambda x: np.sum(x, axis=axis), (5, 33, 40, 17))


def _gathered() -> Program:
    import jax.numpy as jnp

    x, rows, columns = _ints(41, 30, 6), _ints(50, low=0, high=40, dtype="int32"), _ints(50, low=0, high=29).astype("i")
    exact = x[rows, columns] + x[0][columns]
    return lambda x, i, j: x[i, j] + jnp.take(x[0], j, axis=0), (x, rows, columns), exact.astype(np.int64)


def _scanned() -> Program:
    import jax.numpy as jnp
    from jax import lax

    def recurrence(x):
        def step(carry, row):
            carry = jnp.where(carry > 0, -carry, carry + 7) + row
            return carry, carry

        return lax.scan(step, x[0], x)[1]

    x = _ints(20, 7)
    carry, exact = x[0].astype(np.int64), []
    for row in x.astype(np.int64):
        carry = np.where(carry > 0, -carry, carry + 7) + row
        exact.append(carry)
    return recurrence, (x,), np.array(exact)


def _looped() -> Program:
    """Return a loop that writes rows one after the other, as the loops over taps and windows do."""
    from jax import lax

    def moved(x):
        def write(i, out):
            row = lax.dynamic_slice(x, (19 - i, 0), (1, 8)) + lax.dynamic_slice(out, (i, 0), (1, 8))
            return lax.dynamic_update_slice(out, row, (i, 0))

        return lax.fori_loop(0, 20, write, x)

    x = _ints(20, 8)
    return moved, (x,), (x[::-1] + x).astype(np.int64)


def _lax_convolution(groups: int, strides: tuple[int, int], dilation: int) -> Program:
    from jax import lax

    x, kernel = _ints(2, 15, 16, 8), _ints(3, 3, 8 // groups, 8)
    span = 2 * dilation

    def conv(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, strides, ((1, 1), (1, 1)), (1, 1), (dilation,) * 2, ("NHWC", "HWIO", "NHWC"), groups
        )

    wide, k = _wide(x, kernel)
    padded = np.pad(wide, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = padded.shape[1] - span, padded.shape[2] - span
    exact = np.zeros((2, -(-height // strides[0]), -(-width // strides[1]), 8), np.int64)
    size = 8 // groups
    for i, j, g in np.ndindex(3, 3, groups):
        own = slice(g * size, (g + 1) * size)
        rows = slice(i * dilation, i * dilation + height, strides[0])
        columns = slice(j * dilation, j * dilation + width, strides[1])
        exact[..., own] += padded[:, rows, columns, own] @ k[i, j, :, own]
    return conv, (x, kernel), exact


def _cropped_and_padded(groups: int) -> Program:
    """Return a convolution of which two rows are cut off at one end, and a row of zeros is added at the other."""
    from jax import lax

    x, kernel = _ints(1, 15, 6, 8), _ints(3, 3, 8 // groups, 8)

    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), ((-2, 1), (0, 0)), None, None, numbers, groups)

    wide, k = _wide(np.pad(x[:, 2:], ((0, 0), (0, 1), (0, 0), (0, 0))), kernel)
    if groups == 8:
        return conv, (x, kernel), _convolved(wide, k, strides=(1, 1), padding=((0, 0), (0, 0)))
    return conv, (x, kernel), sum(wide[:, i : i + 12, j : j + 4] @ k[i, j] for i, j in np.ndindex(3, 3))


def _padding_alone() -> Program:
    """Return a depthwise convolution whose only window along an axis reads nothing but padding."""
    from jax import lax

    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 3), ((0, 0), (1, 1)), None, None, numbers, 32)

    return conv, (_ints(1, 5, 1, 32), _ints(1, 1, 1, 32)), np.zeros((1, 5, 1, 32), np.int64)


def _taps(x: np.ndarray, kernel: np.ndarray, strides, padding) -> Iterator[tuple[tuple, tuple]]:
    """Yield each tap's index, and the slices of the padded input that it multiplies."""
    sizes = [n + low + high for n, (low, high) in zip(x.shape[1:-1], padding)]
    for tap in np.ndindex(kernel.shape[:-2]):
        windows = zip(tap, sizes, kernel.shape[:-2], strides)
        yield tap, (slice(None), *(slice(t, n - k + 1 + t, s) for t, n, k, s in windows))


def _convolved(x: np.ndarray, kernel: np.ndarray, *, strides, padding) -> np.ndarray:
    """Return the depthwise convolution with multiplier 1, in integers."""
    wide = np.pad(x, ((0, 0), *padding, (0, 0)))
    return sum(wide[where] * kernel[tap][0] for tap, where in _taps(x, kernel, strides, padding))


def _gradients(x: np.ndarray, kernel: np.ndarray, dy: np.ndarray, *, strides, padding) -> np.ndarray:
    """Return the gradients of sum(dy * y) by the input and the kernel, in integers, raveled and joined."""
    wide = np.pad(x, ((0, 0), *padding, (0, 0)))
    dx, dk = np.zeros_like(wide), np.zeros_like(kernel)
    for tap, where in _taps(x, kernel, strides, padding):
        dx[where] += dy * kernel[tap][0]
        dk[tap][0] = (wide[where] * dy).sum(tuple(range(dy.ndim - 1)))
    inner = tuple(slice(low, low + n) for n, (low, _) in zip(x.shape[1:-1], padding))
    return np.concatenate([dx[(slice(None), *inner)].ravel(), dk.ravel()])


_PADDING = ((1, 2), (2, 1))


def _method(method: str, kernel_size: tuple[int, int], strides: tuple[int, int]) -> Program:
    import jaxdw

    x, kernel = _ints(2, 17, 19, 6), _ints(*kernel_size, 1, 6)
    layer = functools.partial(jaxdw.depthwise_conv, strides=strides, padding=_PADDING, method=method)
    return layer, (x, kernel), _convolved(*_wide(x, kernel), strides=strides, padding=_PADDING)


def _method_gradients(method: str) -> Program:
    import jax
    import jax.numpy as jnp

    import jaxdw

    x, kernel, strides = _ints(2, 9, 11, 6), _ints(2, 3, 1, 6), (1, 2)
    dy = _ints(*_convolved(*_wide(x, kernel), strides=strides, padding=_PADDING).shape, seed=1)

    def both(x, kernel, dy):
        conv = functools.partial(jaxdw.depthwise_conv, strides=strides, padding=_PADDING, method=method)
        return jnp.concatenate([g.ravel() for g in jax.vjp(conv, x, kernel)[1](dy)])

    return both, (x, kernel, dy), _gradients(*_wide(x, kernel, dy), strides=strides, padding=_PADDING)


#: The known bugs first, then what jaxdw rests on.
PROBES = (
    Probe(
        "rows times a matrix, squared and summed, under vmap",
        _rows_times_matrix,
        quick=True,
        issue="jax-ml/jax#39103",
        affected="jaxlib 0.10.2",
        avoid=_AVOID_YNN,
    ),
    Probe(
        "the same behind a depthwise convolution",
        _layer_then_rows_times_matrix,
        quick=True,
        issue="jax-ml/jax#39103",
        affected="jaxlib 0.10.2",
        avoid=_AVOID_YNN,
    ),
    Probe(
        "a sum of products in rank 7",
        _on_integers(lambda np: lambda a, b: np.sum(a * b, axis=3), *[(3, 1, 2, 2, 8, 8, 8)] * 2),
        quick=True,
        issue="jax-ml/jax#40412",
        affected="jaxlib 0.10.2",
        avoid=_AVOID_YNN,
    ),
    Probe(
        "a broadcast product in rank 8, summed",
        _on_integers(
            lambda np: lambda w, t: np.sum(w[..., None, None, None, None, None] * t, axis=2),
            (2, 2, 6),
            (2, 2, 6, 9, 9, 9, 9, 9),
        ),
        issue="jax-ml/jax#39257",
        affected="jaxlib 0.10.2 and 0.11.0",
        avoid=_AVOID_YNN,
    ),
    Probe(
        "the gradients of a chain of ten tensors",
        _chain_of_tensors,
        issue="openxla/xla#41173",
        affected="jaxlib 0.9.1 to 0.10.0, and 0.11.2",
        avoid="jaxlib 0.10.1 or 0.12.0",
    ),
    Probe(
        "a shifted slice written into its own array, reshaped",
        _shifted_in_place,
        issue="openxla/xla#49176",
        affected="every jaxlib tried, 0.8.3 to 0.12.0",
        avoid="XLA_FLAGS=--xla_disable_hlo_passes=algsimp, which makes programs slower",
        tolerated=True,
    ),
    *(
        Probe(
            f"a convolution in {groups} groups, cropped at one end and padded at the other",
            functools.partial(_cropped_and_padded, groups),
            issue="openxla/xla#48713",
            affected="jaxlib 0.8.2, 0.10.1 and 0.10.2",
            avoid="jaxlib 0.12.0, or lax.slice and lax.pad before the convolution",
            tolerated=True,
        )
        for groups in (1, 8)
    ),
    Probe(
        "a depthwise convolution of padding alone",
        _padding_alone,
        issue="jax-ml/jax#39264",
        affected="jaxlib 0.10.0 and 0.10.1",
        avoid="jaxlib 0.10.2, or XLA_FLAGS='--xla_cpu_experimental_ynn_fusion_type='",
        tolerated=True,
    ),
    Probe(
        "padding read back through two scans",
        _padded_then_sliced,
        issue="jax-ml/jax#39120",
        affected="reported in July 2026; not seen on the machine where jaxdw is made",
    ),
    Probe(
        "arctan, scaled and rounded",
        _arctangent,
        issue="jax-ml/jax#39352",
        affected="reported for jaxlib 0.10.2; not seen on the machine where jaxdw is made",
        avoid="jaxlib 0.10.1",
    ),
    *(
        Probe(
            f"products and sums, {t}",
            _on_integers(lambda np: lambda a, b, c: a * b + c - a * c * b, *[(37, 53)] * 3, dtype=t),
        )
        for t in ("int32", "float32")
    ),
    *(
        Probe(
            f"dots, {t}",
            _on_integers(lambda np: lambda a, b, v: (a @ b) @ v, (65, 48), (48, 57), (57,), dtype=t),
            quick=t == "float32",
        )
        for t in ("int32", "float32")
    ),
    Probe("a dot of 33,000 rows", _on_integers(lambda np: lambda a, b: a @ b, (33_000, 7), (7, 5)), quick=True),
    Probe(
        "batched dots",
        _on_integers(lambda np: lambda a, b: np.einsum("bij,bjk->kbi", a, b), (6, 9, 17), (6, 17, 10)),
    ),
    Probe(  # the contraction of `jax.patches`, channel by channel
        "windows times kernel",
        _on_integers(lambda np: lambda a, b: np.einsum("nhwtc,tc->nhwc", a, b), (2, 15, 14, 9, 8), (9, 8)),
        quick=True,
    ),
    *(Probe(f"sums over axes {axis}", _sums(axis)) for axis in (1, (1, 2), (0, 1, 2), 3, None)),
    Probe("a long sum of squares", _on_integers(lambda np: lambda x: np.sum(x * x, axis=0), (70_001, 3)), quick=True),
    Probe(
        "the greatest and the least",
        _on_integers(lambda np: lambda x: np.max(x, axis=1) + np.min(x, axis=1), (9, 301, 16), most=99),
    ),
    Probe("gathers", _gathered, quick=True),
    Probe(
        "selects",
        _on_integers(lambda np: lambda a, b: np.where(a > b, a - b, np.where(a == b, a * b, b)), *[(63, 65)] * 2),
    ),
    Probe(
        "padding and strided slices",
        _on_integers(
            lambda np: lambda x: np.pad(x, ((0, 0), (2, 1), (0, 3), (0, 0)))[:, 1:-2:2, ::3, 1:] * 2, (3, 21, 22, 5)
        ),
        quick=True,
    ),
    Probe(
        "transposes and reversals",
        _on_integers(lambda np: lambda x: np.transpose(x, (3, 0, 2, 1)).reshape(24, -1)[::-1], (4, 19, 33, 6)),
    ),
    Probe(
        "concatenations",
        _on_integers(
            lambda np: lambda a, b: np.concatenate([a[:, 3:], b, a[:, :3] * 2], axis=1), (7, 20, 5), (7, 11, 5)
        ),
    ),
    Probe("running sums", _on_integers(lambda np: lambda x: np.cumsum(x, axis=1), (5, 1030, 3))),
    Probe("a scan", _scanned),
    Probe("a loop that writes rows", _looped),
    *(
        Probe(f"lax convolution, {g} groups, strides {s}, dilation {d}", functools.partial(_lax_convolution, g, s, d))
        for g, s, d in ((1, (1, 1), 1), (8, (1, 1), 1), (8, (2, 1), 2), (2, (1, 3), 1))
    ),
    *(
        Probe(f"method {m}, strides {s}", functools.partial(_method, m, (3, 4), s), quick=m == "taps" and s == (1, 1))
        for m, s in (("taps", (1, 1)), ("taps", (2, 3)), ("rows", (1, 2)), ("patches", (2, 1)), ("grouped", (2, 3)))
    ),
    *(
        Probe(f"gradients of method {m}", functools.partial(_method_gradients, m), quick=m == "taps")
        for m in ("taps", "rows", "patches", "grouped")
    ),
)


def examine(probes: Sequence[Probe] = PROBES, *, eager: bool = True) -> Iterator[Outcome]:
    """Run probes in children, a batch in each; after a crash the rest of its batch runs in a new one.

    Args:
      probes: what to run.
      eager: also run each operation by operation; otherwise only where the compiled result is wrong.
    """
    for start in range(0, len(probes), BATCH):
        names = [probe.name for probe in probes[start : start + BATCH]]
        while names:
            outcomes = _batch(names, eager)
            yield from outcomes
            names = names[len(outcomes) :]


def _batch(names: list[str], eager: bool) -> list[Outcome]:
    """Return the outcomes of one child: those of all names, or up to the one that ended it."""
    output, ended = _run_child([*(["--eager"] if eager else []), *names], CHILD_TIME_LIMIT)
    outcomes, running = [], ""
    for line in output.splitlines():
        if line.startswith("probe "):
            running = json.loads(line.removeprefix("probe "))
        elif line.startswith("outcome "):
            outcomes.append(Outcome(**json.loads(line.removeprefix("outcome "))))
    if len(outcomes) == len(names):
        return outcomes
    if not running:
        return [Outcome(name, skipped=f"its process {ended}") for name in names]
    sound = [outcome for outcome in outcomes if outcome.name != running]  # a late crash is that of the last program
    guilty = ended.startswith(("was ended by", "did not end"))  # not by an exit code, which is of Python
    return [*sound, Outcome(running, **{"wrong" if guilty else "skipped": f"its process {ended}"})]


def _run_child(arguments: list[str], timeout: float) -> tuple[str, str]:
    """Return what the child's module printed, and how it ended."""
    try:
        done = run_module(_MODULE, *arguments, time_limit=timeout)
    except Overtime as overtime:
        return overtime.printed, f"did not end in {timeout:g} s"
    if done.returncode == -getattr(signal, "SIGPROF", 0):
        return done.stdout, f"did not end in {TIME_LIMIT} s of processor time"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        outside = name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")  # for lack of memory, or by the user
        return done.stdout, f"was ended {'from outside, ' * outside}by {name}"
    said = last_line(done.stderr)
    return done.stdout, f"ended with exit code {done.returncode}: {said[:200]}"


def main(probes: Sequence[Probe] = PROBES) -> None:
    """Run the named probes, as the child does; without names run all in children, and print a line for each."""
    names = [argument for argument in sys.argv[1:] if argument != "--eager"]
    if not names:
        print("\n".join(listing(list(examine(probes)))))
        return
    _limit_memory()
    chosen = {probe.name: probe for probe in probes}
    for name in names:
        print("probe", json.dumps(name), flush=True)
        if hasattr(signal, "ITIMER_PROF"):  # its signal ends the process, even one that is stuck in the compiler
            signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT)
        outcome = run_here(chosen[name], eager="--eager" in sys.argv)
        print("outcome", json.dumps(dataclasses.asdict(outcome)), flush=True)


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):  # not POSIX, or a lower limit is set
        pass


def run_here(probe: Probe, *, eager: bool) -> Outcome:
    """Run a probe in this process."""
    import jax

    try:
        function, arguments, exact = probe.program()
        compiled = np.asarray(jax.jit(function)(*arguments))
        wrong = _differs("compiled", compiled, exact)
        if eager or wrong:
            with jax.disable_jit():
                stepwise = _differs("run operation by operation", np.asarray(function(*arguments)), exact)
            wrong = "; ".join(filter(None, [wrong, stepwise])) or ""
            wrong += "; operation by operation it is right" * bool(wrong and not stepwise)
    except Exception as error:
        # others come from JAX's interface, not from its compiler, or from want of memory
        compiler = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        return Outcome(probe.name, **{"wrong" if compiler else "skipped": f"raised {_line(error)}"})
    return Outcome(probe.name, wrong=wrong)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _differs(how: str, got: np.ndarray, exact: np.ndarray) -> str:
    """Return how many elements are wrong, and the first; empty where all are right."""
    if got.shape != exact.shape:
        return f"{how}, the shape is {got.shape}, expected {exact.shape}"
    if not (off := got != exact).any():
        return ""
    first = tuple(int(i) for i in np.argwhere(off)[0])
    return (
        f"{how}, {off.sum()} of {off.size} elements are wrong, the first at {first}: {got[first]:g}, not {exact[first]}"
    )


def quick_findings() -> list[Outcome]:
    """Return the quick probes that are wrong here; from the cache if this environment was examined before."""
    path = _cache_file()
    if (known := _read(path)) is not None:
        return known
    outcomes = list(examine([probe for probe in PROBES if probe.quick], eager=False))
    wrong = [outcome for outcome in outcomes if outcome.wrong]
    if not any(outcome.skipped for outcome in outcomes):
        _write(path, wrong)
    return wrong


def _probe(name: str) -> Probe:
    return next(probe for probe in PROBES if probe.name == name)


def avoidable(outcome: Outcome) -> bool:
    """Return True for a probe that is wrong here, and need not be."""
    return bool(outcome.wrong) and not _probe(outcome.name).tolerated


def sentences(findings: Sequence[Outcome]) -> list[str]:
    """Return the lines above a report's verdict: which programs are wrong, and what avoids it; none if all right."""
    if not findings:
        return []
    probes = [_probe(finding.name) for finding in findings]
    names = ", ".join(dict.fromkeys(probe.issue or probe.name for probe in probes))
    avoid = "; ".join(dict.fromkeys(probe.avoid for probe in probes if probe.avoid))
    return [
        f"JAX's compiler gives wrong results here ({names}). A difference may come from the compiler.",
        f"To avoid it: {avoid}. `jaxdw doctor` says more." if avoid else "`jaxdw doctor` says more.",
    ]


def listing(outcomes: Sequence[Outcome]) -> list[str]:
    """Return how many probes are right; for each of the others what is wrong, the known issue, and what avoids it."""
    run = [outcome for outcome in outcomes if not outcome.skipped]
    wrong = [outcome for outcome in run if outcome.wrong]
    lines = [f"Compiler: {len(run) - len(wrong)} of {len(run)} programs on small integers have the exact result."]
    for outcome in wrong:
        probe = _probe(outcome.name)
        lines.append(f"  wrong: {outcome.name}")
        lines.append(f"    {outcome.wrong}")
        if probe.issue:
            lines.append(f"    known as {probe.issue}: {probe.affected}")
        if probe.avoid:
            lines.append(f"    to avoid it: {probe.avoid}")
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.skipped:
            reasons.setdefault(outcome.skipped, []).append(outcome.name)
    lines += [f"  not run: {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return lines


def _cache_file() -> Path:
    """Return the cache file of this environment."""
    from bridge.cache import cache_file
    from bridge.environment import processor

    parts = [
        *(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")),
        platform.python_version(),
        processor(),
        *(os.environ.get(name, "") for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")),
        Path(__file__).read_text(),
    ]
    return cache_file("compiler", parts)


def _read(path: Path) -> list[Outcome] | None:
    """Return what was found before; None where no readable file says it."""
    from bridge.cache import read_cache

    names = {probe.name for probe in PROBES}
    try:
        findings = read_cache(path)["wrong"].items()
        sound = all(name in names and isinstance(wrong, str) for name, wrong in findings)
    except (TypeError, KeyError, AttributeError):
        return None
    return [Outcome(name, wrong) for name, wrong in findings] if sound else None


def _write(path: Path, findings: list[Outcome]) -> None:
    from bridge.cache import write_cache

    write_cache(path, {"wrong": {finding.name: finding.wrong for finding in findings}})


if __name__ == "__main__":
    main()
