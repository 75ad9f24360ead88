"""`python -m tests.parity DIR`"""

from __future__ import annotations

import argparse
import sys

from .run import FILES, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument("directory", help="a golden directory (tests/parity/golden, or one of the same form)")
    parser.add_argument("--only", metavar="LETTERS", help=f"check only these files, of {''.join(sorted(FILES))}")
    arguments = parser.parse_args()
    if arguments.only and set(arguments.only) - set(FILES):
        parser.error(f"--only takes letters of {''.join(sorted(FILES))}, got {arguments.only!r}.")
    try:
        report = run(arguments.directory, only=arguments.only)
    except FileNotFoundError as error:
        parser.error(str(error))
    return 1 if report.failures or not report.rows else 0


if __name__ == "__main__":
    sys.exit(main())
