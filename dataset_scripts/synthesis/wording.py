"""The prompts for the models and the phrases of instructions. Their hashes are stored in every row, so they must not change."""

PROPERTIES = """\
Name what everybody knows about this thing: {thing}

Answer with one JSON object and nothing else; each value is a few plain words:
{{"colour": "...", "shape": "...", "size": "...", "material": "...", "surroundings": "...", "time": "..."}}
"surroundings" is where one usually meets it, "time" the age or season that one thinks of with it."""

SURREAL = """\
Write an instruction for a model that makes pictures. The picture must break one thing that everybody takes for granted.

What is usual: {usual}
The break: {note}

Rules: one sentence of 8 to 40 words; it names {must} in these very words; the break must be visible in the picture; nothing
else in it is strange; no explanation and no quotation marks.
Answer with the sentence alone."""

PARAPHRASE = """\
Say this instruction for a picture in other words:

{instruction}

Rules: keep each of these parts letter by letter, and each exactly once: {phrases}. Add no other thing, colour, number, size or
place. Say in some words of your own that the background is plain. One sentence, no quotation marks.
Answer with the sentence alone."""

COMBINE = """\
Say this instruction for an image editor in other words:

{instruction}

Rules: the pictures are called {images}; mention each of them by this name, and say what is taken from it. Change nothing about
what is taken from which picture. Vary the beginning and the order. One or two sentences, no quotation marks.
Answer with the instruction alone."""

FRAMES = (
    "A picture of {things}, {background}",
    "A photo that shows {things}, {background}",
    "{things}, {background}",
    "Show {things}, {background}",
)

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLACES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}

TAKES = {
    "person": "the person",
    "object": "the {label}",
    "animal": "the {label}",
    "scene": "the place",
}
TOGETHER = (
    "Put {things} together into one picture{scene}.",
    "Make one picture of {things}{scene}.",
    "Combine {things} side by side{scene}.",
)
ALONE = ("Make one picture of {things}{scene}.", "Show {things}{scene}.")
