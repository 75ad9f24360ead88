"""Training recipes: YAML files that define a run. Unknown keys, invalid values and settings without effect are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from echo4o.common.configuration import StrictModel
from echo4o.common.hub_names import require_repository_name


class Section(StrictModel):
    """A section of a training recipe."""


class ColumnNames(Section):
    """The columns of a dataset that hold what training reads; `json.caption` is a field of a column."""

    id: str | None = None  # None: `id` if there is one, else a hash of the row
    instruction: str | None = None
    image: str | None = None  # the target image
    reference_images: str | tuple[str, ...] | None = None  # columns with one image or a list of images each
    answer: str | None = None


class DataSource(Section):
    """One source of rows: anything with the features of Echo-4o-Image, or with a question and an `answer`.

    Other datasets need `columns`.
    """

    path: str  # folder of Parquet files, folder saved by `datasets`, or Hub repository
    name: str | None = None  # configuration of the dataset
    split: str = "train"
    # With several datasets: relative probability of sampling a row from this one
    weight: float = Field(default=1.0, gt=0)
    streaming: bool = False  # read row groups as they are needed, instead of downloading the dataset first
    shuffle_buffer: int | None = Field(
        default=None, ge=0
    )  # when streaming: rows shuffled together (None: 128; 0: stored order)
    columns: ColumnNames | None = None
    allow_urls: bool = False  # download images that a column gives as addresses
    where: dict[str, Any] | None = None  # column -> allowed value or values
    min_side: int | None = Field(default=None, gt=0)  # pixels of the shorter side of the target image
    max_aspect: float | None = Field(default=None, ge=1)  # longer side / shorter side of the target image

    @model_validator(mode="after")
    def _check_filters(self):
        if self.streaming and (self.where or self.min_side or self.max_aspect):
            raise ValueError("`where`, `min_side` and `max_aspect` read all rows first: set streaming: false.")
        if self.allow_urls and self.columns is None:
            raise ValueError("`allow_urls` has no effect without `columns`.")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (dict, DataSource)) else value


def _false_to_no(value: Any) -> Any:
    return "no" if value is False else value  # YAML reads a bare `no` as false


class GroupSettings(Section):
    """Settings of the parameters of one part; the others are the optimizer's."""

    lr: float = Field(gt=0)
    weight_decay: float | None = Field(default=None, ge=0)


def _as_group(value: Any) -> Any:
    return {"lr": value} if isinstance(value, (int, float)) and not isinstance(value, bool) else value


OptimizerGroup = Annotated[GroupSettings, BeforeValidator(_as_group)]


class OptimizerSettings(Section):
    """`adamw8bit` keeps its states in 8 bits (needs bitsandbytes and a GPU).

    `muon` updates the layers' matrices by orthogonalised momentum (at `muon_lr`) and the rest by AdamW (at `lr`)."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    kernel: Literal["fused", "foreach", "plain"] = "fused"  # of AdamW; the same steps up to rounding
    groups: dict[str, OptimizerGroup] | None = None  # part of the model -> learning rate, or rate and weight decay
    lr: float = Field(default=2e-5, gt=0)
    muon_lr: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    # Skip steps whose gradient norm exceeds this multiple of its running median (of 50 steps); None: none
    skip_above: float | None = Field(default=None, gt=1)

    @model_validator(mode="after")
    def _check_muon(self):
        if (self.name == "muon") != (self.muon_lr is not None):
            raise ValueError("`muon_lr` belongs to `name: muon`: give both or neither.")
        if self.name == "muon" and self.groups:
            raise ValueError("`groups` are for adamw: muon has `muon_lr` for matrices and `lr` for the rest.")
        if self.name != "adamw" and self.kernel != "fused":
            raise ValueError("`kernel` is for `name: adamw`.")
        return self


class FullTuning(Section):
    """Train the weights themselves, of the named parts; the others are frozen."""

    method: Literal["full"] = "full"
    parts: tuple[str, ...] = Field(default=(), min_length=1)  # each backbone names its own

    def describe(self) -> str:
        """One sentence for a model card."""
        return f"Fine-tuning of the parts {', '.join(self.parts)}; the others are frozen."


class LoraTuning(Section):
    """Train low-rank additions to matrices; everything else is frozen."""

    method: Literal["lora"]
    rank: int = Field(default=32, gt=0)
    alpha: float = Field(default=32.0, gt=0)
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # also train magnitudes
    dropout: float = Field(default=0.0, ge=0, lt=1)
    quantize: Literal["nf4"] | None = None  # of the frozen weights
    init_adapter: str | None = None  # start from this adapter: a folder, a file or a Hub repository
    # Regular expression of modules -> their rank or alpha, as in PEFT
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}

    def describe(self) -> str:
        """One sentence for a model card."""
        return f"LoRA of rank {self.rank}, everything else frozen."

    def target_modules(self, targets: dict[str, str]) -> str:
        """The regular expression of the adapted modules, from the model class's `_lora_targets`."""
        return targets["default"]

    def initial_weights(self) -> bool | Literal["gaussian"]:
        """PEFT's name of the initialisation."""
        return True


