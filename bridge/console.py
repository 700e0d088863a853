"""Text for the terminal: without control characters of other people's text, and each failure as one line."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import rich.console
import rich.errors
import rich.segment
import rich.text

from bridge.errors import ImplementationError
from bridge.memory import lack_of_memory
from bridge.process import PACKAGES, is_users

#: Control characters but for tab and newline (C0, C1), what is invisible or turns the direction of text, line and
#: paragraph separators, halves of surrogate pairs (file names that are not UTF-8), and tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

#: Limits of an error that is shown: lines, and characters per line.
_LINES, _CHARACTERS = 1000, 2000


def printable(text: str) -> str:
    r"""Return the text with every character that does not print as its escape.

    >>> printable("a\x1b[31mb\u202ec")
    'a\\x1b[31mb\\u202ec'
    """
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """A rich console that shows all text as `printable` does. Text with broken markup is shown as it is."""

    def render_str(self, text: str, **options: Any) -> rich.text.Text:
        text = printable(text)  # before its width is measured
        try:
            return super().render_str(text, **options)
        except rich.errors.MarkupError:
            return super().render_str(text, **{**options, "markup": False})

    def render(self, *arguments: Any, **options: Any) -> Iterable[rich.segment.Segment]:
        for segment in super().render(*arguments, **options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def complain(error: BaseException, *, verbose: bool = False) -> int:
    """Print why a command failed on standard error, verbosely with the traceback, and return its exit code."""
    if verbose:
        print(printable("".join(traceback.format_exception(error))), file=sys.stderr)
    lines = printable(_reason(error)).splitlines()
    if len(lines) > _LINES:
        lines[_LINES:] = [f"... and {len(lines) - _LINES} more lines"]
    for at, line in enumerate(lines):
        if len(line) > _CHARACTERS:
            lines[at] = f"{line[:_CHARACTERS]}... and {len(line) - _CHARACTERS} more characters"
    text = "jaxdw: " + "\n".join(lines) + "\n"
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding))
    return 2


def _reason(error: BaseException) -> str:
    if lack := lack_of_memory(error):
        return lack
    if callable(told := getattr(error, "format_message", None)):  # of the command line's own parser
        return f"{told()} (`--help` says what is accepted)"
    place = users_place(error)
    if place is not None:
        return f"{type(error).__name__} in {place}: {error}; --verbose shows the traceback"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, ImplementationError)):
        return str(error) or type(error).__name__
    line = next(iter(str(error).splitlines()), "")
    last = [*traceback.walk_tb(error.__traceback__)][-1:]
    where = "".join(f" in {_place(*each)}" for each in last)
    return f"{type(error).__name__}{where}: {line}. This is a bug in jaxdw; --verbose shows where"


def users_place(error: BaseException) -> str | None:
    """Return where the user's code raised an error, or where it called what did; None if jaxdw itself did."""
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        module = str(frame.f_globals.get("__name__", ""))
        if is_users(module):
            return _place(frame, line)
        if module.partition(".")[0] in PACKAGES:
            return None
    return None


def _place(frame: FrameType, line: int) -> str:
    return f"{Path(frame.f_code.co_filename).name}, line {line}"
