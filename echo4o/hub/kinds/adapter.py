"""Publishes a LoRA adapter; its card names the base model."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig

from echo4o.hub.facts import base_of, read_results, read_training
from echo4o.hub.kinds.base import SMALL_BYTES, Kind, Read
from echo4o.hub.kinds.pipeline import (
    empty_component,
    eval_results,
    has_released_sizes,
    hub_base,
    hub_datasets,
    sample_image_files,
    widget,
)
from echo4o.hub.remote import Source
from echo4o.model_cards.cards import adapter_card
from echo4o.model_cards.facts import read_family
from echo4o.modeling.common.lora_files import check_adapter, find_adapter, lora_config, read_adapter
from echo4o.modeling.common.publishing import INDEX_NAME
from echo4o.modeling.pipelines import pipeline_class

_CONFIGS = [INDEX_NAME, "*/config.json"]


class AdapterKind(Kind):
    name = "adapter"

    def files(self, published: Mapping[str, Read]) -> dict[str, Source]:
        return super().files(published) | sample_image_files(self) | eval_results(self)

    @cached_property
    def base_model(self) -> str:
        """The Hub repository of the base model. Raises ValueError if it is not known."""
        if base := hub_base(self):
            return base
        trained = f"; it was trained on {base_of(self.run)}, which is not a Hub repository" if self.run else ""
        raise ValueError(
            f"the card of an adapter names its base model: pass its Hub repository with --base-model owner/name{trained}"
        )

    @cached_property
    def configs(self) -> Path:
        """A folder with the configurations of the base model, downloaded from the Hub."""
        folder = self.hub.fetch(self.base_model, _CONFIGS)
        if not (folder / INDEX_NAME).is_file():
            raise ValueError(f"the base model {self.base_model} is not a pipeline: its repository has no {INDEX_NAME}")
        return folder

    @cached_property
    def weights(self) -> tuple[dict[str, torch.Tensor], LoraConfig]:
        """Its tensors, named as in the transformer, and its LoraConfig."""
        file = find_adapter(self.folder)
        state, settings = read_adapter(file)
        if settings is None:
            raise ValueError(f"{file} has no configuration, so its alpha is not known")
        return {name.removeprefix("transformer."): tensor for name, tensor in state.items()}, lora_config(settings)

    def check(self) -> str:
        """Checks that every matrix fits the base model, and loads the adapter if the base model is small."""
        model = empty_component(self.configs, "transformer")
        check_adapter(model, *self.weights)
        if sum(p.numel() * p.element_size() for p in model.parameters()) > SMALL_BYTES:
            return f"every matrix fits {self.base_model}, which is too large to load here"
        base = self.hub.fetch(self.base_model)
        pipeline_class(base).from_pretrained(base).load_lora_weights(str(self.folder))
        return f"it loads on {self.base_model}"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return adapter_card(
            repo,
            read_family(pipeline_class(self.configs)._card_family),
            vars(self.weights[1]),
            has_released_sizes(self.configs),
            base_model=self.base_model,
            datasets=hub_datasets(self),
            training=read_training(self.run),
            results=read_results(self.details.results, self.folder, repo, "adapter"),
            widget=widget(self),
        )

    def next_command(self, repo: str) -> str:
        return f"echo4o evaluate generate genevalpp --model {self.base_model} --adapter {repo} --out runs/scores"
