"""Run one convolution over the devices of several processes, and compare it with the bits of one device.

python examples/multihost.py                                                       # two processes on this machine
python examples/multihost.py --coordinator host0:1234 --processes 2 --process 0    # on host0
python examples/multihost.py --coordinator host0:1234 --processes 2 --process 1    # on host1
python examples/multihost.py --detect       # under SLURM, Open MPI or Kubernetes, or on a TPU pod: JAX finds the rest

The variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID replace the flags. Every process runs this
same program. It exits with 0 if all bits are those of one device, 1 if not, 3 if another process did not answer in
time, and 4 if another process died.
"""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdw
import jaxdw.sharding

ROWS_PER_DEVICE = 8


def main() -> int:
    environment = os.environ.get
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", default=environment("JAX_COORDINATOR_ADDRESS"), help="HOST:PORT of process 0")
    parser.add_argument("--processes", type=int, default=environment("JAX_NUM_PROCESSES"), help="number of processes")
    parser.add_argument("--process", type=int, default=environment("JAX_PROCESS_ID"), help="index of this process")
    parser.add_argument("--detect", action="store_true", help="ask the cluster's scheduler for these three")
    parser.add_argument("--rounds", type=int, default=1, help="number of convolutions")
    parser.add_argument("--time-limit", type=float, default=60, help="seconds to wait for the other processes")
    arguments = parser.parse_args()
    given = [arguments.coordinator, arguments.processes, arguments.process]
    if not arguments.detect and all(value is None for value in given):
        return on_this_machine(2, arguments)
    if not arguments.detect and None in given:
        parser.error("expected --coordinator, --processes and --process together, or --detect, or none of them")
    if arguments.processes is not None and not 0 <= (arguments.process or 0) < arguments.processes:
        parser.error(f"--process is {arguments.process}, expected one of 0 to {arguments.processes - 1}")
    return as_one_of_them(arguments)


def on_this_machine(processes: int, arguments: argparse.Namespace) -> int:
    """Start this program once per process, over loopback, on CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = ["--rounds", str(arguments.rounds), "--time-limit", str(arguments.time_limit)]
    command = [
        sys.executable,
        "-P",
        __file__,
        "--coordinator",
        address,
        "--processes",
        str(processes),
        *shared,
        "--process",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": address}
    children = [subprocess.Popen([*command, str(process)], env=environment) for process in range(processes)]
    try:
        return max(child.wait() % 256 for child in children)
    finally:
        for child in children:
            child.kill()


def as_one_of_them(arguments: argparse.Namespace) -> int:
    limit = arguments.time_limit
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = f"process {'?' if arguments.process is None else arguments.process} of {arguments.processes or '?'}"
    with time_limit(
        limit, f"{who}: the other processes did not all connect within {limit:g} s (--time-limit); are they running?"
    ):
        jax.distributed.initialize(
            arguments.coordinator,
            arguments.processes,
            arguments.process,
            initialization_timeout=2 * int(limit) + 1,  # longer than the limit above, whose message says more
        )
        devices = jax.devices()
    who = f"process {jax.process_index()} of {jax.process_count()}"
    say(f"{who}: {len(devices)} devices, {len(jax.local_devices())} of them here")
    silence = f"{who}: no answer within {limit:g} s (--time-limit); another process may have died"
    try:
        same = has_the_bits_of_one_device(who, arguments.rounds, lambda: time_limit(limit, silence))
        with time_limit(limit, silence):
            jax.distributed.shutdown()  # waits for the others
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # a collective that fails at once is a ValueError
        stop(f"{who}: stopped, because another process no longer answers: {error}".splitlines()[0], 4)
    say(f"{who}: {'the bits of one device' if same else 'NOT the bits of one device'}")
    return 0 if same else 1


def has_the_bits_of_one_device(who: str, rounds: int, limited: Callable[[], AbstractContextManager[None]]) -> bool:
    """Return True if this process's part of the result, and of the gradient by x, has the bits of one device."""
    devices = jax.device_count()
    draw = np.random.default_rng(0).standard_normal
    image, slope = (draw((1, ROWS_PER_DEVICE * devices, 24, 16), np.float32) for _ in range(2))
    kernel, bias = draw((5, 5, 1, 16), np.float32), draw(16, np.float32)

    mesh = jax.make_mesh((devices,), ("rows",))
    sharding = NamedSharding(mesh, P(None, "rows"))
    x, dy = (jax.make_array_from_callback(a.shape, sharding, lambda rows, a=a: a[rows]) for a in (image, slope))

    def divided(x, kernel, bias):
        return jaxdw.sharding.depthwise_conv(x, kernel, bias, spec=P(None, "rows"), mesh=mesh)

    both, alone = with_gradient(divided), with_gradient(jaxdw.depthwise_conv)
    for number in range(rounds):
        with limited():
            y, dx = jax.block_until_ready(both(x, dy, kernel, bias))
        if number == 0:
            say(f"{who}: convolved {y.shape}, {ROWS_PER_DEVICE} rows per device")
    expected = alone(image, slope, kernel, bias)
    return all(
        np.array_equal(shard.data, whole[shard.index])
        for array, whole in zip((y, dx), map(np.asarray, expected))
        for shard in array.addressable_shards
    )


def with_gradient(conv):
    """Return a jitted function of x, dy, kernel and bias that gives y and the gradient by x."""

    @jax.jit
    def run(x, dy, kernel, bias):
        y, pullback = jax.vjp(lambda x: conv(x, kernel, bias), x)
        return y, *pullback(dy)

    return run


@contextlib.contextmanager
def time_limit(seconds: float, message: str) -> Iterator[None]:
    """End the process if the body takes longer. A wait for a dead process may be in C++, and never end."""
    timer = threading.Timer(seconds, stop, (message, 3))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(message: str) -> None:
    """Print the line in one piece, so that lines of other processes do not mix with it."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def stop(message: str, code: int) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)  # skips JAX's own shutdown, which would wait for all processes


if __name__ == "__main__":
    sys.exit(main())
