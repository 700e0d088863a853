"""The options that describe a convolution, and the case that they make: random data, or the user's files."""

from __future__ import annotations

import contextlib
import enum
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bridge.case import DTYPES, Case
from bridge.cli.parse import parse_one_or_each, parse_padding, parse_sizes
from bridge.files import read_npy
from bridge.progress import log
from jaxdw.geometry import Geometry

#: The question's own case: what a command takes where no option describes another.
QUESTION = {"shape": "2x5x5x3", "kernel_size": "3x3", "padding": "1"}

#: Elements of the largest array that the command makes: 16 GiB of float64.
MOST_ELEMENTS = 1 << 31


class Layout(enum.StrEnum):
    """The order of axes in the user's files."""

    CHANNELS_LAST = "channels_last"
    CHANNELS_FIRST = "channels_first"

    def input(self, x: np.ndarray) -> np.ndarray:
        """Return an input of this layout with its channels last."""
        return x if self is Layout.CHANNELS_LAST or x.ndim < 3 else np.moveaxis(x, 1, -1)

    def kernel(self, w: np.ndarray) -> np.ndarray:
        """Return a kernel of this layout with its features last, and one input channel before them."""
        return w if self is Layout.CHANNELS_LAST or w.ndim < 3 else np.moveaxis(w, (0, 1), (-1, -2))


_SHAPE = "Shape of the input: batch, sizes, channels, as 2x5x5x3 or 2,5,5,3."
_KERNEL_SIZE = "As 3x3 or 3,3; one number per axis."
_PADDING = "SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL, 1, 1,2 or 0:1,0:1."


@dataclass
class GeometryOptions:
    """The options that describe a convolution without its data; the defaults are a layer of MobileNet."""

    shape: Annotated[str, typer.Option(help=_SHAPE)] = "8x56x56x144"
    kernel_size: Annotated[str, typer.Option(help=_KERNEL_SIZE)] = "3x3"
    strides: Annotated[str, typer.Option(help="One number, or one per axis as 2,1 or 2x1.")] = "1"
    padding: Annotated[str, typer.Option(help=_PADDING)] = "1"
    dilation: Annotated[str, typer.Option(help="Kernel dilation: one number, or one per axis.")] = "1"
    multiplier: Annotated[int, typer.Option(help="Output channels per input channel.", min=1)] = 1
    bias: Annotated[bool, typer.Option("--bias/--no-bias", help="Add a bias.")] = False

    def settings(self) -> dict[str, Any]:
        """Return strides, padding and kernel dilation, as `Case` and `Geometry.of` take them."""
        return {
            "strides": parse_one_or_each("--strides", self.strides),
            "padding": parse_padding(self.padding or QUESTION["padding"]),
            "kernel_dilation": parse_one_or_each("--dilation", self.dilation),
        }

    def geometry(self) -> Geometry:
        """Return the geometry. Raises ValueError where an option makes no sense, or an array would be too large."""
        sizes = parse_sizes("--shape", self.shape)
        kernel = (*parse_sizes("--kernel-size", self.kernel_size), 1, sizes[-1] * self.multiplier)
        geometry = Geometry.of(sizes, kernel, **self.settings())
        self.check_affordable(sizes)
        self.check_affordable(geometry.output_shape, geometry.padded_spatial)
        return geometry

    def check_affordable(self, sizes: tuple[int, ...], padded: tuple[int, ...] = ()) -> None:
        """Refuse what no memory holds, before it is asked for."""
        for option, text, shape in (("--padding", self.padding, padded), ("--shape", self.shape, sizes)):
            if math.prod(shape) > MOST_ELEMENTS:
                raise ValueError(
                    f"`{option}` is {text!r}, which makes an array of {shape}, "
                    f"expected {MOST_ELEMENTS} elements at most"
                )


