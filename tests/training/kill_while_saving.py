"""The command line, killed by the kernel in the middle of writing the checkpoint of step KILL_AT_STEP."""

import os
import signal

from echo4o.common import files

_write = files.write_json


def _killing(file, value):
    if f"step-{int(os.environ['KILL_AT_STEP']):08d}" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    _write(file, value)


files.write_json = _killing

if __name__ == "__main__":
    from echo4o.cli import main

    main()
