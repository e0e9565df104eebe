"""What test ranks do with finished models. Imported by the fork server: see ranks.py."""

import contextlib
from pathlib import Path


def command(arguments: list[str], output: str) -> tuple[int, str]:
    """`vitdist ARGUMENTS` in this rank: exit code and what it wrote."""
    from vitdist import cli

    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = cli.main(arguments)
    return code, Path(output).read_text()
