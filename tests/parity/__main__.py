"""`python -m tests.parity DIR`"""

from __future__ import annotations

import argparse
import sys

from .run import FILES, REST, run


def main() -> int:
    known = "".join([*FILES, REST])  # the last: the manifest and all the rest
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("directory", help="a golden directory (tests/parity/golden, or one of the same form)")
    parser.add_argument("--only", metavar="LETTERS", help=f"check only files that begin so: {known}")
    arguments = parser.parse_args()
    if arguments.only and set(arguments.only) - set(known):
        parser.error(f"--only takes letters of {known}, got {arguments.only!r}.")
    try:
        report = run(arguments.directory, only=arguments.only)
    except FileNotFoundError as error:
        parser.error(str(error))
    return 1 if report.failures or not report.rows else 0


if __name__ == "__main__":
    sys.exit(main())