class ResolutionSettings(Section):
    """Sizes of the images before the model's own limits apply. Nothing is cropped unless `bucket` is given."""

    max_side: int | None = Field(default=None, gt=0)  # pixels of the longer side; larger images are made smaller
    min_side: int | None = Field(default=None, gt=0)  # pixels of the shorter side; smaller images are made larger
    multiple_of: int | None = Field(default=None, gt=0)  # both sides are rounded to multiples of this
    bucket: tuple[
        tuple[int, int], ...
    ] = ()  # (width, height): fill the one of the nearest shape, cropped at its centre

    @model_validator(mode="after")
    def _check_sides(self):
        if self.bucket and (self.max_side or self.min_side or self.multiple_of):
            raise ValueError("`bucket` names complete sizes: leave the other settings out.")
        if not (self.bucket or self.max_side or self.min_side or self.multiple_of):
            raise ValueError("give `max_side`, `min_side`, `multiple_of` or `bucket`.")
        if self.max_side and self.min_side and self.min_side > self.max_side:
            raise ValueError(f"`min_side`={self.min_side} is above `max_side`={self.max_side}.")
        return self


class PackingSettings(Section):
    """Fill every forward pass up to a number of tokens."""

    tokens: int = Field(default=10_240, gt=0)  # per pack: one forward pass of one process
    packs_per_step: int = Field(gt=0)  # over all processes; fewer processes accumulate more of them each
    buffer: int = Field(default=32, gt=0)  # samples to choose from when a pack is filled


class CheckpointSettings(Section):
    """Save a checkpoint every `every` steps and keep the last `keep` of them."""

    every: int = Field(gt=0)
    keep: int = Field(default=2, gt=0)
    keep_best: bool = False  # also keep the step with the lowest validation loss, for `echo4o export --best`


class HubSettings(Section):
    """Push an export of every `every`-th step to a private Hub repository, in the background, and the result at the end."""

    repo: str
    every: int = Field(gt=0)  # a multiple of checkpoints.every

    @model_validator(mode="after")
    def _check_repo(self):
        require_repository_name(self.repo)
        return self


class EmaSettings(Section):
    """An exponential moving average of the trained parameters; exports and images use the averages."""

    decay: float = Field(default=0.9999, gt=0, lt=1)
    copy_first: bool = False  # the first update copies the weights, as in OmniGen2's code, instead of averaging


class SamplePrompt(Section):
    """A prompt of `images`, with the files of its references."""

    prompt: str
    references: tuple[str, ...] = ()
    seed: int | None = Field(default=None, ge=0)  # None: that of the section plus the prompt's number


