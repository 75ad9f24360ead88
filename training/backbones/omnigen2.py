"""OmniGen2 as a backbone: rows to text states and latents, rows of one batch packed without padding, flow matching.

The language model and the VAE are frozen. `echo4o dataset precompute` stores the states of the former and the moments
of the latter, so that training needs neither.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGeneration

from echo4o.modeling.common.image_files import to_rgb
from echo4o.modeling.omnigen2.image_processor_omnigen2 import reference_pixels
from echo4o.modeling.omnigen2.inputs_omnigen2 import DEFAULT_SIZE
from echo4o.modeling.omnigen2.prompts_omnigen2 import DROPPED_SYSTEM_PROMPT, SYSTEM_PROMPT, prompt_text
from echo4o.modeling.omnigen2.sampling_omnigen2 import set_times
from echo4o.modeling.omnigen2.transformer_omnigen2 import MAX_REFERENCES, OmniGen2Transformer2DModel, TokenCounts
from echo4o.training.backbones import omnigen2_costs
from echo4o.training.backbones.base import Backbone, LossTerm, named_generator
from echo4o.training.backbones.omnigen2_objective import (
    choose_dropped,
    flow_matching,
    raw_time_of,
    shift_time,
    without_prefix,
)
from echo4o.training.backbones.omnigen2_recipe import OmniGen2Recipe

CALL_PIXELS, CALL_SIDE = 1024 * 1024, 1024  # limits of references in a call of the pipeline, by default


# --- rows, samples, batches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OmniGen2Row:
    """A prepared row: text states and VAE moments.

    Args:
        texts: states (tokens, text_feat_dim) of the instruction, and of it without a prefix if it has one.
        reference_moments: each (2*C, h, w): mean and log-variance.
        moments: (2*C, h, w) of the target; None for the conditions of a distilled row.
    """

    id: str
    texts: list[torch.Tensor]
    is_text_to_image: bool
    reference_moments: list[torch.Tensor]
    moments: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        target = [] if self.moments is None else [self.moments]
        return sum(t.nbytes for t in [*self.texts, *self.reference_moments, *target])

    def to_cache(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        tensors = {f"text.{index}": states.contiguous() for index, states in enumerate(self.texts)}
        tensors |= {f"{index}.moments": m.contiguous() for index, m in enumerate(self.reference_moments)}
        if self.moments is not None:
            tensors["moments"] = self.moments.contiguous()
        facts = {"texts": len(self.texts), "references": len(self.reference_moments)}
        instruction = hashlib.blake2b(self.instruction_key.encode(), digest_size=16).hexdigest()
        return tensors, facts | {"is_text_to_image": self.is_text_to_image, "instruction": instruction}

    instruction_key: str = ""  # the instruction, by which a cached row is recognised


@dataclass(frozen=True)
class OmniGen2Sample:
    """One row with the random choices of one epoch."""

    id: str
    text: torch.Tensor  # (tokens, text_feat_dim)
    references: list[torch.Tensor]  # latents (C, h, w)
    target: torch.Tensor  # (C, h, w)
    noise: torch.Tensor  # (C, h, w)
    raw_time: torch.Tensor  # () standard normal
    patch: int
    full_length: int  # tokens with all conditions

    @property
    def reference_tokens(self) -> list[int]:
        return [_tokens(latent, self.patch) for latent in self.references]

    @property
    def target_tokens(self) -> int:
        return _tokens(self.target, self.patch)

    def __len__(self) -> int:
        return len(self.text) + sum(self.reference_tokens) + self.target_tokens


def _tokens(latent: torch.Tensor, patch: int) -> int:
    return latent.shape[-2] // patch * (latent.shape[-1] // patch)


@dataclass(frozen=True)
class OmniGen2Batch:
    """Samples of one forward pass, as lists: the transformer packs them without padding."""

    ids: list[str]
    texts: list[torch.Tensor]
    references: list[list[torch.Tensor]]
    targets: list[torch.Tensor]
    noises: list[torch.Tensor]
    raw_time: torch.Tensor  # (N,)
    counts: TokenCounts

    @property
    def num_tokens(self) -> int:
        return sum(self.counts.rows)

    def to(self, device: torch.device | str) -> OmniGen2Batch:
        """The same batch on `device`."""

        def moved(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [tensor.to(device) for tensor in tensors]

        return OmniGen2Batch(
            self.ids,
            moved(self.texts),
            [moved(references) for references in self.references],
            moved(self.targets),
            moved(self.noises),
            self.raw_time.to(device),
            self.counts,
        )


def collate(samples: Sequence[OmniGen2Sample]) -> OmniGen2Batch:
    """Put samples into one batch."""
    return OmniGen2Batch(
        ids=[sample.id for sample in samples],
        texts=[sample.text for sample in samples],
        references=[sample.references for sample in samples],
        targets=[sample.target for sample in samples],
        noises=[sample.noise for sample in samples],
        raw_time=torch.stack([sample.raw_time for sample in samples]),
        counts=TokenCounts(
            texts=[len(sample.text) for sample in samples],
            references=[tokens for sample in samples for tokens in sample.reference_tokens],
            targets=[sample.target_tokens for sample in samples],
            rows=[len(sample) for sample in samples],
        ),
    )


# --- the backbone ---------------------------------------------------------------------------------------------------


class OmniGen2Backbone(Backbone):
    """OmniGen2 with a frozen language model and VAE."""

    recipe_class = OmniGen2Recipe
    component_classes = {
        "transformer": OmniGen2Transformer2DModel,
        "vae": AutoencoderKL,
        "mllm": Qwen2_5_VLForConditionalGeneration,
    }
    trained_components = ("transformer",)
    encoder_components = ("mllm",)
    release_configs = omnigen2_costs.RELEASE_CONFIGS

    def __init__(self, pipeline, recipe: OmniGen2Recipe):
        super().__init__(pipeline, recipe)
        self.objective, self.seed = recipe.objective, recipe.seed
        self.vae, self.patch = pipeline.vae, pipeline.transformer.config.patch_size
        self.most_references = min(pipeline.config.max_references, MAX_REFERENCES)

    # --- rows ---

    def encoder_settings(self) -> dict[str, Any]:
        """The encoders' weights and types, and everything that decides on texts and sizes."""
        objective = self.objective
        return {
            "vae": encoder_hash(self.vae, ("decoder.", "post_quant_conv.")),
            "mllm": self._mllm_hash,
            "mllm_dtype": str(self.pipeline.mllm.dtype).removeprefix("torch."),
            "system_prompt": SYSTEM_PROMPT,
            "max_text_tokens": objective.max_text_tokens,
            "max_input_pixels": list(objective.max_input_pixels),
            "max_output_pixels": objective.max_output_pixels,
            "max_side_length": objective.max_side_length,
        }

    @cached_property
    def _mllm_hash(self) -> str:
        return encoder_hash(self.pipeline.mllm.model.language_model, ())

    def prepare(self, rows: Sequence[dict]) -> Sequence[OmniGen2Row]:
        """Encode rows with the dataset's features (images decoded to PIL)."""
        return [self._prepare(row) for row in rows]

    def _prepare(self, row: dict) -> OmniGen2Row:
        for name in ("id", "instruction"):
            if not isinstance(row[name], str):
                raise ValueError(f"its {name} is {row[name]!r}; give text.")
        if row.get("answer"):
            raise ValueError("it has an answer; OmniGen2's language model is frozen, so only images train.")
        references = [to_rgb(image, f"reference {i}") for i, image in enumerate(row["reference_images"] or [])]
        if len(references) > self.most_references:
            raise ValueError(f"it has {len(references)} references; the model takes at most {self.most_references}.")
        objective, instruction = self.objective, row["instruction"]
        is_text_to_image = not references
        texts = [instruction]
        if is_text_to_image and without_prefix(instruction) != instruction:
            texts.append(without_prefix(instruction))
        pixels = objective.input_pixels(len(references)) if references else 0
        return OmniGen2Row(
            id=row["id"],
            texts=[self.text_states(prompt_text(text)) for text in texts],
            is_text_to_image=is_text_to_image,
            reference_moments=[self.moments(image, pixels, f"reference {i}") for i, image in enumerate(references)],
            moments=self.moments(to_rgb(row["image"], "its image"), objective.max_output_pixels, "its image"),
            instruction_key=instruction,
        )

    def from_cache(self, row: dict, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> OmniGen2Row:
        """Raises ValueError if the row has another instruction than when the cache was made."""
        key = hashlib.blake2b(row["instruction"].encode(), digest_size=16).hexdigest()
        if key != facts["instruction"]:
            raise ValueError(f"row {row['id']} has another instruction than when the cache was made.")
        return OmniGen2Row(
            id=row["id"],
            texts=[tensors[f"text.{index}"] for index in range(facts["texts"])],
            is_text_to_image=facts["is_text_to_image"],
            reference_moments=[tensors[f"{index}.moments"] for index in range(facts["references"])],
            moments=tensors.get("moments"),
            instruction_key=row["instruction"],
        )

    @torch.no_grad()
    def text_states(self, text: str) -> torch.Tensor:
        """States (tokens, text_feat_dim) of a text in the chat format, in the language model's dtype.

        Texts are encoded one by one: in a padded batch, the last bits would depend on the neighbours.
        """
        ids = torch.tensor([self.pipeline.token_ids(text, self.objective.max_text_tokens)])
        model = self.pipeline.mllm.model.language_model
        ids = ids.to(model.embed_tokens.weight.device)
        return model(input_ids=ids, use_cache=False).last_hidden_state[0].cpu()

    @cached_property
    def dropped_states(self) -> torch.Tensor:
        """States of the text that stands for a dropped prompt."""
        return self.text_states(prompt_text("", DROPPED_SYSTEM_PROMPT))

    def moments(self, image, max_pixels: int, place: str) -> torch.Tensor:
        """VAE moments (2*C, h, w) of an RGB image, in float32."""
        stride = self.pipeline.latent_stride
        return self._encode(reference_pixels(image, max_pixels, self.objective.max_side_length, stride, place))

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels[None]).latent_dist.parameters[0].float().cpu()

    # --- samples ---

    def latent(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Sampled, scaled latent (C, h, w) from moments (2*C, h, w) and noise (C, h, w)."""
        mean, logvar = moments.chunk(2)
        sampled = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise
        return (sampled - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def _sampled(self, moments: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
        return [self.latent(m, torch.randn(m.shape[0] // 2, *m.shape[1:], generator=generator)) for m in moments]

    def _latents(self, row: OmniGen2Row, generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Sampled latents of the references and of the target."""
        assert row.moments is not None
        *references, target = self._sampled([*row.reference_moments, row.moments], generator)
        return references, target

    def sample(self, prepared: OmniGen2Row, epoch: int) -> OmniGen2Sample:
        row, objective = prepared, self.objective

        def generator(purpose: str) -> torch.Generator:
            return named_generator(self.seed, row.id, epoch, purpose)

        chances = iter(torch.rand(3, generator=generator("dropout"), dtype=torch.float64).tolist())
        dropped = choose_dropped(
            lambda: next(chances),
            row.is_text_to_image,
            objective.prefix_dropout,
            objective.prompt_dropout,
            objective.reference_dropout,
        )
        text = row.texts[-1] if dropped.prefix else row.texts[0]
        if dropped.prompt:
            text = self.dropped_states
        latents = generator("latents")
        references, target = self._latents(row, latents)
        tokens = sum(_tokens(latent, self.patch) for latent in [*references, target])
        length = max(len(states) for states in row.texts) + tokens
        return OmniGen2Sample(
            id=row.id,
            text=text,
            references=[] if dropped.references else references,
            target=target,
            noise=torch.randn(target.shape, generator=generator("noise")),
            raw_time=torch.randn((), generator=generator("time")),
            patch=self.patch,
            full_length=length,
        )

    def validation_samples(self, prepared: OmniGen2Row, times: Sequence[float]) -> list[OmniGen2Sample]:
        def generator(purpose: str) -> torch.Generator:
            return named_generator(0, prepared.id, 0, f"validation {purpose}")

        references, target = self._latents(prepared, generator("latents"))
        text = prepared.texts[0]
        noise = torch.randn(target.shape, generator=generator("noise"))
        length = len(text) + sum(_tokens(latent, self.patch) for latent in [*references, target])
        tokens, shift = self._tokens_of_shift(target), self.objective.time_shift
        raw_times = [torch.tensor(raw_time_of(1 - time, tokens, shift)) for time in times]  # 0 is noise here
        return [
            OmniGen2Sample(prepared.id, text, references, target, noise, raw_time, self.patch, length)
            for raw_time in raw_times
        ]

    # --- distillation ---

    def latent_shape(self, row: dict, height: int | None, width: int | None) -> tuple[int, ...]:
        images, sides = row["reference_images"] or [], (DEFAULT_SIZE, DEFAULT_SIZE)
        if len(images) == 1:
            sides = tuple(self._call_pixels(images[0], "reference 0").shape[1:])
        factor = self.pipeline.vae_scale_factor
        return self.vae.config.latent_channels, (height or sides[0]) // factor, (width or sides[1]) // factor

    def generation_times(self, steps: int, latent_shape: Sequence[int]) -> list[float]:
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        set_times(scheduler, steps, latent_shape[1] * latent_shape[2])
        return [float(sigma) for sigma in scheduler.sigmas]

    def conditions(self, row: dict) -> OmniGen2Row:
        if row.get("answer"):
            raise ValueError("it has an answer, and only images are distilled.")
        images = [to_rgb(image, f"reference {i}") for i, image in enumerate(row["reference_images"] or [])]
        pixels = [self._call_pixels(image, f"reference {i}") for i, image in enumerate(images)]
        return OmniGen2Row(
            id=row["id"],
            texts=[self.text_states(prompt_text(row["instruction"]))],
            is_text_to_image=not images,
            reference_moments=[self._encode(p) for p in pixels],
            moments=None,
            instruction_key=row["instruction"],
        )

    def _call_pixels(self, image, place: str) -> torch.Tensor:
        """A reference at the size that a call of the pipeline gives it by default."""
        return reference_pixels(image, CALL_PIXELS, CALL_SIDE, self.pipeline.latent_stride, place)

    def line_sample(
        self,
        prepared: OmniGen2Row,
        image: torch.Tensor,
        noise: torch.Tensor,
        time: float,
        references: torch.Generator,
    ) -> OmniGen2Sample:
        latents = self._sampled(prepared.reference_moments, references)
        length = len(prepared.texts[0]) + sum(_tokens(latent, self.patch) for latent in [*latents, image])
        raw_time = raw_time_of(1 - time, self._tokens_of_shift(image), self.objective.time_shift)  # 0 is noise here
        text, raw = prepared.texts[0], torch.tensor(raw_time)
        return OmniGen2Sample(prepared.id, text, latents, image, noise, raw, self.patch, length)

    # --- batches ---

    def _tokens_of_shift(self, target: torch.Tensor) -> int:
        """The number of tokens by which times of a target (C, h, w) are shifted."""
        largest = self.objective.max_output_pixels // self.pipeline.latent_stride**2
        return _tokens(target, self.patch) if self.objective.dynamic_time_shift else largest

    def collate(self, samples: Sequence[OmniGen2Sample]) -> OmniGen2Batch:
        return collate(samples)

    # --- losses ---

    def loss_weights(self) -> dict[str, float]:
        return {"mse": 1.0}

    def denominators(self, batch: OmniGen2Batch) -> dict[str, float]:
        if self.objective.loss_normalization == "micro_batch":
            return {"mse": 1.0}
        return {"mse": float(sum(target.numel() for target in batch.targets))}

    def times(self, raw_time: torch.Tensor, targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Times (N,), 0 is noise, of standard normal numbers (N,) for targets (C, h, w)."""
        tokens = [self._tokens_of_shift(target) for target in targets]
        times = torch.sigmoid(raw_time.float())
        shift = self.objective.time_shift
        return torch.stack([shift_time(t, n, shift) for t, n in zip(times, tokens, strict=True)])

    def losses(self, model: Any, batch: OmniGen2Batch) -> dict[str, LossTerm]:
        times = self.times(batch.raw_time, batch.targets)
        noisy, velocities = flow_matching(batch.targets, batch.noises, times)
        predicted = model.transformer(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=batch.texts,
            ref_image_hidden_states=batch.references,
        ).sample
        values = [(p.float() - v).square().flatten() for p, v in zip(predicted, velocities, strict=True)]
        lengths = torch.tensor([len(x) for x in values])
        sample = torch.repeat_interleave(torch.arange(len(values)), lengths).to(times.device)
        weights = None
        if self.objective.loss_normalization == "micro_batch":
            weights = torch.full((int(lengths.sum()),), 1.0 / int(lengths.sum()), device=times.device)
        return {"mse": LossTerm(torch.cat(values), weights, sample)}

    # --- costs ---

    def flops(self, batch: OmniGen2Batch) -> float:
        return self.pipeline.transformer.flops(batch.counts)

    step_memory = staticmethod(omnigen2_costs.step_memory)
    call_memory = staticmethod(omnigen2_costs.call_memory)


def encoder_hash(module: nn.Module, left_out: tuple[str, ...]) -> str:
    """A hash of a frozen encoder's weights as they are loaded; `left_out` are prefixes of tensors that do not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        if not name.startswith(left_out or ("\0",)):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy())
    return digest.hexdigest()


BACKBONE = OmniGen2Backbone
