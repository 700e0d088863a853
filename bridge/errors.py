"""The error of an implementation that fails, and errors in one line: below all that runs other people's code."""


class ImplementationError(RuntimeError):
    """An implementation failed, or returned something of another shape or dtype; the message names it."""


def first_line(error: BaseException) -> str:
    """Return the type of an error and the first line of its message that is not empty.

    >>> first_line(KeyError("conv")), first_line(ValueError())
    ("KeyError: 'conv'", 'ValueError')
    """
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
