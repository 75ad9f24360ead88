"""What a training run is, in one file: unknown keys, impossible values and settings without effect are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Expert = Literal["gen", "und"]
Part = Literal["gen", "und", "text", "vision"]
PARTS: tuple[str, ...] = ("gen", "und", "text", "vision")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Strict):
    """One source of rows: anything with the features of Echo-4o-Image, or with a question and an `answer`."""

    path: str  # folder of Parquet files, folder saved by `datasets`, or Hub repository
    name: str | None = None  # configuration of the dataset
    split: str = "train"
    weight: float = Field(1.0, gt=0)  # of several datasets: how often this one is drawn from, relative to the others
    streaming: bool = False  # read row groups as they are needed, instead of downloading the dataset first
    shuffle_buffer: int | None = Field(
        None, ge=0
    )  # when streaming: rows shuffled together (None: 128; 0: stored order)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (dict, Data)) else value


def _no_is_a_word(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare `no` as false


class Objective(_Strict):
    """The losses (tests/parity/golden/README.md) and the dropout of conditions; defaults are the original's."""

    time_shift: float = Field(1.0, gt=0)
    mse_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(1.0, ge=0)
    ce_reweight: bool = False  # each text's labels weigh 1/sqrt(n) instead of 1
    text_dropout: float = Field(0.1, ge=0, le=1)
    vit_dropout: float = Field(0.3, ge=0, le=1)
    vae_dropout: float = Field(0.3, ge=0, le=1)


class Optimizer(_Strict):
    """`muon` updates the layers' matrices by orthogonalised momentum (at `muon_lr`) and the rest by AdamW (at `lr`)."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(2e-5, gt=0)
    muon_lr: float | None = Field(None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup_steps: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_muon(self):
        if (self.name == "muon") != (self.muon_lr is not None):
            raise ValueError("`muon_lr` belongs to `name: muon`: give both or neither.")
        return self


class Full(_Strict):
    """Train the weights themselves, of the parts that are named; the others are frozen.

    `gen`: the generation expert with the latent in- and outputs; `und`: the understanding expert; `text`: token
    embedding and language head; `vision`: the vision tower and its connector.
    """

    method: Literal["full"] = "full"
    parts: tuple[Part, ...] = Field(PARTS, min_length=1)


class Lora(_Strict):
    """Train low-rank additions to the experts' matrices; everything else is frozen."""

    method: Literal["lora"]
    experts: tuple[Expert, ...] = Field(("gen",), min_length=1)
    rank: int = Field(32, gt=0)
    alpha: float = Field(32.0, gt=0)
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # learn magnitudes, too
    dropout: float = Field(0.0, ge=0, lt=1)
    quantize: Literal["nf4"] | None = None  # of the frozen weights


class Packing(_Strict):
    """Fill every forward pass up to a number of tokens."""

    tokens: int = Field(10_240, gt=0)  # per pack: one forward pass of one process
    packs_per_step: int = Field(gt=0)  # over all processes; fewer processes accumulate more of them each
    buffer: int = Field(32, gt=0)  # samples to choose from when a pack is filled


class Checkpoints(_Strict):
    """All that is needed to go on, every `every` steps; the last `keep` are kept."""

    every: int = Field(gt=0)
    keep: int = Field(2, gt=0)


class Ema(_Strict):
    """A moving average of what is trained; it is what is exported."""

    decay: float = Field(0.9999, gt=0, lt=1)


