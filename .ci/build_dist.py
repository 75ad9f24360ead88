"""Builds dist/*.whl and dist/*.tar.gz from the files that git tracks: `python .ci/build_dist.py [TAG]`.

With a tag (v1.2.3), it first checks that the version, CHANGELOG.md and CITATION.cff say the same.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version() -> str:
    (found,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "echo4o" / "__init__.py").read_text("utf-8"), re.M)
    return found


def check_tag(tag: str) -> list[str]:
    """What keeps the working tree from being the release `tag`."""
    problems = [f"the tag is {tag}, the version {version()}"] if tag != f"v{version()}" else []
    if not re.search(rf"^## {re.escape(version())} \(\d{{4}}-\d\d-\d\d\)$", (ROOT / "CHANGELOG.md").read_text(), re.M):
        problems.append(f"CHANGELOG.md has no dated section for {version()}")
    if f"version: {version()}\n" not in (ROOT / "CITATION.cff").read_text("utf-8"):
        problems.append(f"CITATION.cff does not name the version {version()}")
    return problems


def build(out: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, Path(folder) / name)
        out.mkdir(exist_ok=True)
        for kind in ("sdist", "wheel"):
            code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
            subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    problems = check_tag(sys.argv[1]) if len(sys.argv) > 1 else []
    if problems:
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
        return 1
    build(ROOT / "dist")
    print("\n".join(str(file.relative_to(ROOT)) for file in sorted((ROOT / "dist").iterdir())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
