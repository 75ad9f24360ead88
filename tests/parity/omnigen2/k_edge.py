"""Unusual calls: the original's results where it has some; else what ours does instead of failing."""

from __future__ import annotations

import re

import numpy as np
import torch

from ..golden import GoldenFile
from ..report import Check
from .golden_set import GoldenSet


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    calls = Calls(golden)
    for name, theirs in file.json["calls"].items():
        with check.trying(name):
            if name not in calls.known:
                check.fail(name, "no check of this call")
                continue
            if (found := re.match(r"works: (\[.*\])$", theirs)) is not None:
                check(name, calls.outcome(name), f"works: {found[1]}")
            elif theirs.startswith("works: "):
                check(name, calls.array(name), theirs.split(" min ")[0])
            else:
                check(name, calls.outcome(name), calls.expected(name))


class Calls:
    """Our calls by the names in the file; one update each."""

    def __init__(self, golden: GoldenSet):
        config = golden.manifest.json["config"]["img"]
        self.golden, self.size = golden, {"height": config["h"], "width": config["w"]}
        self.prompt = golden.manifest.json["prompts"][0]
        reference = golden.reference
        refs = [reference(i) for i in range(5)]
        two, sized = [self.prompt, self.prompt], {"prompt": self.prompt, **self.size}
        factor, channels = golden.pipe.vae_scale_factor, golden.pipe.transformer.config.in_channels
        small = torch.zeros(1, channels, config["h"] // factor // 4 * 2, config["w"] // factor // 4 * 2)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        tensor = torch.rand(1, 3, refs[0].height, refs[0].width)
        self.known = {
            "input_images=None, two prompts": {"prompt": two, **self.size},
            "input_images=[] , one prompt": sized | {"image": []},
            "input_images=[] , two prompts": {"prompt": two, "image": [], **self.size},
            "input_images=[None, None], two prompts": {"prompt": two, "image": [None, None], **self.size},
            "input_images=PIL (not a list)": {"prompt": self.prompt, "image": refs[0]},
            "prompt as list of one, input_images=[PIL]": {"prompt": [self.prompt], "image": [refs[0]]},
            "five references": sized | {"image": refs},
            "six references": sized | {"image": [*refs, refs[0]]},
            "prompt_embeds without prompt": {"prompt_embeds": torch.zeros(1, 4, 8), "prompt": None},
            "grey (L) reference": {"prompt": self.prompt, "image": [refs[0].convert("L")]},
            "RGBA reference": {"prompt": self.prompt, "image": [refs[0].convert("RGBA")]},
            "reference of 12 x 40 pixels": sized | {"image": [refs[0].resize((12, 40))]},
            "reference as float tensor (1,3,70,93) in [0,1]": {"prompt": self.prompt, "image": [tensor]},
            "latents smaller than height/width": sized | {"latents": small},
            "output_type=np": sized | {"output_type": "np"},
            "output_type=pt": sized | {"output_type": "pt"},
            "output_type=latent": sized | {"output_type": "latent"},
            "generator list for two pictures": sized | {"generator": generators, "num_images_per_prompt": 2},
            "negative_prompt str, prompt list of two": {"prompt": two, "negative_prompt": "blurry", **self.size},
            "negative_prompt list of one, prompt list of two": {"prompt": two, "negative_prompt": ["x"], **self.size},
            "negative_prompt list of one, prompt str": sized | {"negative_prompt": ["blurry"]},
            "timesteps=[0.0, 0.5] (list)": sized | {"timesteps": [0.0, 0.5]},
            "timesteps=np.array([0, .5], float32)": sized | {"timesteps": np.array([0, 0.5], np.float32)},
            "callback_on_step_end": sized | {"callback_on_step_end": lambda pipe, step, timestep, given: {}},
            "image_guidance_scale after a call without references": sized,
        }

    def _size(self, count: int) -> str:
        return f"works: {[(self.size['width'], self.size['height'])] * count}"

    def expected(self, name: str) -> str:
        """What ours does where the original fails, or where ours means something else."""
        height, width = self.golden.pipe._sizes(self._request(), 1024 * 1024, 1024)[0]
        one_reference = f"works: {[(width, height)]}"
        return {
            "input_images=None, two prompts": self._size(2),
            "input_images=[] , two prompts": self._size(2),
            "input_images=PIL (not a list)": one_reference,
            "six references": "ValueError",
            "prompt_embeds without prompt": "TypeError",
            "grey (L) reference": one_reference,
            "RGBA reference": one_reference,
            "reference of 12 x 40 pixels": "ValueError",
            "negative_prompt list of one, prompt list of two": "ValueError",
            "timesteps=[0.0, 0.5] (list)": self._size(1),
            "callback_on_step_end": self._size(1),
            "image_guidance_scale after a call without references": self._size(1),
        }[name]

    def _request(self):
        from echo4o.modeling.omnigen2.inputs_omnigen2 import PRESETS, read_requests

        options = {"presets": PRESETS, "max_references": 5, "align_res": True}
        preset = PRESETS["with_references"]
        return read_requests("", None, self.golden.reference(0), None, None, preset, **options)[0]

    def outcome(self, name: str) -> str:
        """As the file writes outcomes: the sizes of the images, or the error's class."""
        arguments = {"num_inference_steps": 1, "guidance_scale": 4.0, "image_guidance_scale": 1.0} | self.known[name]
        if name == "reference as float tensor (1,3,70,93) in [0,1]":
            # Ours takes PIL images only and says so; the image that the tensor stands for gives the same size.
            try:
                self.golden.pipe(**arguments)
                return "a tensor was taken"
            except ValueError:
                arguments["image"] = [self.golden.reference(0)]
        try:
            images = self.golden.pipe(**arguments).images
        except (ValueError, TypeError) as error:
            return type(error).__name__
        return f"works: {[image.size for image in images]}"

    def array(self, name: str) -> str:
        """As the file writes arrays. The original's "latent" is the decoded image; ours are the latents."""
        options = {"num_inference_steps": 1, "guidance_scale": 4.0} | self.known[name]
        images = self.golden.pipe(**options).images
        if name == "output_type=latent":
            images = torch.stack([self.golden.pipe.decode_latent(latent) for latent in images])
        if isinstance(images, np.ndarray):
            assert 0 <= images.min() and images.max() <= 1
            return f"works: {type(images)} {images.shape}"
        return f"works: {type(images)} {images.shape}"
