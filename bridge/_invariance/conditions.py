"""The conditions under which the result of one sample is computed again: one row of the table each."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence

import numpy as np

from bridge.case import Case

#: The kinds of conditions, and what each one changes.
KINDS = {
    "run": "the same call again",
    "batch": "the number of samples in the batch",
    "position": "the position of the sample in the batch",
    "others": "the data of the other samples",
    "threads": "the number of threads",
    "layout": "the memory layout",
    "isa": "the instruction set",
    "jit": "no jax.jit",
    "compile": "torch.compile",
    "sharding": "the number of devices",
}

#: The samples in the batch of the kinds "position" and "others".
BATCH = 8

#: The numbers of threads.
THREADS = (1, 3)

#: The variables that lower the instruction set, by framework, with their values on an x86 processor and elsewhere.
_INSTRUCTION_SETS = {
    "torch": {
        "ONEDNN_MAX_CPU_ISA": (("AVX2", "SSE41"), ()),
        "ATEN_CPU_CAPABILITY": (("avx2", "default"), ("default",)),
    },
    "jax": {
        "JAXDW_ISA": (("avx2", "scalar"), ("scalar",)),
        "XLA_FLAGS": (("--xla_cpu_max_isa=AVX2", "--xla_cpu_max_isa=SSE4_2"), ()),
    },
}


_READERS = {
    "ONEDNN_MAX_CPU_ISA": "PyTorch reads ONEDNN_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY": "PyTorch reads ATEN_CPU_CAPABILITY",
    "JAXDW_ISA": "jaxdw's methods read JAXDW_ISA",
    "XLA_FLAGS": "XLA reads its flags",
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a condition changes for the implementations of one framework.

    Attributes:
      knobs: their values.
      environment: variables to add, in a process of its own; empty for none.
    """

    knobs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Placement:
    """A batch that holds the sample.

    Attributes:
      size: samples in the batch.
      position: of the sample in it.
      draw: seed of the other samples.
    """

    size: int = 1
    position: int = 0
    draw: int = 0

    def batch(self, case: Case) -> Case:
        """Return a case of one sample in its batch. The other samples hold the sample's numbers in another order."""
        if self.size == 1:
            return case
        rng = np.random.default_rng(self.draw)
        numbers = case.x.ravel()
        samples = [numbers[rng.permutation(numbers.size)].reshape(case.x.shape) for _ in range(self.size)]
        samples[self.position] = case.x
        return case.replace(x=np.concatenate(samples))


ALONE = Placement()


@dataclasses.dataclass(frozen=True)
class Condition:
    """A row of the table.

    Attributes:
      kind: a key of `KINDS`.
      label: in words.
      placement: the batch that holds the sample.
      reference: the batch of the result to compare with: by default the sample alone.
      settings: by framework, what changes; a framework that is missing has none.
      reason: why it does not apply to other implementations; empty if it applies to all.
    """

    kind: str
    label: str
    placement: Placement = ALONE
    reference: Placement = ALONE
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def setting(self, framework: str) -> Setting | None:
        """Return what changes for a framework; None if the condition does not apply to it."""
        return self.settings.get(framework) if self.reason else Setting()

    @property
    def against(self) -> str:
        """The result to compare with, in words."""
        return "the sample alone" if self.reference == ALONE else f"the first of {self.reference.size}"


def conditions(case: Case, kinds: Sequence[str] | None = None, batches: Sequence[int] = (2, 3, 8)) -> list[Condition]:
    """Return the rows for a case of one sample.

    Args:
      case: with a batch of one.
      kinds: of `KINDS`; None is all.
      batches: the batch sizes of the kind "batch".

    Raises:
      ValueError: an unknown kind, or a batch size below two.
    """
    if kinds is not None and not kinds:
        raise ValueError(f"`conditions` is empty, expected some of {', '.join(KINDS)}")
    for kind in kinds or ():
        if kind not in KINDS:
            raise ValueError(f"`conditions` has {kind!r}, expected some of {', '.join(KINDS)}")
    for size in batches:
        if size < 2:
            raise ValueError(f"`batches` has {size}, expected numbers of two or more: the reference is one sample")
    first = Placement(BATCH)
    rows = [Condition("run", "second run")]
    rows += [Condition("batch", f"batch of {size}", Placement(size)) for size in dict.fromkeys(batches)]
    rows += [
        Condition("position", f"second of {BATCH}", Placement(BATCH, 1), first),
        Condition("position", f"last of {BATCH}", Placement(BATCH, BATCH - 1), first),
        Condition("others", f"other data in {BATCH}", Placement(BATCH, draw=1), first),
    ]
    rows += [_threads(number) for number in THREADS]
    rows.append(_layout(case))
    rows += _instruction_sets()
    rows.append(Condition("jit", "no jit", settings={"jax": Setting({"jit": "off"})}, reason="only JAX has jit"))
    # a pool of compiling processes would outlive the measurement
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    compiled = {"torch": Setting({"compile": "on"}, alone)}
    rows.append(Condition("compile", "torch.compile", settings=compiled, reason="only PyTorch has torch.compile"))
    rows += _shardings(case)
    return [row for row in rows if kinds is None or row.kind in kinds]


def variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables as a process gets them: flags of XLA are added to those that there are."""
    return {
        name: f"{os.environ.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
        for name, value in environment.items()
    }


def _threads(number: int) -> Condition:
    settings = {"torch": Setting({"threads": str(number)}), "jax": Setting(environment={"NPROC": str(number)})}
    label = f"{number} thread{'s' * (number > 1)}"
    return Condition("threads", label, settings=settings, reason="only PyTorch and JAX have a pool of threads")


def _layout(case: Case) -> Condition:
    wide = case.geometry.rank > 1
    settings = {"torch": Setting({"layout": "channels_last"})} if wide else {}
    reason = "JAX and NumPy have no memory format" if wide else "there is no memory format in 1-D"
    return Condition("layout", "channels_last", settings=settings, reason=reason)


def _instruction_sets() -> list[Condition]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    rows = []
    for framework, found in _INSTRUCTION_SETS.items():
        for name, values in found.items():
            for value in values[0 if x86 else 1]:
                label = value if name == "XLA_FLAGS" else f"{name}={value}"
                setting = Setting(environment={name: value})
                reason = f"only {_READERS[name]}"
                rows.append(Condition("isa", label, settings={framework: setting}, reason=reason))
    return rows


def _shardings(case: Case) -> list[Condition]:
    """Return the rows of the kind "sharding": over the fewest virtual devices of a CPU that divide the axis."""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    rows = []
    for along, size in (("batch", BATCH), ("spatial", case.x.shape[1]), ("channels", case.x.shape[-1])):
        divides = any(size % number == 0 for number in range(2, 9))
        settings = {"jax": Setting({"sharding": along}, environment)} if divides else {}
        reason = "only JAX shards" if divides else f"no number of devices from 2 to 8 divides the axis of {size}"
        placement = Placement(BATCH) if along == "batch" else ALONE
        rows.append(Condition("sharding", f"sharded {along}", placement, ALONE, settings, reason))
    return rows
