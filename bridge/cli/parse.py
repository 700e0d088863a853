"""Values of options, from the text that a user types."""

from __future__ import annotations

import re

from jaxdw.geometry import Padding


def parse_names(options: list[str] | None) -> list[str]:
    """Return the names that commas separate; a comma inside brackets separates nothing.

    >>> parse_names(["jax.taps, jax.grouped[dtype=bfloat16,precision=high]"])
    ['jax.taps', 'jax.grouped[dtype=bfloat16,precision=high]']
    """
    return [name.strip() for text in options or [] for name in re.split(r",(?![^\[]*\])", text) if name.strip()]


def parse_sizes(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of 3x3, of 3,3 and of (3, 3), as Python prints a shape.

    Raises:
      ValueError: the text is something else; the message names `option`.
    """
    inside = re.fullmatch(r"\((.*?),?\)|\[(.*)\]|(.*)", text.strip())
    parts = re.split(r" *[xX,] *", next((each for each in inside.groups() if each is not None), "") if inside else "")
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        example = "2x5x5x3 or 2,5,5,3" if option == "--shape" else "3x3 or 3,3"
        raise ValueError(f"`{option}` is {text!r}, expected sizes such as {example}")
    return tuple(int(part) for part in parts)


def parse_one_or_each(option: str, text: str) -> int | tuple[int, ...]:
    """Return one number, or one per axis. Raises as `parse_sizes`."""
    found = parse_sizes(option, text)
    return found[0] if len(found) == 1 else found


def parse_padding(text: str) -> Padding:
    """Return the padding of a word such as SAME, or of numbers such as 1, 1,2 or 0:1,0:1.

    Raises:
      ValueError: the text is something else.
    """
    if re.fullmatch(r"[A-Za-z_]+", text):
        return text.upper()
    if not re.fullmatch(r"-?\d+(:-?\d+)?(,-?\d+(:-?\d+)?)*", text):
        raise ValueError(f"`--padding` is {text!r}, expected a word such as SAME, or numbers such as 1, 1,2 or 0:1,0:1")
    axes = [[int(part) for part in axis.split(":")] for axis in text.split(",")]
    if len(axes) == 1 and len(axes[0]) == 1:
        return axes[0][0]
    return tuple(axis[0] if len(axis) == 1 else (axis[0], axis[1]) for axis in axes)
