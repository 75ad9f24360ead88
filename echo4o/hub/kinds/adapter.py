"""A LoRA adapter: one small file that is loaded on the base that its card names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from echo4o.hub.facts import base_of, is_repository, read_results, read_training
from echo4o.hub.kinds.base import SMALL_BYTES, Kind, Read
from echo4o.hub.kinds.pipeline import empty_component, has_released_sizes, hub_datasets, picture_files, widget
from echo4o.hub.remote import Source
from echo4o.model_cards.cards import adapter_card
from echo4o.modeling.bagel.loading_bagel import INDEX_NAME
from echo4o.modeling.bagel.pipeline_echo4o import Echo4oPipeline
from echo4o.modeling.bagel.weights_bagel import read_header

WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
_CONFIGS = [INDEX_NAME, "*/config.json"]


class Adapter(Kind):
    name = "adapter"

    def files(self, there: Mapping[str, Read]) -> dict[str, Source]:
        return super().files(there) | picture_files(self)

    @property
    def base_model(self) -> str:
        """The Hub repository that the card names; ValueError when nobody says which."""
        base = self.said.base_model or base_of(self.run)
        if not base or not is_repository(base):
            trained = f"; it was trained on the folder {base}" if base else ""
            raise ValueError(
                f"an adapter is nothing without its base: name the Hub repository with --base-model owner/name{trained}"
            )
        return base

    def check(self) -> str:
        """Every matrix fits the base that the card names; on a small base the adapter is loaded."""
        if not (self.folder / WEIGHTS).is_file():
            raise ValueError(
                f"{self.folder} holds {PEFT_WEIGHTS}, which the Hub's loaders do not find: load it with "
                f"pipe.load_lora_weights, save it with save_lora_weights, and push the {WEIGHTS} that comes out"
            )
        self._settings()
        base = self.fetch(self.base_model, _CONFIGS)
        if not (base / INDEX_NAME).is_file():
            raise ValueError(f"the base {self.base_model} is no pipeline: its repository has no {INDEX_NAME}")
        model = empty_component(base, "transformer")
        require_fit(self.folder / WEIGHTS, model, self.base_model)
        if sum(p.numel() * p.element_size() for p in model.parameters()) > SMALL_BYTES:
            return f"every matrix fits {self.base_model}, which is too large to be loaded here"
        pipeline = Echo4oPipeline.from_pretrained(self.fetch(self.base_model))
        pipeline.load_lora_weights(str(self.folder))
        return f"it loads on {self.base_model}"

    def card(self, repo: str, files: Mapping[str, Source]) -> str:
        return adapter_card(
            repo,
            self._settings(),
            has_released_sizes(self.fetch(self.base_model, _CONFIGS)),
            base_model=self.base_model,
            datasets=hub_datasets(self),
            training=read_training(self.run),
            results=read_results(self.said.results, self.folder, repo, "adapter"),
            widget=widget(self),
        )

    def _settings(self) -> dict[str, Any]:
        with safe_open(self.folder / WEIGHTS, "pt") as file:
            text = (file.metadata() or {}).get("lora_adapter_metadata")
        if not text:
            raise ValueError(f"{self.folder / WEIGHTS} says nothing about its alpha: save it again with echo4o")
        settings = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        return {"use_rslora": False, "use_dora": False} | settings

    def next_command(self, repo: str) -> str:
        return f"echo4o evaluate generate genevalpp --model {self.base_model} --adapter {repo} --out runs/scores"


def require_fit(file: Path, model, base: str) -> None:
    """Raise ValueError unless each pair of an adapter's matrices fits a matrix of the base's transformer."""
    shapes = {name.removesuffix(".weight"): tuple(p.shape) for name, p in model.named_parameters()}
    tensors, problems, pairs = read_header(file), [], {}
    for name, tensor in tensors.items():
        layer, _, side = name.removeprefix("transformer.").partition(".lora_")
        if layer not in shapes or not side:
            problems.append(f"{name}: the base has no such matrix")
        elif side in ("A.weight", "B.weight"):
            pairs.setdefault(layer, {})[side[0]] = tensor.shape
    for layer, pair in pairs.items():
        fits = (
            pair.keys() == {"A", "B"}
            and (pair["B"][0], pair["A"][1]) == shapes[layer]
            and pair["A"][0] == pair["B"][1]
        )
        if not fits:
            problems.append(f"{layer}: {pair} does not fit {shapes[layer]}")
    if problems or not pairs:
        raise ValueError(
            f"{file} is no adapter of {base}:\n  " + "\n  ".join(problems[:8] or ["it holds no matrices"])
        )
