"""Progress of a command: on a terminal the present step, elsewhere a plain line now and then.

`bridge` logs its steps to the logger "bridge", as any library does; nothing is shown unless a `Progress` is active.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, TypeVar

from rich.markup import escape
from rich.status import Status

from bridge.console import Console, printable

T = TypeVar("T")

log = logging.getLogger("bridge")

#: Seconds until the first plain line, and between two of them.
FIRST, BETWEEN = 2.0, 10.0


class Level(enum.IntEnum):
    """The amount of output."""

    QUIET = 0
    NORMAL = 1
    VERBOSE = 2


def track(items: Iterable[T], description: str) -> Iterator[T]:
    """Yield the items, and log the number of each one."""
    every: Sequence[T] = list(items)
    for number, item in enumerate(every, start=1):
        log.info("%s: %d of %d", description, number, len(every))
        yield item


def counted(items: Iterable[T], description: str) -> Iterator[T]:
    """Yield items as they are made, whose number is not known before, and log the number of each one."""
    for number, item in enumerate(items, start=1):
        log.info("%s: %d", description, number)
        yield item


class Progress(logging.Handler):
    """A logging handler that shows the steps that are logged while its block runs, on standard error.

    A terminal shows the present step. Elsewhere a line shows it after 2 s and then every 10 s. At level VERBOSE each
    step has a line. Each warning has a line. At level QUIET nothing is shown.

    Args:
      level: the amount of output.
      threaded: False where no thread may run beside what is measured: then lines come with the steps only.
    """

    #: The active instance, or the last one.
    current: ClassVar[Progress | None] = None

    def __init__(self, level: Level = Level.NORMAL, *, threaded: bool = True) -> None:
        super().__init__(logging.INFO)
        self.verbosity, self.threaded = level, threaded
        self.console = Console(stderr=True)
        self.began = self.told = time.monotonic()
        self.wait = FIRST
        self.step = ""
        self.status: Status | None = None
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def __enter__(self) -> Progress:
        self.before = log.level
        log.setLevel(logging.INFO)
        log.addHandler(self)
        log.propagate = False
        Progress.current = self
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.pause()
        log.removeHandler(self)
        log.setLevel(self.before)
        log.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        """Show a step or a warning."""
        text = printable(record.getMessage()).replace("\n", "\\n")  # names are anybody's
        if self.verbosity == Level.QUIET:
            return
        if record.levelno >= logging.WARNING:
            self.pause()
            self._line(text)
        elif self.verbosity == Level.VERBOSE:
            self._line(f"{time.monotonic() - self.began:.1f} s: {text}")
        else:
            self.step = text
            if not self.threaded:
                self._tell()
            elif self.console.is_terminal:
                self._show(text)
            elif self.thread is None:
                self.thread = threading.Thread(target=self._tell_now_and_then, daemon=True)
                self.thread.start()

    def pause(self) -> None:
        """Take the step off the terminal: a report is printed next."""
        self.step = ""
        if self.status is not None:
            self.status.stop()
            self.status = None

    def _show(self, text: str) -> None:
        if self.status is None:
            self.status = self.console.status(escape(text))
            self.status.start()
        else:
            self.status.update(escape(text))

    def _tell_now_and_then(self) -> None:
        while not self.ended.wait(0.5):
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if self.step and now - self.told >= self.wait:
            self.told, self.wait = now, BETWEEN
            self._line(f"{now - self.began:.0f} s: {self.step}")

    def _line(self, text: str) -> None:
        self.console.print(f"jaxdw: {text}", markup=False, highlight=False, soft_wrap=True)
