"""Streams: the state that a causal kernel takes and returns, and the outputs of consecutive chunks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from bridge._conformance.drawing import with_sizes
from bridge._conformance.kit import Fault, Kit
from bridge._conformance.problems import Problem
from bridge.case import Case
from bridge.diagnosis import Verdict
from bridge.numerics import exact, same_bits


def streaming_fault(kit: Kit, problem: Problem, changed: list[str]) -> Fault | None:
    """Return the first fault of a stream; add to `changed` where bits differ within the bound."""
    problem = dataclasses.replace(problem, state=kit.features.state)
    case = problem.integers(kit.arithmetic(problem.dtype, bias=problem.bias), kit.seed)
    result = kit.subject.run(problem, case, return_state=kit.features.return_state)
    if fault := _output_fault(kit, problem, case, result.y):
        return fault
    if result.state is not None and (fault := _state_fault(problem, case, result.state)):
        return fault
    if not kit.features.state or not kit.features.return_state or problem.spatial[0] < 2:
        return None
    random = problem.normal(kit.seed)
    whole = kit.subject.run(problem, random).y
    y = np.concatenate(list(_chunks(kit, problem, random)), axis=1)
    if not same_bits(whole, y).all():
        changed.append("bits change with the chunks, within the bound")
    fault = kit.fault(random, y, exact=False)
    return None if fault is None else dataclasses.replace(fault, context="in chunks, each with the state before")


def _chunks(kit: Kit, problem: Problem, case: Case) -> Iterator[np.ndarray]:
    """Yield the outputs of consecutive chunks of random lengths, each with the state that the one before returned."""
    rng, length, before = kit.rng("chunks"), problem.spatial[0], problem.before
    state, rest = case.x[:, :before], case.x[:, before:]
    while length:
        size = int(rng.integers(1, length + 1))
        part = with_sizes(problem, spatial=(size,))
        chunk = case.replace(x=np.concatenate([state, rest[:, :size]], axis=1))
        result = kit.subject.run(part, chunk, return_state=True)
        assert result.state is not None
        state, rest, length = result.state.astype(case.dtype), rest[:, size:], length - size
        yield result.y


def _output_fault(kit: Kit, problem: Problem, case: Case, y: np.ndarray) -> Fault | None:
    """Return the fault of an output, with the mistake in its state that explains every element, if there is one."""
    fault = kit.fault(case, y, exact=True)
    if fault is None or not problem.before:
        return fault
    state, x = case.x[:, : problem.before], case.x[:, problem.before :]
    nothing = np.zeros_like(state[:, :1])
    late, early = np.concatenate([nothing, state[:, :-1]], axis=1), np.concatenate([state[:, 1:], nothing], axis=1)
    next_to_x = "its last input belongs next to x"
    wrong = [
        ("state ignored", "takes zeros for the state", np.zeros_like(state)),
        ("state reversed", f"reads the state in reverse order: {next_to_x}", state[:, ::-1]),
        ("state off by one", f"reads the state one position too late: {next_to_x}", late),
        ("state off by one", f"reads the state one position too early: {next_to_x}", early),
    ]
    for name, cause, other in wrong:
        if (exact(case.replace(x=np.concatenate([other, x], axis=1))).value == y).all():
            return dataclasses.replace(fault, sentence=cause, verdict=Verdict.CONVENTION, name=name)
    return fault


def _state_fault(problem: Problem, case: Case, state: np.ndarray) -> Fault | None:
    """Return the fault of a returned state, which holds the last K-1 inputs."""
    size = problem.kernel_size[0] - 1
    inputs = case.x
    if not problem.state:
        inputs = np.concatenate([np.zeros_like(inputs[:, :1].repeat(size, axis=1)), inputs], axis=1)
    end = inputs.shape[1]
    expected = inputs[:, end - size :]
    if state.shape != expected.shape:
        sentence = f"returns a state of shape {state.shape}, expected {expected.shape}: the last K-1 inputs"
        return Fault(case, sentence=sentence, name="shape of the state")
    wrong = state != expected
    if not wrong.any():
        return None
    early = inputs[:, end - size - 1 : end - 1]
    guesses = {
        "state reversed": ("returns the state in reverse order", expected[:, ::-1]),
        "state off by one": ("returns a state that lacks the last input", early),
        "state not updated": ("returns the state that it was given", inputs[:, :size]),
    }
    for name, (cause, guess) in guesses.items():
        if guess.shape == state.shape and (guess == state).all():
            return Fault(case, wrong, state, expected, sentence=cause, verdict=Verdict.CONVENTION, name=name)
    sentence = "returns a state that is not the last K-1 inputs"
    return Fault(case, wrong, state, expected, sentence=sentence, name="state")
