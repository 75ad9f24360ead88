"""The options of ``echo4o generate``; ``echo4o serve`` shares those of the model. Each dataclass is a panel of the help."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from echo4o.cli.models import Device, Dtype, DtypeOption

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1


class Offload(StrEnum):
    """Where weights wait while they are not used."""

    none = "none"
    model = "model"
    group = "group"
    disk = "disk"


class Quantize(StrEnum):
    """How the weights of the transformer are stored."""

    none = "none"
    int8 = "int8"
    fp8 = "fp8"
    nf4 = "nf4"


class Cache(StrEnum):
    """Step caches: they skip layers in some updates, which changes the image."""

    none = "none"
    taylorseer = "taylorseer"
    first_block = "first-block"


Images = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="A reference image; repeat the option to pass several.", show_default=False),
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, max=MAX_SEED, help="Seed of the first image; each further image adds 1.", show_default="random"
    ),
]
NumImages = Annotated[int, typer.Option(min=1, help="Number of images to generate for a prompt.")]


@dataclass
class SamplingOptions:
    """Image"""

    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of sampler updates.", show_default="49, or the adapter's preset")
    ] = None
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the prompt; 1 disables guidance.", show_default="the task's preset"),
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the reference images; 1 disables it.", show_default="the task's preset"),
    ] = None
    height: Annotated[
        int | None, typer.Option(min=1, help="Height in pixels.", show_default="1024, or the last reference's")
    ] = None
    width: Annotated[
        int | None, typer.Option(min=1, help="Width in pixels.", show_default="1024, or the last reference's")
    ] = None
    think: Annotated[bool, typer.Option("--think", help="Let the model plan in words first.")] = False

    def settings(self) -> dict[str, Any]:
        """The given options as arguments of the pipeline."""
        arguments = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "image_guidance_scale": self.image_guidance_scale,
            "height": self.height,
            "width": self.width,
            "think": self.think or None,
        }
        return {name: value for name, value in arguments.items() if value is not None}


@dataclass
class OutputOptions:
    """Output"""

    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The file to write (an existing file is replaced); with --prompts, the folder.",
            show_default="echo4o.png, or echo4o-images/",
        ),
    ] = None
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Also write a contact sheet of all images (always with --prompts).")
    ] = False
    no_metadata: Annotated[
        bool,
        typer.Option("--no-metadata", help="Do not store prompt, seed, settings and model in the PNG file."),
    ] = False


class Adapter(NamedTuple):
    """A LoRA adapter to load: the name that it gets, where it is, and its scale."""

    name: str
    place: str
    scale: float


@dataclass
class ModelOptions:
    """Model"""

    device: Device = "auto"
    dtype: DtypeOption = Dtype.auto
    offload: Annotated[
        Offload,
        typer.Option(help="Keep weights off the GPU while unused: whole components, layer groups, or groups on disk."),
    ] = Offload.none
    quantize: Annotated[
        Quantize,
        typer.Option(help="Store the transformer in fewer bits. int8 needs torchao, nf4 bitsandbytes and a GPU."),
    ] = Quantize.none
    cache: Annotated[Cache, typer.Option(help="Skip layers in some updates: faster, and it changes the image.")] = (
        Cache.none
    )
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the repeated blocks: slower start, faster updates.")
    ] = False

    def check(self, device: "torch.device") -> None:
        """Raise ValueError for options that cannot take effect on the device."""
        if self.offload is Offload.model and device.type == "cpu":
            raise ValueError("--offload model moves weights between the CPU and a GPU, but the device is the CPU")
        if self.quantize is Quantize.nf4 and device.type != "cuda":
            raise ValueError(f"--quantize nf4 needs a CUDA GPU, but the device is {device}; int8 runs everywhere")
        if self.quantize is not Quantize.none and self.dtype is Dtype.float16:
            raise ValueError("--quantize computes in bfloat16 or float32; --dtype float16 cannot be combined with it")
        if self.quantize is not Quantize.none and self.compile:
            raise ValueError("--compile and --quantize cannot be combined")

    def description(self, device: "torch.device") -> dict[str, Any]:
        """What images depend on besides weights and settings, for the metadata of an image."""
        return {
            "dtype": self.dtype.value,
            "device": device.type,
            "offload": self.offload.value,
            "quantize": self.quantize.value,
            "cache": self.cache.value,
            "compile": self.compile,
        }


@dataclass
class LoadingOptions(ModelOptions):
    """Model"""

    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA weights to load, with an optional scale: a folder, a file or a Hub repository. Repeatable.",
            metavar="NAME[:SCALE]",
            show_default=False,
        ),
    ] = None

    def adapters(self) -> list[Adapter]:
        """The adapters, named lora0, lora1, ..."""
        places = [parse_lora(text) for text in self.lora or []]
        return [Adapter(f"lora{number}", place, scale) for number, (place, scale) in enumerate(places)]


def parse_lora(text: str) -> tuple[str, float]:
    """Split ``NAME[:SCALE]``; the scale is 1 if none is given. Raises ValueError if the scale is not a number."""
    name, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        if Path(text).exists():  # a colon in the name of a folder
            return text, 1.0
        raise ValueError(f"--lora {text}: {scale!r} is not a number; write NAME or NAME:SCALE") from None
