"""LoRA on a pipeline's transformer: `load_lora_weights`, `save_lora_adapter`, `set_adapters`, `fuse_lora`, ...

diffusers and PEFT do the work. The methods here raise errors where those would fail silently: pickles, adapters that
fit in part or not at all, a lost alpha, a fused scale that stays, and another adapter that is switched on when the
active one is deleted.
"""

import contextlib
import functools
import math
import numbers
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

from .lora_files import DIFFUSERS_FILE, check_adapter, find_adapter, lora_config, matrix_names, read_adapter
from .lora_formats import convert_adapter

_PREFIX = "transformer."


def scales_lora(call):
    """Decorator of a pipeline's method: its `attention_kwargs={"scale": s}` holds for the adapters during the call."""

    @functools.wraps(call)
    def scaled(self, *args, **kwargs):
        with self.lora_scaled(kwargs.get("attention_kwargs")):
            return call(self, *args, **kwargs)

    return scaled


class TransformerLoraMixin(CogVideoXLoraLoaderMixin):
    """Adapters of the pipeline's transformer. Put before `DiffusionPipeline` in the pipeline's bases."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"

    @property
    def lora_targets(self) -> dict[str, str]:
        """What adapters can be put into: name -> regular expression for `LoraConfig(target_modules=...)`."""
        return dict(self._model._lora_targets)

    # --- reading and writing ---

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict, return_lora_metadata: bool = False, **kwargs):
        """Adapter weights, named `transformer.*`, from a file, a folder, a Hub repository, or as given in a dict.

        `return_lora_metadata` adds the adapter's configuration, whose names have the same prefix (None: there is none). `weight_name`, `subfolder`,
        `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` as in diffusers.
        Raises ValueError for pickled or damaged weights and for a PEFT folder without its configuration.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False asks for pickled weights, which are not loaded.")
        source = pretrained_model_name_or_path_or_dict
        state, settings = (
            (dict(source), None) if isinstance(source, dict) else read_adapter(find_adapter(source, **kwargs))
        )
        if not return_lora_metadata:
            return state
        return state, None if settings is None else {f"{_PREFIX}{name}": value for name, value in settings.items()}

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        config=None,
        low_cpu_mem_usage: bool = True,
        **kwargs,
    ) -> None:
        """Put an adapter into the transformer and make it the active one.

        Args:
            pretrained_model_name_or_path_or_dict: as for `lora_state_dict`: what `save_lora_adapter`, the recipes or
                PEFT's `save_pretrained` wrote, or weights named `transformer.*`. Files of kohya and ComfyUI, and of
                PEFT on the original model, load if every name has one meaning and every alpha is known.
            adapter_name: for `set_adapters`; None takes the first free `default_N`.
            hotswap: replace the weights of the adapter of that name in place (no recompilation).
            config: a `LoraConfig` or its options, for weights that come without.

        Raises:
            ValueError: anything that would load in part, without effect or with an unknown alpha; the pipeline is
                as it was.
        """
        loaded = getattr(self.transformer, "peft_config", {})
        name = self._name_of_new(adapter_name, loaded, hotswap)
        self._require_unfused("load an adapter")
        state, settings = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        if settings is not None:
            settings = {name.removeprefix(_PREFIX): value for name, value in settings.items()}
        state, settings = convert_adapter(
            state, settings, matrix_names(self.transformer), getattr(self._model, "_original_names", {})
        )
        settings = config if config is not None else settings
        if settings is None:
            raise ValueError(
                "The adapter comes without its configuration, so that its alpha is unknown: give it with "
                "config=LoraConfig(r=..., lora_alpha=..., target_modules=...)."
            )
        settings = lora_config(settings)
        if foreign := [n for n in state if not n.startswith(_PREFIX)]:
            raise ValueError(f"The adapter does not belong to this model: {foreign[0]!r} is none of {_PREFIX}*.")
        tensors = {n.removeprefix(_PREFIX): t for n, t in state.items()}
        check_adapter(self.transformer, tensors, settings)
        self._require_unguessed(tensors)
        self.transformer.load_lora_adapter(
            dict(sorted(state.items())),  # diffusers judges the format by the first name
            metadata={f"{_PREFIX}{n}": v for n, v in settings.to_dict().items()},
            adapter_name=name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage and not hotswap,
            _pipeline=self,
        )
        if hotswap:
            self._renew_after_hotswap(name, settings)

    @staticmethod
    def _name_of_new(name: str | None, loaded: dict, hotswap: bool) -> str:
        if hotswap:
            if name not in loaded:
                raise ValueError(f"hotswap=True replaces an adapter; {name!r} is none of {sorted(loaded)}.")
            return name
        if name is None:
            return next(n for i in range(len(loaded) + 1) if (n := f"default_{i}") not in loaded)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"adapter_name={name!r} must be a word without a dot.")
        if name in loaded:
            raise ValueError(f"The adapter name {name!r} is in use: take another, or hotswap=True to replace it.")
        return name

    def _renew_after_hotswap(self, name: str, config) -> None:
        """PEFT swaps weights and scaling alone; later set_adapters and saving read rank and alpha from these."""
        from peft.utils.other import get_pattern_key

        self.transformer.peft_config[name] = config
        for key, layer in self._lora_layers():
            if name in layer.r:
                for values, pattern, default in (
                    (layer.r, config.rank_pattern, config.r),
                    (layer.lora_alpha, config.alpha_pattern, config.lora_alpha),
                ):
                    values[name] = pattern.get(get_pattern_key(pattern.keys(), key), default)

    def save_lora_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, weight_name: str = DIFFUSERS_FILE
    ) -> Path:
        """Write an adapter, with its configuration in the file's header, and return the file.

        `adapter_name` may be left out while there is only one. Raises ValueError for an unknown or ambiguous name.
        """
        from peft.utils import get_peft_model_state_dict

        transformer = self._model
        loaded = sorted(getattr(transformer, "peft_config", {}))
        if adapter_name is None and len(loaded) == 1:
            adapter_name = loaded[0]
        if adapter_name not in loaded:
            raise ValueError(f"adapter_name={adapter_name!r} must be one of the loaded adapters: {loaded}.")
        state = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
        ranks = {key: layer.r[adapter_name] for key, layer in self._lora_layers() if adapter_name in layer.r}
        for name, tensor in state.items():  # ranks grow to the largest one under enable_lora_hotswap
            if tensor.is_meta:
                raise ValueError("The adapter's weights are offloaded; call remove_all_hooks() and save again.")
            if name.endswith("lora_A.weight"):
                state[name] = tensor[: ranks[name.removesuffix(".lora_A.weight")]]
            elif name.endswith("lora_B.weight"):
                state[name] = tensor[:, : ranks[name.removesuffix(".lora_B.weight")]]
        self.save_lora_weights(
            save_directory,
            transformer_lora_layers={n: t.detach().cpu().contiguous() for n, t in state.items()},
            weight_name=weight_name,
            transformer_lora_adapter_metadata=transformer.peft_config[adapter_name].to_dict(),
        )
        return Path(save_directory, weight_name)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function=None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
    ) -> None:
        """As in diffusers, for weights at hand; `save_lora_adapter` saves a loaded adapter by its name.

        Raises ValueError without weights or configuration, and for pickles; NotADirectoryError for a file's path.
        """
        if not transformer_lora_layers or not transformer_lora_adapter_metadata:
            raise ValueError(
                "Give transformer_lora_layers and transformer_lora_adapter_metadata (the LoraConfig as a dict): an "
                "adapter without its alpha cannot be loaded."
            )
        if not safe_serialization:
            raise ValueError("safe_serialization=False asks for pickled weights, which are not written.")
        if Path(save_directory).is_file():
            raise NotADirectoryError(f"{save_directory} is a file; adapters are saved into a folder.")
        plain = {n: sorted(v) if isinstance(v, set) else v for n, v in transformer_lora_adapter_metadata.items()}
        super().save_lora_weights(
            save_directory,
            transformer_lora_layers=transformer_lora_layers,
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            transformer_lora_adapter_metadata=plain,
        )

    # --- using ---

    @property
    def _model(self) -> torch.nn.Module:
        """The transformer itself: diffusers' methods of the pipeline pass over one in torch.compile's wrapper."""
        return getattr(self.transformer, "_orig_mod", self.transformer)

    def _lora_layers(self) -> Iterator[tuple[str, Any]]:
        """Name and module of the layers that hold adapters."""
        if not getattr(self.transformer, "peft_config", None):
            return
        from peft.tuners.lora import LoraLayer

        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name.removeprefix("_orig_mod.").replace("._orig_mod", ""), module

    def _require_adapters(self, names) -> None:
        loaded = sorted(getattr(self.transformer, "peft_config", {}))
        if not loaded:
            raise ValueError("No adapter is loaded; load_lora_weights comes first.")
        if unknown := sorted(set(names) - set(loaded)):
            raise ValueError(f"There is no adapter {', '.join(map(repr, unknown))}; loaded are {', '.join(loaded)}.")

    def _require_unfused(self, what: str) -> None:
        if any(layer.merged_adapters for _, layer in self._lora_layers()):
            raise ValueError(
                f"An adapter is fused into the weights; to {what}, call unfuse_lora() first, or unload_lora_weights() "
                "to keep its effect for good."
            )

    def _require_unguessed(self, names) -> None:
        """An adapter of a module that a step cache has hooked, as proj_out, would be put around the hook or lose it."""
        outside = [name for name in names if not name.startswith("layers.")]
        if outside and self._model.is_cache_enabled:
            raise ValueError(
                f"The adapter acts outside the layers ({outside[0]}), where a step cache may be at work: call "
                "pipe.transformer.disable_cache() first, and enable_cache again afterwards."
            )

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters, by component."""
        loaded = list(getattr(self._model, "peft_config", {}))
        return {"transformer": loaded} if loaded else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that act unless `disable_lora` was called."""
        return next((list(layer.active_adapters) for _, layer in self._lora_layers()), [])

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights=None) -> None:
        """Make these adapters the active ones.

        `adapter_weights`: one for all, or a list with one for each; 1.0 where left out. A weight may be a dict by
        component, as in diffusers: {"transformer": 0.5}. Raises ValueError for other components.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        self._require_adapters(names)
        self._require_unfused("choose adapters")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"adapter_names={names} must name each adapter once, and one at least (or disable_lora).")
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights={adapter_weights!r} must be as many as the adapters: {len(names)}.")
        weights = [_of_component(weight, self.transformer_name) for weight in weights]
        weights = [1.0 if weight is None else _finite(weight, "adapter_weights") for weight in weights]
        self._model.set_adapters(names, weights)

    def enable_lora(self) -> None:
        """Let the active adapters act again after `disable_lora`."""
        self._model.enable_lora()

    def disable_lora(self) -> None:
        """Draw as without adapters, until `enable_lora`. Raises ValueError while an adapter is fused."""
        self._require_unfused("switch it off")
        self._model.disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters; those that were active beside them stay active, and no other one is switched on."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._require_adapters(names)
        self._require_unfused("delete an adapter")
        active = [n for n in self.get_active_adapters() if n not in names]
        self._model.delete_adapters(names)
        for _, layer in self._lora_layers():
            layer.set_adapter(active)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. What is fused stays in the weights for good."""
        self._require_unguessed(name for name, _ in self._lora_layers())
        self._model.unload_lora()
        self._model.__dict__.pop("_scaling_before_fuse", None)
        self._merged_adapters = set()

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
    ) -> None:
        """Add the active adapters (or `adapter_names`), times `lora_scale`, to the weights: no cost per call any more.

        Raises ValueError when adapters are fused already or switched off, and when one stays active beside them:
        layers with fused weights compute no others.
        """
        chosen = self.get_active_adapters() if adapter_names is None else list(adapter_names)
        if components not in (None, ["transformer"]):
            raise ValueError(f"components={components!r} must be ['transformer']: nothing else takes adapters.")
        self._require_adapters(chosen)
        self._require_unfused("fuse again")
        if beside := sorted(set(self.get_active_adapters()) - set(chosen)):
            raise ValueError(
                f"{', '.join(beside)} would have no effect beside fused adapters: fuse all, or set_adapters."
            )
        layers = [layer for _, layer in self._lora_layers()]
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("The adapters are switched off, and would be taken out again: call enable_lora() first.")
        if any(layer.lora_bias.get(name) and layer.base_layer.bias is None for layer in layers for name in chosen):
            raise ValueError("An adapter with lora_bias=True cannot be fused: some layers have no bias to add it to.")
        scale = _finite(lora_scale, "lora_scale")
        # Unfusing subtracts by the fused scaling, then restores this.
        self._model._scaling_before_fuse = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                for name in set(chosen) & set(layer.scaling):
                    layer.scaling[name] = layer.scaling[name] * scale
            self._model.fuse_lora(safe_fusing=safe_fusing, adapter_names=chosen)
        except BaseException:  # safe_fusing found NaN in one layer, after others were fused
            self.unfuse_lora()
            raise
        self._merged_adapters = set(chosen)

    def unfuse_lora(self, components: list[str] | None = None) -> None:
        """Take fused adapters out of the weights again; they stay loaded and active. Exact to rounding."""
        self._model.unfuse_lora()
        before = self._model.__dict__.pop("_scaling_before_fuse", ())
        for (_, layer), scaling in zip(self._lora_layers(), before):
            layer.scaling.update(scaling)
        self._merged_adapters = set()

    @contextlib.contextmanager
    def lora_scaled(self, attention_kwargs: dict | None) -> Iterator[None]:
        """diffusers' `attention_kwargs={"scale": s}`: the active adapters' weights times `s`, until the block ends.

        Raises ValueError for anything else in it, and where there is nothing to scale.
        """
        scale = 1.0 if attention_kwargs is None else _read_scale(attention_kwargs)
        if scale == 1.0:
            yield
            return
        self._require_adapters(())
        self._require_unfused("scale it")
        layers = [layer for _, layer in self._lora_layers()]
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer in layers:
                for name in layer.active_adapters:
                    if name in layer.scaling:
                        layer.scaling[name] = layer.scaling[name] * scale
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)


def _of_component(weight, component: str):
    """The weight of a component in diffusers' form {component: weight}; other forms as they are."""
    if not isinstance(weight, dict):
        return weight
    if set(weight) != {component}:
        raise ValueError(f"adapter_weights has {weight!r}: only {component!r} takes adapters, with one number.")
    return weight[component]


def _read_scale(options: dict) -> float:
    if not isinstance(options, dict) or set(options) - {"scale"}:
        raise ValueError(
            f'attention_kwargs={options!r} is not possible: it takes {{"scale": number}} and nothing else.'
        )
    return _finite(options.get("scale", 1.0), "the scale of attention_kwargs")


def _finite(value, what: str) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{value!r} for {what} must be a finite number.")
    return float(value)
