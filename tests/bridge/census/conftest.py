"""`bridge.census` is a package and the function in it."""

# Before pytest collects the package: were it imported first, pytest would put it in the place of the function.
import bridge  # noqa: F401
