"""Run code in a process of its own that uses only a local Hub.

huggingface_hub reads its environment when it is imported, so code that talks to a
[`LoopbackHub`](hub.py) needs a fresh process:

    with LoopbackHub() as hub:
        hub.add_folder("owner/model", folder)
        run_script("from huggingface_hub import snapshot_download; snapshot_download('owner/model')",
                   env=hub.environment(tmp_path))
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

_HIDE = """
import sys
class _Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (hidden by the test)", name=name)
sys.meta_path.insert(0, _Hidden())
"""


def offline_environment(home: Path) -> dict[str, str]:
    """The environment without any Hub settings of the user: all caches under `home`, no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "DIFFUSERS_"))}
    return kept | {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def run_script(
    code: str, *args: str | Path, env: dict[str, str], hide: Iterable[str] = (), timeout: float = 240
) -> subprocess.CompletedProcess:
    """Run Python code in a new process whose working directory is `env["HF_HOME"]`.

    Args:
        code: the code; indentation that all lines share is removed.
        args: `sys.argv[1:]` of the code.
        env: the whole environment, such as that of [`offline_environment`].
        hide: packages that the code cannot import.
        timeout: seconds.

    Raises:
        AssertionError: the process failed; the message holds its output.
    """
    script = (_HIDE.format(hidden=set(hide)) if hide else "") + textwrap.dedent(code)
    command = [sys.executable, "-I", "-c", script, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, cwd=env["HF_HOME"])
    if done.returncode != 0:
        raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
