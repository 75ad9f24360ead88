"""Complex instruction following: samples a structure, writes it as a sentence, and paraphrases the sentence."""

import random
import re
from dataclasses import dataclass

from echo4o.dataset_scripts.synthesis import vocabulary, wording
from echo4o.dataset_scripts.synthesis.calls import UnusableAnswer
from echo4o.dataset_scripts.synthesis.recipe import InstructionFollowingSettings
from echo4o.dataset_scripts.synthesis.rows import Instruction, PlannedRow, RowSteps, article, listed, one_line
from echo4o.dataset_scripts.synthesis.vocabulary import Vocabulary, words_of

_PAIRS = (("left", "right"), ("above", "below"))
_OTHER_WORDS = ("left", "right", "top", "bottom", "upper", "lower", "larger", "smaller", "bigger")


@dataclass(frozen=True)
class InstructionFollowingChain:
    """The settings of this part with their vocabularies."""

    recipe: InstructionFollowingSettings
    objects: Vocabulary
    colours: Vocabulary
    backgrounds: Vocabulary

    part = "instruction_following"

    @classmethod
    def load(cls, recipe: InstructionFollowingSettings) -> "InstructionFollowingChain":
        objects = vocabulary.load("objects", recipe.objects, least=3)
        colours = vocabulary.load("colours", recipe.colours, least=3)
        return cls(recipe, objects, colours, vocabulary.shipped("backgrounds"))

    def hashes(self) -> dict[str, str]:
        return {"objects": self.objects.sha256, "colours": self.colours.sha256}

    def sketch(self, number: int, rng: random.Random) -> dict:
        """Samples the structure of a row, in the form of a GenEval++ prompt. Tags are used in turn."""
        tag = self.recipe.tags[number % len(self.recipe.tags)]
        include = self._structure(tag, rng)
        things = listed([self.phrase(item) for item in include])
        text = rng.choice(wording.FRAMES).format(things=things, background=rng.choice(self.backgrounds.words))
        return {"tag": tag, "include": include, "template": text[0].upper() + text[1:]}

    def _structure(self, tag: str, rng: random.Random) -> list[dict]:
        kinds = 1 if tag == "counting" else 3 if tag == "color_attr" else 2
        if tag == "multi_object_count_attr":
            kinds = rng.choice((2, 3))
        items = [{"class": name, "count": 1} for name in rng.sample(self.objects.words, kinds)]
        if "count" in tag:
            for item, count in zip(items, self._counts(tag, rng)):
                item["count"] = count
        if "color" in tag:
            for item, colour in zip(items, rng.sample(self.colours.words, kinds)):
                item["color"] = colour
        if "spatial" in tag:
            for item, region in zip(items, rng.choice(_PAIRS)):
                item["region"] = region
        if "size" in tag:
            for item, size in zip(items, rng.sample(("larger", "smaller"), 2)):
                item["size"] = size
        return items

    def _counts(self, tag: str, rng: random.Random) -> tuple[int, ...]:
        """Samples counts whose sum is at most `most_count`: the more kinds of objects, the fewer of each."""
        most = self.recipe.most_count
        if tag == "counting":
            return (rng.randint(2, most),)
        each = max(2, most // 3 if tag == "multi_object_count_attr" else most // 2)
        while True:
            counts = tuple(rng.randint(1, each) for _ in range(3))
            if max(counts[:2]) > 1:
                return counts

    def phrase(self, item: dict) -> str:
        """Returns the phrase that the instruction must contain verbatim, for example "two red cups on the left"."""
        words = [item.get("size"), item.get("color"), self.objects.named(item["class"], item["count"])]
        noun = " ".join(filter(None, words))
        noun = article(noun) if item["count"] == 1 else f"{wording.NUMBERS[item['count'] - 1]} {noun}"
        return " ".join(filter(None, (noun, wording.PLACES.get(item.get("region", "")))))

    async def instruct(self, task: PlannedRow, steps: RowSteps) -> Instruction:
        """Writes the instruction of a sketch."""
        sketch, remarks = task.sketch, ()
        text = sketch["template"]
        steps.keep("structure", result={"tag": sketch["tag"], "include": sketch["include"], "template": text})
        if self.recipe.paraphrase:
            phrases = [self.phrase(item) for item in sketch["include"]]
            prompt = wording.PARAPHRASE.format(instruction=text, phrases="; ".join(f'"{p}"' for p in phrases))
            try:
                text = await steps.write("paraphrase", prompt, lambda answer: self.checked(answer, sketch["include"]))
            except UnusableAnswer:
                if self.recipe.otherwise == "reject":
                    raise
                remarks = ("no paraphrase kept the structure: the template was used",)
        include = tuple(sketch["include"])
        facts = {"tag": sketch["tag"], "include": sketch["include"], "exclude": []}
        return Instruction(text, sketch["tag"], include, facts={"structure": facts}, remarks=remarks)

    def checked(self, answer: str, include: list[dict]) -> str:
        """Returns the answer if it describes exactly this structure.

        Raises:
            UnusableAnswer: a part of the structure is missing or was added.
        """
        text = one_line(answer)
        rest = words_of(text)
        for phrase in sorted((words_of(self.phrase(item)) for item in include), key=len, reverse=True):
            if rest.count(phrase) != 1:
                raise UnusableAnswer(
                    f'the structure is lost: "{phrase.strip()}" stands {rest.count(phrase)} times in it'
                )
            rest = rest.replace(phrase, " | ")
        plurals = [self.objects.plural(word) for word in self.objects.words]
        others = (*self.objects.words, *plurals, *self.colours.words, *wording.NUMBERS[1:], *_OTHER_WORDS)
        for other in others:
            if words_of(other) in rest:
                raise UnusableAnswer(f'the structure is changed: "{other}" was added')
        if found := re.search(r"\d+", rest):
            raise UnusableAnswer(f'the structure is changed: "{found[0]}" was added')
        return text
