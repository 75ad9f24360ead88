"""`python -m tests.parity DIR`"""

from __future__ import annotations

import argparse
import sys

from .run import FILES, REST, run


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when every check passes, 1 when one fails, 2 when the directory cannot be checked at all."""
    known = "".join([*FILES, REST])  # the last: the manifest and all the rest
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("directory", help="a golden directory (tests/parity/golden, or one of the same form)")
    parser.add_argument("--only", metavar="LETTERS", help=f"check only files that begin so: {known}")
    options = parser.parse_args(arguments)
    if options.only and set(options.only) - set(known):
        parser.error(f"--only takes letters of {known}, got {options.only!r}.")
    try:
        report = run(options.directory, only=options.only)
    except FileNotFoundError as error:
        parser.error(str(error))
    return 1 if report.failures or not report.rows else 0


if __name__ == "__main__":
    sys.exit(main())
