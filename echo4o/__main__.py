"""``python -m echo4o`` is the ``echo4o`` command."""

from echo4o.cli import main

if __name__ == "__main__":
    main()
