"""Pushes exports of checkpoints to the Hub while training goes on (recipe section `hub`).

Each upload is a process of its own: `python -m echo4o.training.hub_uploads CHECKPOINT_OR_RESULT REPO STEP`. A fault of the
network ends that process and is reported; it never stops the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from echo4o.training.recipe import TrainingRecipe

LOG = "hub.log"
LAST_SECONDS = 3600  # that a run waits at its end for its uploads


class HubUploads:
    """The uploads of a run, one at a time. Use it on the main process only."""

    def __init__(self, recipe: TrainingRecipe):
        assert recipe.hub is not None
        self.repo, self.log = recipe.hub.repo, recipe.output_dir / LOG
        self._running: subprocess.Popen | None = None
        self._step = 0

    def start(self, folder: Path, step: int) -> None:
        """Begin to push a checkpoint; it is left out while another upload runs."""
        if self._running is not None and self._running.poll() is None:
            tqdm.write(f"hub: step {step} is not pushed, because step {self._step} is still on its way")
            return
        self._report()
        # The export runs on the CPU, beside the training, and must not take part in its process group.
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "echo4o.training.hub_uploads", str(folder), self.repo, str(step)]
        with open(self.log, "ab") as log:
            self._running = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self._step = step

    def finish(self, folder: Path, step: int) -> None:
        """Push the result and wait for it."""
        self._wait()
        self.start(folder, step)
        self._wait()
        self._report()

    def _wait(self) -> None:
        if self._running is not None:
            try:
                self._running.wait(LAST_SECONDS)
            except subprocess.TimeoutExpired:
                self._running.kill()
                self._running.wait()

    def _report(self) -> None:
        if self._running is None:
            return
        if self._running.returncode:
            tqdm.write(f"hub: step {self._step} could not be pushed; see {self.log}")
        else:
            tqdm.write(f"hub: step {self._step} is at {self.repo}")
        self._running = None


def upload(folder: Path, repo: str, step: int) -> None:
    """Push a result, or the export of a checkpoint, in one commit. A new repository is private."""
    from huggingface_hub import HfApi

    from echo4o.training.checkpoints import STATE, Checkpoint
    from echo4o.training.export import export_checkpoint

    with tempfile.TemporaryDirectory() as work:
        if (folder / STATE).is_file():
            # Links keep the files of the checkpoint while the run removes old ones.
            kept = Path(work) / folder.name
            for file in (file for file in folder.rglob("*") if file.is_file()):
                target = kept / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                _link(file, target)
            folder = export_checkpoint(Checkpoint(kept), Path(work) / "export")
        api = HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message=f"Step {step}")


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system
        import shutil

        shutil.copyfile(file, target)


def main(arguments: list[str]) -> int:
    folder, repo, step = arguments
    try:
        upload(Path(folder), repo, int(step))
    except Exception as error:  # every fault of the network, the Hub or a disk; the run goes on
        print(f"step {step}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
        return 1
    print(f"step {step}: pushed to {repo}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