class Pictures(_Strict):
    """Pictures of fixed prompts, drawn every `every` steps and at the end."""

    every: int = Field(gt=0)
    prompts: tuple[str, ...] = Field(min_length=1)
    steps: int = Field(24, gt=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_prompts(self):
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("`prompts` has an empty text.")
        return self


class Recipe(_Strict):
    """A run of `echo4o train RECIPE.yaml`."""

    model: str  # pipeline folder or Hub repository to start from
    output_dir: Path
    latents: Path | None = None  # what `echo4o dataset precompute` wrote: its rows are read instead of encoded
    data: Annotated[tuple[Data, ...], BeforeValidator(_as_list), Field(min_length=1)]
    tune: Annotated[Full | Lora, Field(discriminator="method")] = Full()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    steps: int = Field(gt=0)  # optimizer steps
    max_seconds: float | None = Field(None, gt=0)  # stop, with the schedule run to its end, when this comes first
    batch_size: int | None = Field(None, gt=0)  # samples per optimizer step, over all processes; or:
    packing: Packing | None = None
    micro_batch_size: int | None = Field(None, gt=0)  # samples per forward pass and process; None: no accumulation
    cache_mb: int = Field(1024, ge=0)  # memory for prepared rows (tokens, VAE moments, patches) that come again
    processes: int | None = Field(None, gt=0)  # refuse to run with any other number; None: as many as are started
    sharding: Literal["none", "fsdp2"] = "none"
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_no_is_a_word)] = "no"
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ema: Ema | None = None
    checkpoints: Checkpoints | None = None
    resume: bool = False  # go on from the last complete checkpoint of `output_dir`, if there is one
    pictures: Pictures | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self):
        problems = [text for wrong, text in self._rules() if wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """(broken, what to say) for each rule about several settings at once."""
        batch, micro, lora = self.batch_size, self.micro_batch_size, self.tune.method == "lora"
        sharded, packing = self.sharding == "fsdp2", self.packing
        warmup, muon = self.optimizer.warmup_steps, self.optimizer.name == "muon"
        return [
            ((batch is None) == (packing is None), "give either batch_size or packing."),
            (bool(packing and micro), "micro_batch_size has no effect with packing: a pack is a forward pass."),
            (
                bool(batch and micro and batch % micro),
                f"batch_size={batch} must be a multiple of micro_batch_size={micro}.",
            ),
            (
                bool(packing and self.processes and packing.packs_per_step % self.processes),
                f"packing.packs_per_step={packing and packing.packs_per_step} must be a multiple of "
                f"processes={self.processes}.",
            ),
            (
                any(d.shuffle_buffer is not None and not d.streaming for d in self.data),
                "data.shuffle_buffer has no effect without streaming: all rows are shuffled.",
            ),
            (
                len(self.data) == 1 and self.data[0].weight != 1,
                "data.weight has no effect on a single dataset.",
            ),
            (warmup >= self.steps, f"warmup_steps={warmup} must be below steps={self.steps}."),
            (muon and lora, "muon is for full matrices: train LoRA with adamw."),
            (muon and not lora and self.tune.parts == ("text",), "muon is for the layers' matrices: `text` has none."),
            (muon and sharded, "muon needs whole matrices: shard with adamw."),
            (sharded and self.processes == 1, "sharding: fsdp2 has no effect with processes: 1."),
            (sharded and self.pictures is not None, "pictures cannot be drawn from a sharded model; leave them out."),
            (
                lora and self.tune.quantize is not None and sharded,
                "tune.quantize and sharding: fsdp2 exclude each other: 4-bit weights are not sharded.",
            ),
            (
                lora and self.tune.quantize is not None and self.mixed_precision == "no",
                "tune.quantize computes in bfloat16: set mixed_precision: bf16.",
            ),
            (
                self.objective.mse_weight == 0 and self.objective.ce_weight == 0,
                "objective.mse_weight and objective.ce_weight are both 0: nothing would be learned.",
            ),
            (len(set(self.trackers)) < len(self.trackers), "trackers names one of them twice."),
        ]


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names each key and what is wrong with it."""


def load_recipe(path: str | Path, changes: dict | None = None) -> Recipe:
    """Read a YAML recipe. Relative paths in it are relative to the working folder.

    Args:
        path: a file, or the name of a recipe that comes with the package (`lora_single_gpu`).
        changes: settings that replace the file's, by dotted name: `{"optimizer.lr": 1e-4}`.

    Raises:
        RecipeError: the file is unreadable or a setting is unknown or impossible; all of them are listed.
    """
    file = shipped_recipe(str(path)) if str(path) in shipped_names() and not Path(path).exists() else Path(path)
    try:
        values = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        names = ", ".join(shipped_names())
        raise RecipeError(f"{path} cannot be read: {error} (recipes that come along: {names})") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds no mapping of settings.")
    for name, value in (changes or {}).items():
        _set(values, name, value)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(f"{path}:\n{describe(error)}") from error


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """`["optimizer.lr=1e-5", ...]` -> {"optimizer.lr": 1e-05}; values are YAML."""
    changes = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise RecipeError(f"--set {pair}: write section.key=value, for example optimizer.lr=1e-5.")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {pair}: {value!r} is no YAML value.") from error
    return changes


def _set(values: dict, name: str, value: Any) -> None:
    *parents, key = name.split(".")
    section: Any = values
    for depth, parent in enumerate([*parents, None]):
        if isinstance(section, list) and (parent or key).isdigit():
            if int(parent or key) >= len(section):
                raise RecipeError(f"--set {name}: there is no entry {parent or key}, only {len(section)}.")
            place: Any = int(parent or key)
        elif isinstance(section, dict):
            place = parent or key
        else:
            raise RecipeError(f"--set {name}: {'.'.join(parents[:depth])} is {section!r} and has no settings inside.")
        if parent is None:
            section[place] = value
        else:
            if isinstance(section, dict) and section.get(place) is None:
                section[place] = {}
            section = section[place]


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; it loads again as the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def describe(error: ValidationError) -> str:
    """One line per wrong setting, as `key: what is wrong (given: value)`."""
    lines = []
    for item in error.errors():
        # A union's chosen member stands in the location; it is no key of the recipe.
        location = tuple(p for i, p in enumerate(item["loc"]) if not (i == 1 and item["loc"][0] == "tune"))
        key = ".".join(str(part) for part in location) or "recipe"
        known = "" if item["type"] != "extra_forbidden" else f"; known here: {', '.join(_siblings(item['loc']))}"
        given = "" if item["type"] in ("missing", "value_error") else f" (given: {item['input']!r})"
        if item["type"].startswith("union_tag"):
            lines.append(f"  {key}: say `method: full` or `method: lora` (given: {item['input']!r})")
            continue
        message = "unknown key" if item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        message = message.replace("a valid tuple", "a list")
        lines.append(f"  {key}: {message}{given}{known}")
    return "\n".join(lines)


_SECTIONS = {"full": Full, "lora": Lora, "data": Data, "packing": Packing, "checkpoints": Checkpoints, "ema": Ema}
_SECTIONS |= {"pictures": Pictures, "objective": Objective, "optimizer": Optimizer}


def _siblings(location: tuple) -> list[str]:
    named = [part for part in location[:-1] if part in _SECTIONS]
    return list((_SECTIONS[named[-1]] if named else Recipe).model_fields)


def shipped_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in (Path(__file__).parent / "recipes").glob("*.yaml"))


def shipped_recipe(name: str) -> Path:
    """The file of a recipe that comes with the package."""
    return Path(__file__).parent / "recipes" / f"{name}.yaml"
