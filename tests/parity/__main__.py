"""`python -m tests.parity DIR`"""

from __future__ import annotations

import argparse
import sys

from .forms import FORMS, UnknownForm, form_of
from .run import REST, run


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when every check passes, 1 when one fails, 2 when the directory cannot be checked at all."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument(
        "directory", help=f"a golden directory, of one of these forms: {', '.join(FORMS)} (tests/parity/golden is one)"
    )
    parser.add_argument(
        "--only",
        metavar="KINDS",
        help=f"check only files that begin so: letters, or words with commas; {REST}: the rest",
    )
    options = parser.parse_args(arguments)
    try:
        known = [*FORMS[form_of(options.directory)].checks, REST]
        only = _kinds(options.only, known) if options.only else None
        if only and set(only) - set(known):
            parser.error(f"--only takes {', '.join(known)}, got {options.only!r}.")
        report = run(options.directory, only=only)
    except UnknownForm as error:
        parser.error(str(error))
    return 1 if report.failures or not report.rows else 0


def _kinds(text: str, known: list[str]) -> list[str]:
    return text.split(",") if "," in text or text in known else list(text)


if __name__ == "__main__":
    sys.exit(main())
