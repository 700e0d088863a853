"""Probes with planted mistakes, and a sound one, and the child that runs them; no test is here."""

import os

import jax
import numpy as np

from bridge import compiler_probes
from bridge.compiler_probes import Probe

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def _sound():
    return lambda x: x + 1, (X,), X + 1


def _miscompiled():
    return lambda x: x + 2 * (isinstance(x, jax.core.Tracer)) + (not isinstance(x, jax.core.Tracer)), (X,), X + 1


def _wrong_everywhere():
    return lambda x: x * 2, (X,), X + 1


def _of_another_shape():
    return lambda x: x.sum(), (X,), X + 1


def _refused():
    def refused(x):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such fusion")

    return refused, (X,), X


def _without_memory():
    def greedy(x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    return greedy, (X,), X


def _of_another_interface():
    raise ImportError("cannot import name 'ManualAxisType'")


def _killed():
    os.kill(os.getpid(), 9)


def _leaves():
    raise SystemExit(3)


def _busy():
    while True:
        pass


PROBES = (
    Probe("sound", _sound, quick=True),
    Probe("miscompiled", _miscompiled, quick=True, issue="jax-ml/jax#1", affected="jaxlib 9", avoid="jaxlib 10"),
    Probe("aborts", os.abort, quick=True, issue="jax-ml/jax#2", affected="jaxlib 9", avoid="jaxlib 10"),
    Probe("busy", _busy),
    Probe("wrong both ways", _wrong_everywhere, tolerated=True),
    Probe("of another shape", _of_another_shape),
    Probe("refused", _refused),
    Probe("without memory", _without_memory),
    Probe("of another interface", _of_another_interface),
    Probe("killed", _killed),
    Probe("leaves", _leaves),
    Probe("sound to the end", _sound),
)

if __name__ == "__main__":
    compiler_probes.TIME_LIMIT = 1
    compiler_probes.main(PROBES)
