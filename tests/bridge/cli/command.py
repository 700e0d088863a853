"""The command in this process; no test is here."""

import typer.testing

from bridge import cli
from bridge._implementations import ImplementationError


def jaxdw(*arguments, **environment):
    """Exit code, standard output, and standard error or the one line of an error."""
    runner = typer.testing.CliRunner()
    result = runner.invoke(cli.app, [str(a) for a in arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        assert isinstance(result.exception, (ValueError, TypeError, OSError, ImplementationError)), result.exception
        return 2, result.stdout, str(result.exception)
    return result.exit_code, result.stdout, result.stderr
