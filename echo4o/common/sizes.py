"""Parses and formats amounts of memory and disk."""

import re

_UNITS = " KMGT"


def parse_bytes(text: str) -> float:
    """`80GB` -> 8e10, `16GiB` -> 2**34. Raises ValueError for anything else, and for zero."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE | re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory: write 80GB or 16GiB.")
    number = float(match.group(1))
    if not number:
        raise ValueError(f"{text!r} is not an amount of memory above zero.")
    return number * (1024 if match.group(3) else 1000) ** _UNITS.index(match.group(2).upper())


def format_bytes(size: float) -> str:
    """Bytes in decimal units: `16.00 GB` from 100 MB on, `1.50 MB` below."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
