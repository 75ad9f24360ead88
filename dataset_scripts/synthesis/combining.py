"""Multi-reference: samples reference images by subject type and writes an instruction that combines them."""

import random
import re
from dataclasses import dataclass

from echo4o.dataset_scripts.synthesis import wording
from echo4o.dataset_scripts.synthesis.calls import UnusableAnswer
from echo4o.dataset_scripts.synthesis.recipe import MultiReferenceSettings
from echo4o.dataset_scripts.synthesis.references import ReferenceImage, ReferenceImages, open_references
from echo4o.dataset_scripts.synthesis.rows import Instruction, PlannedRow, RowSteps, listed, one_line


@dataclass(frozen=True)
class MultiReferenceChain:
    """The settings of this part with the reference images."""

    recipe: MultiReferenceSettings
    references: ReferenceImages

    part = "multi_reference"

    @classmethod
    def load(cls, recipe: MultiReferenceSettings) -> "MultiReferenceChain":
        references = open_references(recipe.references)
        available = sum(len(images) for images in references.by_type.values()) - max(0, references.count("scene") - 1)
        if available < recipe.most:
            raise ValueError(
                f"{recipe.references.path}: a row uses up to {recipe.most} reference images, at most one of them a "
                f"scene, but the source has {available}; add images or lower multi_reference.most"
            )
        return cls(recipe, references)

    def hashes(self) -> dict[str, str]:
        return {"references": self.references.fingerprint}

    def sketch(self, number: int, rng: random.Random) -> dict:
        """Samples two to four reference images; at most one is a scene, which is the last."""
        wanted = rng.randint(self.recipe.least, self.recipe.most)
        others = [kind for kind in self.references.by_type if kind != "scene"]
        chosen: list[ReferenceImage] = []
        scenes = self.references.by_type.get("scene", ())
        left = {kind: list(self.references.by_type[kind]) for kind in others}
        with_scene = bool(scenes) and (rng.random() < 0.5 or sum(map(len, left.values())) < wanted)
        while len(chosen) < wanted - with_scene:
            kind = rng.choice([kind for kind in others if left[kind]])
            chosen.append(left[kind].pop(rng.randrange(len(left[kind]))))
        if with_scene:
            chosen.append(rng.choice(scenes))
        return {"references": chosen, "template": _template(chosen, rng)}

    def check(self, task: PlannedRow) -> None:
        """Raises ValueError if a reference image of the row cannot be decoded."""
        for image in task.sketch["references"]:
            self.references.check(image)

    async def instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        """Writes the instruction of a sketch."""
        chosen, text = task.sketch["references"], task.sketch["template"]
        about = [{"type": p.kind, "label": p.label, "source": p.source} for p in chosen]
        steps.keep("references", result={"references": about, "template": text})
        images = listed([f"image {n}" for n in range(1, len(chosen) + 1)])
        prompt = wording.COMBINE.format(instruction=text, images=images)
        text = await steps.write("instruction", prompt, lambda answer: _naming_all(answer, len(chosen)))
        data = tuple(self.references.read(image) for image in chosen)
        note = f"The picture follows this: {task.sketch['template']}"
        category = "+".join(p.kind for p in chosen)
        return Instruction(text, category, (), note, data, {"references": about, "template": task.sketch["template"]})


def _template(chosen: list[ReferenceImage], rng: random.Random) -> str:
    def take(number: int, image: ReferenceImage) -> str:
        return f"{wording.TAKES[image.kind].format(label=image.label)} from image {number}"

    taken = [take(n, p) for n, p in enumerate(chosen, start=1) if p.kind != "scene"]
    scene = f", with the place from image {len(chosen)} as its scene" if chosen[-1].kind == "scene" else ""
    words = wording.TOGETHER if len(taken) > 1 else wording.ALONE
    return rng.choice(words).format(things=listed(taken), scene=scene)


def _naming_all(answer: str, count: int) -> str:
    text = one_line(answer)
    named = {int(number) for number in re.findall(r"\bimage (\d+)\b", text.casefold())}
    if named != set(range(1, count + 1)):
        found = ", ".join(map(str, sorted(named))) or "none"
        raise UnusableAnswer(f"the instruction names the images {found} instead of 1 to {count}")
    return text
