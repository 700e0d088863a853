"""Sums and dot products against FPRev's published algorithm, written afresh here as the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bridge.accumulation import DotProduct, Tree, replay, reveal_dot, reveal_sum

SIZES = (4, 8, 16, 32, 64, 128, 256)


def fprev(measure, n):
    """`(tree, calls)`: algorithm 4 of FPRev (Xie et al., USENIX ATC 2025), whose `measure(i, j)` is l(i, j).

    All leaves under a subtree are compared with its first one, i. Those with the same l are one operand of i's ancestor
    of that size, or, where their own tree has a root of that very size, further operands of a multi-way addition.
    """
    calls = 0

    def build(leaves):
        nonlocal calls
        first, *others = leaves
        sizes = {}
        for other in others:
            sizes.setdefault(measure(first, other), []).append(other)
            calls += 1
        tree, size = Tree.of(first), 1
        for size in sorted(sizes):
            operand, own = build(sizes[size])
            tree = Tree.add(tree, *operand.children) if own == size else Tree.add(tree, operand)
        return tree, size

    return build(list(range(n)))[0], calls


def fprev_sum(function, n, dtype=np.float32):
    mask = dtype(2.0**100)

    def measure(i, j):
        terms = np.ones(n, dtype)
        terms[i], terms[j] = mask, -mask
        return n - int(function(terms))

    return fprev(measure, n)


def fprev_dot(function, n, dtype=np.float32):
    return fprev_sum(lambda terms: function(np.ones(n, dtype), terms), n, dtype)


def with_torch(function):
    return lambda *arrays: function(*(torch.from_numpy(array.copy()) for array in arrays)).numpy()


def with_jax(function):
    compiled = jax.jit(function)
    return lambda *arrays: np.asarray(compiled(*arrays))


def matrix_vector(matmul, stack):
    """The middle element of a product of a square matrix, all of whose rows are x, and a vector."""
    return lambda x, w: matmul(stack([x] * len(x)), w)[len(x) // 2]


def matrix_matrix(matmul, stack):
    """An element of a product of square matrices, all of whose rows, or columns, are the same."""

    def element(x, w):
        return matmul(stack([x] * len(x)), stack([w] * len(w)).T)[len(x) // 2, 1]

    return element


SUMS = {
    "numpy.sum": np.sum,
    "torch.sum": with_torch(torch.sum),
    "jax.sum": with_jax(jnp.sum),
}
DOTS = {
    "numpy.dot": np.dot,
    "torch.dot": with_torch(torch.dot),
    "jax.dot": with_jax(jnp.dot),
    "numpy.matvec": matrix_vector(np.matmul, np.stack),
    "torch.matvec": with_torch(matrix_vector(torch.mv, torch.stack)),
    "jax.matvec": with_jax(matrix_vector(jnp.matmul, jnp.stack)),
    "numpy.matmul": matrix_matrix(np.matmul, np.stack),
    "torch.matmul": with_torch(matrix_matrix(torch.matmul, torch.stack)),
    "jax.matmul": with_jax(matrix_matrix(jnp.matmul, jnp.stack)),
}


def unfused(tree):
    """The same tree with every fused multiply-add as an addition: all that FPRev sees."""
    built = {}
    for node in tree.nodes():
        below = [built[child] for child in node.children]
        own = [Tree.of(node.leaf)] if node.kind == "fma" else []
        built[node] = Tree.add(*own, *below) if node.children else node
    return built[tree]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_has_the_tree_that_fprev_finds_in_no_more_calls(name, n, full):
    if n > 64 and not full:
        pytest.skip("only in the full run")
    order = reveal_sum(SUMS[name], n)
    tree, calls = fprev_sum(SUMS[name], n)
    assert order.tree((0,)) is tree
    assert order.fingerprint.order_runs <= calls


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", DOTS)
def test_a_dot_product_has_the_tree_that_fprev_finds_in_no_more_calls(name, n, full):
    if n > 64 and not full:
        pytest.skip("only in the full run")
    order = reveal_dot(DOTS[name], n)
    tree, calls = fprev_dot(DOTS[name], n)
    assert unfused(order.tree((0,))) is tree
    assert order.fingerprint.order_runs <= calls


@pytest.mark.parametrize(("dtype", "accumulator"), [(np.float16, "float32"), (np.float64, "float64")])
def test_sums_of_other_dtypes_are_revealed(dtype, accumulator):
    """NumPy adds float16 numbers in float32."""
    order = reveal_sum(np.add.reduce, 24, dtype)
    assert order.tree((0,)) is reveal_sum(np.add.reduce, 24).tree((0,))
    assert str(order.fingerprint.accumulator) == accumulator


def test_a_wide_accumulator_of_rounded_products_is_told_from_one_of_exact_products():
    def of_rounded(x, w):
        return np.float32(sum((x * w).astype(np.float64)))

    def of_exact(x, w):
        return np.float32(sum(x.astype(np.float64) * w))

    for function, products in ((of_rounded, "rounded"), (of_exact, "exact")):
        order = reveal_dot(function, 8)
        assert order.trees == (Tree.chain(range(8)),)
        assert order.fingerprint.products == products
        assert str(order.fingerprint.accumulator) == "float64"


@pytest.mark.parametrize("multiplies", [False, True])
def test_the_order_of_a_vector_is_replayed_on_other_numbers(multiplies, seed):
    def in_pairs(x, w):
        return np.add.reduce(x * w)

    order = reveal_dot(in_pairs, 20) if multiplies else reveal_sum(np.add.reduce, 20)
    ones = np.ones(20, np.float32)
    sums = DotProduct.of(ones, ones, multiplies=multiplies).random(seed)
    assert replay(order, sums) == in_pairs(*sums.data)
    with pytest.raises(ValueError, match="expected what was revealed: float32 20"):
        replay(order, DotProduct.of(ones[:9], ones[:9]))


def in_halves(n):
    """`(function, tree)`: the products of neighbours are added, then the sums of neighbours."""

    def function(x, w):
        terms = x * w
        while len(terms) > 1:
            terms = terms[0::2] + terms[1::2]
        return terms[0]

    level = [Tree.of(leaf) for leaf in range(n)]
    while len(level) > 1:
        level = [Tree.add(*pair) for pair in zip(level[0::2], level[1::2])]
    return function, level[0]


def in_block_chains(n, blocks=4):
    """`(function, tree)`: every block is added in order, then the blocks; by an array of all of them side by side."""

    def function(x, w):
        return np.add.accumulate(np.add.accumulate((x * w).reshape(blocks, -1), axis=1)[:, -1])[-1]

    chains = [Tree.chain(range(start, start + n // blocks)) for start in range(0, n, n // blocks)]
    tree = chains[0]
    for chain in chains[1:]:
        tree = Tree.add(tree, chain)
    return function, tree


@pytest.mark.parametrize("family", [in_halves, in_block_chains])
def test_a_sum_of_a_thousand_products_is_revealed_in_two_runs_per_product(family):
    function, tree = family(1024)
    order = reveal_dot(function, 1024)
    assert order.trees == (tree,)
    assert order.fingerprint.products == "rounded"
    assert order.fingerprint.order_runs < 2 * 1024


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_length_that_cannot_be_is_refused(n):
    with pytest.raises(ValueError, match="`n` is"):
        reveal_sum(np.sum, n)


def test_one_term_has_no_order():
    assert reveal_sum(np.sum, 1).trees == (Tree.of(0),)


def test_a_function_that_returns_a_vector_is_refused():
    with pytest.raises(RuntimeError, match="<lambda> raised ValueError"):
        reveal_sum(lambda terms: terms, 4)