class ImageSettings(Section):
    """Images of fixed prompts and of validation rows, generated every `every` steps and at the end."""

    every: int = Field(gt=0)
    prompts: tuple[str | SamplePrompt, ...] = ()
    validation_rows: int = Field(default=0, ge=0)  # of the validation's rows, to see beside their targets
    steps: int = Field(default=24, gt=0)  # updates of the sampler
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check_prompts(self):
        if not self.prompts and not self.validation_rows:
            raise ValueError("give `prompts`, or a number of `validation_rows`.")
        if not all(sample.prompt.strip() for sample in self.sample_prompts()):
            raise ValueError("`prompts` has an empty text.")
        return self

    def sample_prompts(self) -> list[SamplePrompt]:
        """The prompts, each with its references."""
        return [SamplePrompt(prompt=p) if isinstance(p, str) else p for p in self.prompts]


class ValidationSettings(Section):
    """The loss of rows that never train: before the first step, every `every` steps and at the end.

    The rows are a split of every dataset in `data`, other datasets, or a share of the training rows, by hash of their ids.
    """

    every: int = Field(gt=0)
    split: str | None = None
    data: Annotated[tuple[DataSource, ...] | None, BeforeValidator(_as_list)] = None
    share: float | None = Field(default=None, gt=0, lt=1)
    max_rows: int = Field(default=128, gt=0)  # that are evaluated; the others of a share do not train either
    times: int = Field(default=8, gt=0)  # noise levels of each image, evenly spaced
    stop_after: int | None = Field(default=None, gt=0)  # end after this many validations without a lower loss

    @model_validator(mode="after")
    def _check_rows(self):
        given = [name for name in ("split", "data", "share") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("name the rows by one of `split`, `data` and `share`.")
        if any(data.streaming for data in self.data or ()):
            raise ValueError("`data` cannot be streamed.")
        return self

    def noise_levels(self) -> list[float]:
        """The middles of `times` equal parts of [0, 1]."""
        return [(index + 0.5) / self.times for index in range(self.times)]


class DistillSettings(Section):
    """Train an adapter that makes the images of a guided sampler in few updates without guidance.

    Its method is described in training/distillation.py.
    """

    teacher: Path  # trajectories that `echo4o dataset precompute --teacher` wrote
    steps: int = Field(gt=0)  # updates of the adapter; a divisor of the stored segments


class TrainingRecipe(Section):
    """A run of `echo4o train RECIPE.yaml`.

    Each backbone has a subclass that defines its `tune` and `objective` sections; [`read_recipe`] picks it.
    """

    backbone: str = "bagel"  # the model family: a module of training/backbones
    model: str  # pipeline folder or Hub repository to start from
    output_dir: Path
    latents: Path | None = None  # a cache that `echo4o dataset precompute` wrote; its rows are not encoded again
    distill: DistillSettings | None = None  # learn from trajectories of the model instead of the rows' images
    data: Annotated[tuple[DataSource, ...], BeforeValidator(_as_list), Field(min_length=1)]
    mixing: Literal["draws", "epochs"] = "draws"  # weights are shares of the samples, or of each dataset's epochs
    on_bad_row: Literal["stop", "skip"] = "stop"  # skip: the next row takes the place of one that cannot train
    max_bad: int = Field(default=100, ge=0)  # rows (of one process) that are skipped before the run stops
    resolution: ResolutionSettings | None = None
    tune: FullTuning | LoraTuning
    objective: Section
    optimizer: OptimizerSettings = OptimizerSettings()
    steps: int = Field(gt=0)  # optimizer steps
    max_seconds: float | None = Field(default=None, gt=0)  # end after this time, with a complete schedule
    batch_size: int | None = Field(
        default=None, gt=0
    )  # samples per optimizer step, over all processes; alternative: packing
    packing: PackingSettings | None = None
    # samples per forward pass and process; None: no accumulation
    micro_batch_size: int | None = Field(default=None, gt=0)
    cache_mb: int = Field(default=1024, ge=0)  # memory for prepared rows (encoded images, tokens) that are read again
    processes: int | None = Field(default=None, gt=0)  # required number of processes; None: any
    sharding: Literal["none", "fsdp2"] = "none"
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(_false_to_no)] = "no"
    save_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ema: EmaSettings | None = None
    checkpoints: CheckpointSettings | None = None
    resume: bool = False  # continue from the last complete checkpoint of `output_dir`, if there is one
    images: ImageSettings | None = None
    validation: ValidationSettings | None = None
    hub: HubSettings | None = None
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self):
        problems = [text for wrong, text in self._rules() if wrong]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        """(is violated, error message) for each rule about several settings."""
        batch, micro, packing = self.batch_size, self.micro_batch_size, self.packing
        lora, sharded = self.tune.method == "lora", self.sharding == "fsdp2"
        quantized = isinstance(self.tune, LoraTuning) and self.tune.quantize is not None
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
                len(self.data) == 1 and self.mixing != "draws",
                "mixing has no effect on a single dataset.",
            ),
            (
                self.latents is not None and self.resolution is not None,
                "latents are of images at the model's own sizes: leave resolution out, or do not precompute.",
            ),
            (
                len(self.data) == 1 and self.data[0].weight != 1,
                "data.weight has no effect on a single dataset.",
            ),
            (warmup >= self.steps, f"warmup_steps={warmup} must be below steps={self.steps}."),
            (muon and lora, "muon is for full matrices: train LoRA with adamw."),
            (muon and sharded, "muon needs whole matrices: shard with adamw."),
            (sharded and self.processes == 1, "sharding: fsdp2 has no effect with processes: 1."),
            (
                self.images is not None and self.images.validation_rows > 0 and self.validation is None,
                "images.validation_rows needs a validation section.",
            ),
            (
                quantized and sharded,
                "tune.quantize and sharding: fsdp2 exclude each other: 4-bit weights are not sharded.",
            ),
            (
                quantized and self.mixed_precision == "no",
                "tune.quantize computes in bfloat16: set mixed_precision: bf16.",
            ),
            (
                self.checkpoints is not None and self.checkpoints.keep_best and self.validation is None,
                "checkpoints.keep_best needs a validation section.",
            ),
            (
                self.validation is not None
                and self.validation.share is not None
                and any(d.streaming for d in self.data),
                "validation.share reads all rows first, so no dataset can be streamed: use validation.split or "
                "validation.data.",
            ),
            (
                self.hub is not None and (self.checkpoints is None or self.hub.every % self.checkpoints.every > 0),
                "hub.every must be a multiple of checkpoints.every.",
            ),
            (
                sharded and self.optimizer.name == "adamw8bit",
                "optimizer.name: adamw8bit keeps states of whole tensors: shard with adamw.",
            ),
            (len(set(self.trackers)) < len(self.trackers), "trackers names one of them twice."),
            *(self._distillation_rules() if self.distill is not None else ()),
        ]

    def _distillation_rules(self) -> list[tuple[bool, str]]:
        """The rules for recipes with a `distill` section."""
        times = ValidationSettings.model_fields["times"].default
        return [
            (self.tune.method != "lora", "distill trains an adapter: set tune.method: lora."),
            (self.latents is not None, "distill.teacher holds encoded rows as well: leave latents out."),
            (self.resolution is not None, "resolution has no effect with distill: the teacher's sizes are stored."),
            (
                self.objective != type(self.objective)(),
                "objective has no effect with distill, which has one of its own: leave it out.",
            ),
            (
                self.validation is not None and self.validation.times != times,
                "validation.times has no effect with distill: the updates of the adapter are validated.",
            ),
            (
                self.images is not None and self.images.steps != ImageSettings.model_fields["steps"].default,
                "images.steps has no effect with distill: images are generated in distill.steps updates.",
            ),
            (any(d.streaming for d in self.data), "distill reads trajectories by row: set data.streaming: false."),
        ]


class RecipeError(ValueError):
    """The recipe is invalid or cannot be run; the message names each key and its problem."""
