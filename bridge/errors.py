"""The error of an implementation that fails: below all that runs implementations."""


class ImplementationError(RuntimeError):
    """An implementation failed, or returned something of another shape or dtype; the message names it."""
