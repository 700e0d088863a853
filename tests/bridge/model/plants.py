"""Mistakes that ports make, as changes of a correct port: where each may be planted, and what must be said of it."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bridge import Verdict
from jaxdw.nnx import CausalConv1d, DepthwiseConv

CONVENTION, BUG, PRECISION = Verdict.CONVENTION, Verdict.BUG, Verdict.PRECISION


@dataclasses.dataclass(frozen=True)
class Plant:
    """One mistake at one place.

    Attributes:
      kind: what is wrong.
      path: the module that is changed.
      change: makes the mistake in a model, and in the module of the port by a monkeypatch.
      where: beginnings of the name that the first wrong operation must have.
      said: words of which one must stand in its cause.
      verdicts: of which it must have one.
    """

    kind: str
    path: str
    change: Callable[[Any, Any], None]
    where: tuple[str, ...]
    said: tuple[str, ...]
    verdicts: tuple[Verdict, ...] = (CONVENTION,)

    def __str__(self) -> str:
        return f"{self.kind} at {self.path or 'the root'}"


NORMS = (nnx.LayerNorm, nnx.GroupNorm, nnx.BatchNorm, nnx.RMSNorm)
CONVS = (nnx.Conv, DepthwiseConv)
LAYERS = (*CONVS, nnx.Linear)


UNCONVERTED = ("leaves the scale out", "leaves the bias out", "has other numbers than")


def _set(**values: Any) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        for name, value in values.items():
            setattr(layer, name, value)

    return change


def _numbers(name: str, of: Callable[[jax.Array], jax.Array]) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        variable = getattr(layer, name)
        variable[...] = of(variable[...])

    return change


def calls(function: Callable[..., Any]) -> Callable[[Any], None]:
    """Give one module another `__call__`; the function gets the old one, too."""

    def change(layer: Any) -> None:
        kind = type(layer)
        old = kind.__call__
        own = {"__call__": lambda self, *args: function(self, old, *args)}
        layer.__class__ = type(kind.__name__, (kind,), own)

    return change


def _one_ulp(array: jax.Array) -> jax.Array:
    flat = np.array(array).reshape(-1)
    at = int(np.abs(flat).argmax())
    flat[at] = np.nextafter(flat[at], np.float32(np.inf))
    return jnp.asarray(flat.reshape(array.shape))


def _one_doubled(array: jax.Array) -> jax.Array:
    flat = np.array(array).reshape(-1)
    flat[int(np.abs(flat).argmax())] *= 2
    return jnp.asarray(flat.reshape(array.shape))


def _two_swapped(array: jax.Array) -> jax.Array:
    return array[..., jnp.r_[1, 0, 2 : array.shape[-1]]]


def _extra_bias(layer: Any) -> None:
    layer.use_bias = True
    layer.bias = nnx.Param(jnp.linspace(0.5, 1, layer.kernel.shape[-1]))


def _dropped(self: Any, call: Any, x: jax.Array) -> jax.Array:
    y = call(self, x)
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, y.shape), y * 2, 0)


def _no_mean(self: Any, call: Any, x: jax.Array) -> jax.Array:
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
    last = (1,) * (x.ndim - 1) + (-1,)
    return y * self.scale.reshape(last) + self.bias.reshape(last)


def _unbiased(self: Any, call: Any, x: jax.Array) -> jax.Array:
    y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True, ddof=1) + self.epsilon)
    last = (1,) * (x.ndim - 1) + (-1,)
    return y * self.scale.reshape(last) + self.bias.reshape(last)


def _square(layer: Any) -> bool:
    shape = layer.kernel.shape
    return shape[-1] == shape[-2] > 1


def _size(layer: Any) -> int:
    return min((*layer.kernel_size, 99)) if isinstance(layer, CONVS) else 1


def _strides(layer: Any) -> int:
    strides = getattr(layer, "strides", 1)
    return strides if isinstance(strides, int) else max(strides or (1,))


def _has(name: str) -> Callable[[Any], bool]:
    return lambda layer: getattr(layer, name, None) is not None


def _spread(layer: Any) -> bool:
    return _size(layer) > 1 and _strides(layer) < _size(layer)


#: Mistakes in one layer: its kinds, where it makes sense, the change, what must be said, and the verdicts.
IN_LAYERS: dict[str, tuple[Any, Callable[[Any], bool], Callable[[Any], None], tuple[str, ...], tuple[Verdict, ...]]] = {
    "epsilon": (NORMS, _has("epsilon"), _set(epsilon=1e-3), ("epsilon is 0.001 in JAX",), (CONVENTION,)),
    "momentum": ((nnx.BatchNorm,), _has("mean"), _set(momentum=0.1), ("momentum",), (CONVENTION,)),
    "scale of ones": (NORMS, _has("scale"), _numbers("scale", jnp.ones_like), UNCONVERTED, (CONVENTION, BUG)),
    "bias of zeros": (
        (*NORMS, *LAYERS, CausalConv1d),
        _has("bias"),
        _numbers("bias", jnp.zeros_like),
        UNCONVERTED,
        (CONVENTION, BUG),
    ),
    "bias missing": (
        (*LAYERS, CausalConv1d),
        _has("bias"),
        _set(use_bias=False, bias=None),
        ("leaves the bias out", "JAX computes nothing where PyTorch computes add with"),
        (CONVENTION,),
    ),
    "extra bias": (
        LAYERS,
        lambda layer: layer.bias is None,
        _extra_bias,
        ("bias, a parameter that PyTorch has not", "the bias of channel", "JAX has a bias"),
        (CONVENTION, BUG),
    ),
    "axis of the norm": (
        (nnx.LayerNorm,),
        lambda layer: True,
        _set(reduction_axes=(1, 2)),
        ("normalizes over",),
        (CONVENTION,),
    ),
    "no mean": ((nnx.LayerNorm,), lambda layer: True, calls(_no_mean), ("does not subtract the mean",), (CONVENTION,)),
    "unbiased variance": ((nnx.LayerNorm,), lambda layer: True, calls(_unbiased), ("n - 1",), (CONVENTION,)),
    "groups of the norm": (
        (nnx.GroupNorm,),
        lambda layer: True,
        lambda layer: _set(num_groups=2, group_size=layer.scale.shape[0] // 2)(layer),
        ("2 groups",),
        (CONVENTION,),
    ),
    "norm left out": (
        NORMS,
        lambda layer: True,
        calls(lambda self, call, x: x),
        ("JAX computes nothing where PyTorch computes", "JAX lacks PyTorch's"),
        (CONVENTION,),
    ),
    "mean and variance exchanged": (
        (nnx.BatchNorm,),
        lambda layer: True,
        lambda layer: _exchange(layer, "mean", layer, "var"),
        ("has the numbers of",),
        (BUG, CONVENTION),
    ),
    "kernel flipped": (
        (*CONVS, CausalConv1d),
        lambda layer: _size(layer) > 1,
        _numbers("kernel", lambda k: jnp.flip(k, tuple(range(k.ndim - 2)))),
        ("flipped",),
        (CONVENTION,),
    ),
    "height and width exchanged": (
        CONVS,
        lambda layer: _size(layer) > 1,
        _numbers("kernel", lambda k: k.swapaxes(0, 1)),
        ("transposed", "height and width exchanged"),
        (CONVENTION,),
    ),
    "input and output channels exchanged": (
        LAYERS,
        _square,
        _numbers("kernel", lambda k: k.swapaxes(-1, -2)),
        ("transposed", "channels exchanged"),
        (CONVENTION,),
    ),
    "SAME padding": (
        CONVS,
        lambda layer: _strides(layer) > 1 and _spread(layer),
        _set(padding="SAME"),
        ("SAME",),
        (CONVENTION,),
    ),
    "no padding": (CONVS, _spread, _set(padding="VALID"), ("no padding", "padding", "shape"), (CONVENTION, BUG)),
    "dilation": (
        CONVS,
        lambda layer: _spread(layer) and _strides(layer) == 1,
        lambda layer: _set(kernel_dilation=2, padding=_size(layer) - 1)(layer),
        ("dilation",),
        (CONVENTION,),
    ),
    "stride": (
        CONVS,
        lambda layer: _strides(layer) == 2 and _spread(layer),
        _set(strides=1),
        ("stride",),
        (CONVENTION, BUG),
    ),
    "half precision": (
        (*LAYERS, CausalConv1d, nnx.LayerNorm, nnx.BatchNorm),
        lambda layer: True,
        _set(dtype=jnp.bfloat16),
        ("in bfloat16",),
        (PRECISION,),
    ),
    "one ULP": (
        LAYERS,
        lambda layer: True,
        _numbers("kernel", _one_ulp),
        ("other bits in 1 of", "by at most 1 ULP"),
        (BUG,),
    ),
    "one number": (LAYERS, lambda layer: True, _numbers("kernel", _one_doubled), ("other bits in 1 of",), (BUG,)),
    "two output channels exchanged": (
        LAYERS,
        lambda layer: layer.kernel.shape[-1] > 1,
        _numbers("kernel", _two_swapped),
        ("output channels", "permuted", "other order", "channels"),
        (BUG, CONVENTION),
    ),
    "dropout on": ((*NORMS, nnx.Linear), lambda layer: True, calls(_dropped), ("dropout is on",), (CONVENTION,)),
}


#: Mistakes that change the size of a result, which JAX may refuse.
RESIZING = {"no padding", "stride", "stride in the wrong place"}


def _exchange(one: Any, name: str, other: Any, its: str) -> None:
    a, b = getattr(one, name), getattr(other, its)
    a[...], b[...] = b[...], a[...]


def at(model: Any, path: str) -> Any:
    for part in path.split(".") if path else ():
        model = (
            model[int(part)]
            if part.isdecimal()
            else (model[part] if isinstance(model, nnx.Dict) else getattr(model, part))
        )
    return model


def _paths(model: Any) -> dict[str, Any]:
    return {".".join(map(str, path)): part for path, part in nnx.iter_modules(model)}


def in_layers(model: Any) -> Iterator[Plant]:
    """Yield every mistake of one layer at every place where it makes sense."""
    for path, layer in _paths(model).items():
        for kind, (kinds, makes_sense, change, said, verdicts) in IN_LAYERS.items():
            has_axes = kind != "axis of the norm" or "head" not in path  # the mean has taken them
            if isinstance(layer, kinds) and makes_sense(layer) and has_axes:
                where = path
                if kind == "dropout on":  # it is one operation with what follows
                    where = ".".join(path.split(".")[:-1][:2])

                def plant(model: Any, _: Any, path: str = path, change: Any = change) -> None:
                    change(at(model, path))

                yield Plant(kind, path, plant, (where,), said, verdicts)


def _shapes(layer: Any) -> Any:
    return type(layer), jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer)))


def between_layers(model: Any) -> Iterator[Plant]:
    """Yield exchanges of equal blocks, and of the weights of equal layers."""
    paths = _paths(model)
    for path, part in paths.items():
        if isinstance(part, (nnx.List, nnx.Dict)):
            keys = list(range(len(part))) if isinstance(part, nnx.List) else list(part)
            for a, b in itertools.pairwise(keys):
                if not isinstance(part[a], (nnx.List, nnx.Dict)) and _shapes(part[a]) == _shapes(part[b]):

                    def swap(model: Any, _: Any, path: str = path, a: Any = a, b: Any = b) -> None:
                        part = at(model, path)
                        part[a], part[b] = part[b], part[a]

                    yield Plant("order of blocks", path, swap, (path,), ("has the numbers of", "it reads"), (BUG,))
    layers = [(path, layer) for path, layer in paths.items() if isinstance(layer, LAYERS)]
    for (path, one), (its, other) in itertools.combinations(layers, 2):
        if _shapes(one) == _shapes(other):

            def exchange(model: Any, _: Any, path: str = path, its: str = its) -> None:
                _exchange(at(model, path), "kernel", at(model, its), "kernel")

            yield Plant("weights exchanged", path, exchange, (path, its), ("has the numbers of",), (BUG,))
    for path, part in paths.items():
        for name, value in vars(part).items():
            if isinstance(value, nnx.Param) and not isinstance(part, (*NORMS, *LAYERS, CausalConv1d, nnx.Embed)):
                place = f"{path}.{name}" if path else name

                def ones(model: Any, _: Any, path: str = path, name: str = name) -> None:
                    _numbers(name, lambda a: jnp.full_like(a, 0.25))(at(model, path))

                yield Plant(
                    "parameter not converted",
                    place,
                    ones,
                    (path,),
                    ("has other numbers than", "number is"),
                    (BUG, CONVENTION),
                )


class _Patched(types.SimpleNamespace):
    """A module of functions, some of them others."""

    def __init__(self, module: Any, **functions: Any) -> None:
        super().__init__(**functions)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


#: Mistakes in the call of a function: its module in the port, its name, the other function, and what must be said.
IN_CALLS: dict[str, tuple[str, str, Callable[..., Any], tuple[str, ...]]] = {
    "tanh of GELU": ("nnx", "gelu", lambda x, **_: nnx.gelu(x), ("gelu (tanh) where PyTorch computes gelu",)),
    "ReLU for GELU": ("nnx", "gelu", lambda x, **_: nnx.relu(x), ("relu where PyTorch computes gelu",)),
    "no GELU": ("nnx", "gelu", lambda x, **_: x, ("nothing where PyTorch computes gelu",)),
    "ReLU6 for ReLU": ("nnx", "relu", lambda x: nnx.relu6(x), ("JAX computes relu6 where PyTorch computes",)),
    "SiLU for ReLU": ("nnx", "relu", lambda x: nnx.silu(x), ("silu where PyTorch computes relu",)),
    "no ReLU": ("nnx", "relu", lambda x: x, ("nothing where PyTorch computes relu",)),
    "leaky ReLU for ReLU": ("nnx", "relu", lambda x: nnx.leaky_relu(x), ("leaky relu where PyTorch computes relu",)),
    "hard swish for SiLU": ("nnx", "silu", lambda x: nnx.hard_swish(x), ("hard swish where PyTorch computes silu",)),
    "sigmoid for SiLU": ("nnx", "silu", lambda x: nnx.sigmoid(x), ("sigmoid where PyTorch computes silu",)),
    "GELU for SiLU": ("nnx", "silu", lambda x: nnx.gelu(x), ("gelu (tanh) where PyTorch computes silu",)),
    "no SiLU": ("nnx", "silu", lambda x: x, ("nothing where PyTorch computes silu",)),
    "hard sigmoid for sigmoid": (
        "nnx",
        "sigmoid",
        lambda x: nnx.hard_sigmoid(x),
        ("hard sigmoid where PyTorch computes sigmoid",),
    ),
    "no sigmoid": ("nnx", "sigmoid", lambda x: x, ("nothing where PyTorch computes sigmoid",)),
    "ReLU for softplus": ("nnx", "softplus", lambda x: nnx.relu(x), ("relu where PyTorch computes softplus",)),
    "no softplus": ("nnx", "softplus", lambda x: x, ("nothing where PyTorch computes softplus",)),
    "exp for softplus": ("nnx", "softplus", jnp.exp, ("exp where PyTorch computes softplus",)),
    "padding of max pooling": (
        "nnx",
        "max_pool",
        lambda x, window, strides, padding: nnx.max_pool(x, window, strides, padding="SAME"),
        ("JAX pads by SAME",),
    ),
    "average for max pooling": (
        "nnx",
        "max_pool",
        lambda x, window, strides, padding: nnx.avg_pool(x, window, strides, padding=padding),
        ("where PyTorch computes max pool",),
    ),
    "padding counted": (
        "nnx",
        "avg_pool",
        lambda x, window, padding, count_include_pad: nnx.avg_pool(x, window, padding=padding),
        ("JAX counts the padding",),
    ),
    "max for average pooling": (
        "nnx",
        "avg_pool",
        lambda x, window, padding, count_include_pad: nnx.max_pool(x, window, padding=padding),
        ("where PyTorch computes average pool", "max pool"),
    ),
    "scale of attention": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=1.0),
        ("JAX scales by 1",),
    ),
    "scale of attention, 1 / d": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, scale=1 / q.shape[-1]),
        ("JAX scales by 1 / d",),
    ),
    "causal mask": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True),
        ("masks the future",),
    ),
    "q and k exchanged": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(k, q, v),
        ("exchanges query and key",),
    ),
    "k and v exchanged": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(q, v, k),
        ("exchanges key and value",),
    ),
    "q and v exchanged": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(v, k, q),
        ("exchanges query and value",),
    ),
    "heads and tokens exchanged": (
        "jax.nn",
        "dot_product_attention",
        lambda q, k, v: jax.nn.dot_product_attention(*(a.swapaxes(1, 2) for a in (q, k, v))).swapaxes(1, 2),
        ("attention", "heads"),
    ),
    "no exp of A": ("jnp", "exp", lambda x: x, ("lacks PyTorch's exp",)),
    "parts in another order": (
        "jnp",
        "concatenate",
        lambda arrays, axis: jnp.concatenate(arrays[::-1], axis),
        ("order", "other order", "exchanges"),
    ),
}


def in_calls(port: Any, model: Any, inputs: Sequence[Any]) -> Iterator[Plant]:
    """Yield every mistake in the call of a function, at each of its calls."""
    sites: dict[tuple[str, str], list[tuple[str, int]]] = {}
    wanted = {(module, name) for module, name, *_ in IN_CALLS.values()}

    def noting(module: str, name: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            frame = sys._getframe(1)
            site = getattr(frame.f_locals.get("self"), "own_path", None)
            found = sites.setdefault((module, name), [])
            if site is not None and (site, frame.f_lasti) not in found:
                found.append((site, frame.f_lasti))
            return original[module, name](*args, **kwargs)

        return noted

    original = {key: _function(port, *key) for key in wanted if _function(port, *key) is not None}
    kept = dict(vars(port))
    try:
        _patch(port, {key: noting(*key) for key in original}, setattr)
        traced = nnx.clone(model)
        for path, part in _paths(traced).items():
            part.own_path = path
        nnx.eval_shape(lambda model, *given: model(*given), traced, *inputs)
    finally:
        for name in ("nnx", "jax", "jnp"):
            if name in kept:
                setattr(port, name, kept[name])
    for kind, (module, name, other, said) in IN_CALLS.items():
        for path, place in sites.get((module, name), ()):

            def change(
                model: Any,
                monkeypatch: Any,
                path: str = path,
                place: int = place,
                key: Any = (module, name),
                other: Any = other,
            ) -> None:
                target = at(model, path)
                target.is_planted = True

                def called(*args: Any, **kwargs: Any) -> Any:
                    frame = sys._getframe(1)
                    here = getattr(frame.f_locals.get("self"), "is_planted", False) and frame.f_lasti == place
                    return (other if here else original[key])(*args, **kwargs)

                _patch(port, {key: called}, monkeypatch.setattr)

            yield Plant(kind, path, change, (path,), said, (CONVENTION, BUG))


def _function(port: Any, module: str, name: str) -> Any:
    first, *rest = module.split(".")
    found = getattr(port, first, None)
    for part in (*rest, name):
        found = getattr(found, part, None)
    return found


def _patch(port: Any, functions: dict[tuple[str, str], Any], assign: Callable[[Any, str, Any], None]) -> None:
    """Give a port other modules of functions."""
    by_module: dict[str, dict[str, Any]] = {}
    for (module, name), function in functions.items():
        by_module.setdefault(module, {})[name] = function
    for module, some in by_module.items():
        first, *rest = module.split(".")
        old = getattr(port, first)
        if rest:
            some = {rest[0]: _Patched(getattr(old, rest[0]), **some)}
        assign(port, first, _Patched(old, **some))


def _with_input(of: Callable[[jax.Array], jax.Array]) -> Callable[[Any, Any], None]:
    return lambda model, _: calls(lambda self, call, x: call(self, of(x)))(model)


def at_the_root(model: Any) -> Iterator[Plant]:
    """Yield other treatments of an image."""
    for kind, of, said in (
        ("mean and deviation of the input", lambda x: (x - 0.5) / 0.25, ("sub and then div",)),
        ("input of bytes", lambda x: x / 255, ("div", "multiply", "mul")),
        ("channels of the input", lambda x: x[..., ::-1], ("order of the input's channels", "channels")),
        ("height and width of the input", lambda x: x.swapaxes(1, 2), ("height and width", "transposed")),
    ):
        yield Plant(
            kind,
            "",
            _with_input(of),
            ("",),
            said,
            (CONVENTION, BUG),
        )


def chosen(port: Any, own: Sequence[Plant], model: Any, inputs: Sequence[Any], count: int) -> list[Plant]:
    """Return as many plants of a port: each kind once, then again at other places, and the same ones in every run."""
    plants = [*in_layers(model), *between_layers(model), *in_calls(port, model, inputs), *own]
    if np.ndim(inputs[0]) == 4:
        plants += at_the_root(model)
    by_kind: dict[str, list[Plant]] = {}
    for plant in plants:
        by_kind.setdefault(plant.kind, []).append(plant)
    rng = random.Random(port.__name__)
    for each in by_kind.values():
        rng.shuffle(each)
    found: list[Plant] = []
    while len(found) < count and any(by_kind.values()):
        for kind, each in by_kind.items():
            while each and len(found) < count:
                plant = each.pop()
                if kind not in RESIZING or _runs(plant, model, inputs):
                    found.append(plant)
                    break
    return found


def _runs(plant: Plant, model: Any, inputs: Sequence[Any]) -> bool:
    """Return False for a mistake that JAX refuses, as shapes do not fit."""
    changed = nnx.clone(model)
    plant.change(changed, None)
    try:
        nnx.eval_shape(lambda model, *given: model(*given), changed, *inputs)
    except (TypeError, ValueError):
        return False
    return True
