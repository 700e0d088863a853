"""The platforms to compile for, and the packages that each of them needs."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Card:
    """The properties of an NVIDIA card that XLA needs to compile for it: NVIDIA's published figures.

    Attributes:
      name: as the driver gives it.
      capability: major number of the compute capability.
      cores: streaming multiprocessors.
      lanes: float32 lanes per multiprocessor.
      shared: bytes of shared memory per multiprocessor; a block may ask for 1024 fewer.
      l2, memory: bytes.
      bandwidth: of the memory, bytes per second.
      clock: GHz, boosted.
    """

    name: str
    capability: int
    cores: int
    lanes: int
    shared: int
    l2: int
    memory: int
    bandwidth: int
    clock: float

    @property
    def target_config(self) -> str:
        """The text proto (`stream_executor.GpuTargetConfigProto`) that `jax.experimental.topologies` takes."""
        info = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 << 10,
            "shared_memory_per_block_optin": self.shared - 1024,
            "shared_memory_per_core": self.shared,
            "threads_per_core_limit": 2048,
            "core_count": self.cores,
            "fpus_per_core": self.lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 2**16 - 1,
            "block_dim_limit_z": 2**16 - 1,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "registers_per_core_limit": 1 << 16,
            "registers_per_block_limit": 1 << 16,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
        }
        lines = [f"  {key}: {value}" for key, value in info.items()]
        features = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        lines.append(f"  cuda_compute_capability {{ major: {self.capability} feature_extension: {features} }}")
        return "\n".join(
            [
                "gpu_device_info {",
                *lines,
                "}",
                'platform_name: "CUDA"',
                "dnn_version_info { major: 9 minor: 8 }",
                f'device_description_str: "{self.name}"',
                "",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Platform:
    """A platform to compile for.

    Attributes:
      name: as given to `--platform`.
      about: its name in a sentence.
      backend: JAX's name: "cpu", "tpu" or "gpu".
      extra: the extra of jaxdw that has its compiler; empty if none is needed.
      packages: modules that may have the compiler; one of them is needed.
      topology: arguments of `jax.experimental.topologies.get_topology_desc`.
      environment: variables of the process that compiles.
    """

    name: str
    about: str
    backend: str
    extra: str = ""
    packages: tuple[str, ...] = ()
    topology: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)

    @property
    def missing(self) -> str:
        """The reason why nothing can be compiled for it here; empty if there is none."""
        if not self.packages or any(importlib.util.find_spec(name) for name in self.packages):
            return ""
        return (
            f"`--platform` is {self.name!r}, whose compiler is not installed ({' or '.join(self.packages)}): "
            f"pip install 'jaxdw[{self.extra}]'"
        )


def _tpu(name: str, topology: str) -> Platform:
    quiet = {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu asks the network which TPU this is, and waits for the answer
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # the machine has no TPU: any name stops libtpu's warnings
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second process is refused, although no TPU is opened
    }
    described = {"platform": "tpu", "topology_name": topology}
    return Platform(f"tpu:{name}", f"one core of a TPU {name}", "tpu", "tpu", ("libtpu",), described, quiet)


def _cuda(name: str, card: Card) -> Platform:
    quiet = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    topology = {"platform": "cuda", "topology": "1x1x1", "target_config": card.target_config}
    packages = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return Platform(f"cuda:{name}", f"one {card.name}", "gpu", "cuda", packages, topology, quiet)


_KIB, _MIB, _GB = 1 << 10, 1 << 20, 10**9

CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 * _KIB, 40 * _MIB, 80 * _GB, 2039 * _GB, 1.41),
    "h100": Card("NVIDIA H100 80GB HBM3", 9, 132, 128, 228 * _KIB, 50 * _MIB, 80 * _GB, 3352 * _GB, 1.98),
    "h200": Card("NVIDIA H200", 9, 132, 128, 228 * _KIB, 50 * _MIB, 141 * _GB, 4800 * _GB, 1.98),
}

#: By name. The first smallest topology of each TPU that libtpu describes; programs here use one of its devices.
PLATFORMS: dict[str, Platform] = {
    each.name: each
    for each in (
        Platform("cpu", "this machine's CPU", "cpu"),
        _tpu("v2", "v2:2x2"),
        _tpu("v3", "v3:2x2"),
        _tpu("v4", "v4:2x2x1"),
        _tpu("v5e", "v5e:2x2"),
        _tpu("v5p", "v5p:2x2x1"),
        _tpu("v6e", "v6e:2x2"),
        _tpu("v7x", "tpu7x:2x2x1"),
        *(_cuda(name, card) for name, card in CARDS.items()),
    )
}


def platform(name: str) -> Platform:
    """Return the platform of that name, installed or not.

    Raises:
      ValueError: there is no such platform; the message lists those that exist.

    >>> platform("tpu:v5e").extra
    'tpu'
    """
    if name not in PLATFORMS:
        raise ValueError(f"`--platform` is {name!r}, expected one of {', '.join(PLATFORMS)}")
    return PLATFORMS[name]