@dataclass
class CaseOptions(GeometryOptions):
    """The options that describe a convolution with its data. Without any of them it is the question's own case."""

    shape: Annotated[str, typer.Option(help=_SHAPE, show_default=QUESTION["shape"])] = ""
    kernel_size: Annotated[str, typer.Option(help=_KERNEL_SIZE, show_default=QUESTION["kernel_size"])] = ""
    padding: Annotated[str, typer.Option(help=_PADDING, show_default=QUESTION["padding"])] = ""
    dtype: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(DTYPES)}; files are converted to it. Default: the dtype of the files, else float32."
        ),
    ] = ""
    seed: Annotated[int, typer.Option(help="Seed of the random numbers, where no file is given.", min=0)] = 0
    input: Annotated[Path | None, typer.Option(help="The input as .npy, instead of --shape.")] = None
    kernel: Annotated[Path | None, typer.Option(help="The kernel as .npy (*kernel_size, 1, channels*multiplier).")] = (
        None
    )
    layout: Annotated[
        Layout,
        typer.Option(
            help="Layout of --shape, --input and --kernel. channels_first is PyTorch's: input (batch, channels, "
            "*sizes), kernel (channels*multiplier, 1, *kernel_size)."
        ),
    ] = Layout.CHANNELS_LAST
    transposed: Annotated[
        bool,
        typer.Option(
            "--transposed",
            help="A transposed convolution. --strides, --padding (numbers, SAME or VALID) and a kernel of "
            "channels_first (channels, multiplier, *kernel_size) mean what they mean in PyTorch's ConvTranspose.",
        ),
    ] = False
    output_padding: Annotated[
        str, typer.Option(help="With --transposed: positions added at the end. One number, or one per axis.")
    ] = "0"

    def case(self) -> Case:
        """Return the case.

        Raises:
          ValueError: options make no sense, or contradict each other or the files; the message names them.
          OSError: a file cannot be read.
        """
        if self.dtype and self.dtype not in DTYPES:
            raise ValueError(f"`--dtype` is {self.dtype!r}, expected one of {', '.join(DTYPES)}")
        if self.shape and self.input is not None:
            raise ValueError("`--shape` and `--input` are both given, expected one of them")
        if self.kernel_size and self.kernel is not None:
            raise ValueError("`--kernel-size` and `--kernel` are both given, expected one of them")
        asked = any((self.shape, self.kernel_size, self.padding, self.input, self.kernel))
        rng = np.random.default_rng(self.seed)
        x = self._input(rng)
        kernel = self._kernel(rng, x)
        bias = np.asarray(rng.standard_normal(kernel.shape[-1])).astype(x.dtype) if self.bias else None
        settings = self.settings()
        added = parse_one_or_each("--output-padding", self.output_padding)
        make: Callable[..., Case] = Case
        if self.transposed:
            make, settings = Case.transposed, {**settings, "output_padding": added}
        elif added not in (0, (0,)):
            raise ValueError(
                f"`--output-padding` is {self.output_padding!r} without `--transposed`, expected both or none"
            )
        try:
            case = make(x, kernel, bias, **settings, name="" if asked or self.transposed else "The question's own case")
        except ValueError as error:
            raise ValueError(f"{error}{self._layout_hint(x, kernel, settings)}") from None
        self.check_affordable(case.geometry.output_shape, case.geometry.padded_spatial)
        return case

    def _input(self, rng: np.random.Generator) -> np.ndarray:
        if self.input is not None:
            x = self.layout.input(_load("--input", self.input, self.dtype))
            # 1 to 4 channels before two equal sizes
            if self.layout is Layout.CHANNELS_LAST and x.ndim == 4 and x.shape[1] <= 4 < x.shape[2] == x.shape[3]:
                read = f"`--input` is {self.input} of shape {x.shape}, read as {x.shape[-1]} channels last."
                log.warning("%s If it has PyTorch's layout, pass --layout %s", read, Layout.CHANNELS_FIRST)
            return x
        sizes = parse_sizes("--shape", self.shape or QUESTION["shape"])
        self.check_affordable(sizes)
        if self.shape and self.layout is Layout.CHANNELS_FIRST:
            sizes = (sizes[0], *sizes[2:], *sizes[1:2])
        return np.asarray(rng.standard_normal(sizes)).astype(DTYPES[self.dtype or "float32"])

    def _kernel(self, rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
        if self.kernel is not None:
            w = _load("--kernel", self.kernel, self.dtype or x.dtype.name)
            if self.transposed and self.layout is Layout.CHANNELS_FIRST and w.ndim > 2:
                w = w.reshape(-1, 1, *w.shape[2:])
            return self.layout.kernel(w)
        size = parse_sizes("--kernel-size", self.kernel_size or QUESTION["kernel_size"])
        return rng.standard_normal((*size, 1, x.shape[-1] * self.multiplier)).astype(x.dtype)

    def _layout_hint(self, x: np.ndarray, w: np.ndarray, settings: dict[str, Any]) -> str:
        """Return which files have the other layout, if the case makes sense with that; empty where it never does."""
        first = self.layout is Layout.CHANNELS_FIRST
        other = Layout.CHANNELS_LAST if first else Layout.CHANNELS_FIRST
        if x.ndim < 3 or w.ndim < 3 or self.transposed:
            return ""
        files = [option for option, path in (("--input", self.input), ("--kernel", self.kernel)) if path is not None]
        turned = {
            "--input": np.moveaxis(x, -1, 1) if first else other.input(x),
            "--kernel": np.moveaxis(w, (-2, -1), (1, 0)) if first else other.kernel(w),
        }
        for changed in (files, ["--kernel"], ["--input"]):
            if not changed or not set(changed) <= set(files):
                continue
            x_shape = (turned["--input"] if "--input" in changed else x).shape
            w_shape = (turned["--kernel"] if "--kernel" in changed else w).shape
            with contextlib.suppress(ValueError):
                Geometry.of(x_shape, w_shape, **settings)
                fit = "fits" if len(changed) == 1 else "fit"
                hint = f"; {' and '.join(f'`{each}`' for each in changed)} {fit} as {other}"
                if changed == files:
                    return f"{hint}: pass --layout {other}"
                axes = "np.moveaxis(x, 1, -1)" if changed == ["--input"] else "np.moveaxis(w, (0, 1), (-1, -2))"
                back = "np.moveaxis(x, -1, 1)" if changed == ["--input"] else "np.moveaxis(w, (-2, -1), (1, 0))"
                return f"{hint}: save {back if first else axes} instead, so that both files have one layout"
        return ""


def allow_depth(taps: int) -> None:
    """Let a tree of additions be walked that is as deep as a window has taps."""
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * taps))


def _load(option: str, path: Path, dtype: str) -> np.ndarray:
    """Return an array from .npy. Pickles are refused; two raw bytes are bfloat16, which .npy cannot name."""
    try:
        array = read_npy(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"`{option}` is {path}, expected an .npy file: it does not exist") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"`{option}` is {path}, expected an .npy file of numbers: {error}") from None
    if array.dtype == np.dtype("V2"):
        array = array.view(DTYPES["bfloat16"])
    if array.dtype not in DTYPES.values():
        raise TypeError(f"`{option}` is {path} with dtype {array.dtype}, expected one of {', '.join(DTYPES)}")
    return array.astype(DTYPES[dtype]) if dtype else array
