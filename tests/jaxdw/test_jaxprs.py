"""The walker of jaxprs: it enters every kind of call, and leaves other equations as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxdw.jaxprs import called, equations, evaluate


def doubled(x):
    return 2.0 * x


ruled = jax.custom_jvp(doubled)
ruled.defjvp(lambda x, t: (doubled(*x), 2.0 * t[0]))
both_ways = jax.custom_vjp(doubled)
both_ways.defvjp(lambda x: (doubled(x), None), lambda _, g: (2.0 * g,))

CALLS = {
    "jit": jax.jit(doubled),
    "checkpoint": jax.checkpoint(doubled),
    "custom_jvp": ruled,
    "custom_vjp": both_ways,
    "a call in a call": jax.jit(jax.checkpoint(jax.jit(doubled))),
}


def tripled(equation, operands):
    """2 x becomes 3 x; calls are entered."""
    if equation.primitive.name == "mul":
        return [3.0 * operands[1]]
    program = called(equation)
    return None if program is None else evaluate(program, operands, tripled)


@pytest.mark.parametrize("name", CALLS)
def test_an_equation_within_a_call_is_replaced(name):
    x = jnp.arange(4.0)
    program = jax.make_jaxpr(lambda x: CALLS[name](x) + 1.0)(x)
    (y,) = evaluate(program, [x], tripled)
    assert np.array_equal(y, 3.0 * x + 1.0)
    assert [each.primitive.name for each in equations(program)].count("mul") == 1


def test_loops_and_conditions_are_no_calls_but_are_searched():
    def program(x):
        return lax.fori_loop(0, 3, lambda _, x: lax.cond(x[0] > 0, doubled, lambda x: x, x), x)

    traced = jax.make_jaxpr(program)(jnp.ones(2))
    assert "mul" in [each.primitive.name for each in equations(traced)]
    assert all(called(each) is None for each in traced.jaxpr.eqns if each.primitive.name in ("scan", "while", "cond"))
    (y,) = evaluate(traced, [jnp.ones(2)], tripled)
    assert np.array_equal(y, program(jnp.ones(2)))


def test_an_operand_that_is_read_twice_and_one_that_is_written_out():
    (y,) = evaluate(jax.make_jaxpr(lambda x: x * x - 1.0)(jnp.ones(2)), [3.0 * jnp.ones(2)], lambda *_: None)
    assert np.array_equal(y, [8.0, 8.0])
