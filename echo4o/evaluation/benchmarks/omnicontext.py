"""OmniContext (arXiv 2506.18871): images from reference images, 8 tasks, two judgements per image."""

from pathlib import Path
from typing import Any

from echo4o.common.files import write_text
from echo4o.evaluation.benchmarks.base import (
    Aspect,
    Benchmark,
    BenchmarkPrompt,
    Grade,
    Verdict,
    known_field,
    text_field,
)
from echo4o.evaluation.metrics.omnicontext import formula

REPOSITORY = "OmniGen2/OmniContext"


class PromptFollowing(Verdict):
    prompt_following: Grade


class SubjectConsistency(Verdict):
    subject_consistency: Grade


class OmniContext(Benchmark):
    name = "omnicontext"
    title = "OmniContext"
    groups = formula.TASKS
    aspects = (
        Aspect("prompt_following", "omnicontext_prompt_following.md", PromptFollowing, shows_references=True),
        Aspect("subject_consistency", "omnicontext_subject_consistency.md", SubjectConsistency, shows_references=True),
    )
    scale = 10.0
    published_as = "score_6_tasks"

    def read_row(self, row: dict, number: int, folder: Path) -> BenchmarkPrompt:
        """Reads a row with the fields of this project, or of the original converter (`ins_en`, `ori_img`; `images/<task>/`)."""
        task = known_field(row, "task_type", self.groups)
        text = text_field(row, "instruction" if "instruction" in row else "ins_en")
        names = row.get("input_images", row.get("ori_img"))
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError('"input_images" must list at least one image file')
        references = tuple(_find(folder, task, name) for name in names)
        key = str(row.get("key", row.get("id", number)))
        return BenchmarkPrompt(key, task, text, task, {"references": len(references)}, references)

    def question(self, prompt: BenchmarkPrompt) -> dict[str, Any]:
        return {
            "instruction": prompt.text,
            "task": prompt.group,
            "scene": prompt.group.startswith("scene_"),
            "references": len(prompt.references),
        }

    def sample_score(self, scores: dict[str, float]) -> float:
        return formula.sample_score(**scores)

    def aggregates(self, counts: dict[str, int]) -> dict[str, dict[str, float]]:
        return formula.aggregates(counts)


def _find(folder: Path, task: str, name: str) -> Path:
    for path in (folder / name, folder / "images" / name, folder / "images" / task / name):
        if path.is_file():
            return path.resolve()
    raise ValueError(f"the reference image {name} is not in {folder}")


def download(revision: str | None, cache: Path) -> Path:
    """Downloads the official prompts at a commit of the Hub into `cache`; returns the prompt file."""
    import json
    import re

    if not revision or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            f"omnicontext: pass --prompts FILE, or --revision with the 40-digit commit of the Hub dataset {REPOSITORY} "
            "to download; no commit is pinned, because none could be verified"
        )
    folder = cache / f"omnicontext-{revision}"
    file = folder / "prompts.jsonl"
    if file.is_file():
        return file
    from datasets import load_dataset

    from echo4o.modeling.common.image_files import to_rgb

    rows = []
    dataset = load_dataset(REPOSITORY, revision=revision, split="train")
    for sample in map(dict, dataset):
        names = [f"{sample['key']}_{i}.png" for i in range(len(sample["input_images"]))]
        target = folder / "images" / sample["task_type"]
        target.mkdir(parents=True, exist_ok=True)
        for name, image in zip(names, sample["input_images"]):
            to_rgb(image, name).save(target / name)
        keep = {name: sample[name] for name in ("key", "task_type", "instruction")}
        rows.append(json.dumps(keep | {"input_images": names}, ensure_ascii=False))
    write_text(file, "\n".join(rows) + "\n", shared=True)
    return file
