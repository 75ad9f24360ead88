"""LoRA adapters of a pipeline's transformer: `load_lora_weights`, `save_lora_adapter`, `set_adapters`, `fuse_lora`, ...

The methods call diffusers and PEFT and add checks. They raise errors for pickles, adapters that do not fit the model
completely, and a missing alpha; they restore the scale after unfusing, and they do not activate other adapters when the
active one is deleted.
"""

import contextlib
import functools
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

from .adapter_presets import PRESET_KEY, SamplingPreset, common_preset
from .concurrency import in_use
from .lora_files import (
    DIFFUSERS_FILE,
    check_adapter,
    find_adapter,
    lora_config,
    matrix_names,
    read_adapter,
    write_adapter,
)
from .lora_formats import convert_adapter

_PREFIX = "transformer."


def scales_lora(call):
    """Decorator of a pipeline's method: applies its argument `attention_kwargs={"scale": s}` during the call."""

    @functools.wraps(call)
    def scaled(self, *args, **kwargs):
        options = kwargs.get("attention_kwargs")
        changes_model = bool(options) or getattr(self.transformer, "is_cache_enabled", False)
        model, kept = (self.transformer,), (getattr(self, "prefill_cache", None),)
        with in_use(model + kept if changes_model else kept, model), self.lora_scaled(options):
            return call(self, *args, **kwargs)

    return scaled


class TransformerLoraMixin(CogVideoXLoraLoaderMixin):
    """Adapters of the pipeline's transformer. Put before `DiffusionPipeline` in the pipeline's bases."""

    _lora_loadable_modules = ["transformer"]
    transformer_name = "transformer"
    transformer: Any

    @property
    def lora_targets(self) -> dict[str, str]:
        """Groups of modules for adapters: name -> regular expression for `LoraConfig(target_modules=...)`."""
        return dict(self._model._lora_targets)

    # --- reading and writing ---

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict, return_lora_metadata: bool = False, **kwargs
    ) -> Any:
        """Adapter weights, named `transformer.*`, of a file, a folder or a Hub repository, or a given dict of them.

        Args:
            return_lora_metadata: also return the adapter's configuration, whose names have the same prefix, or None if
                there is none.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download` and
                `local_files_only`, as in diffusers.

        Raises ValueError for pickled or damaged weights and for a PEFT folder without its configuration.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False means pickled weights, which are not loaded.")
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
        """Load an adapter into the transformer and activate it.

        Args:
            pretrained_model_name_or_path_or_dict: an adapter written by `save_lora_adapter`, a training recipe or
                PEFT's `save_pretrained`, as in `lora_state_dict`; or a dict of weights named `transformer.*`. Files of
                kohya and ComfyUI, and of PEFT on the original model, load if every name has one meaning and every
                alpha is known.
            adapter_name: name for `set_adapters`; None: the first unused name of the form `default_N`.
            hotswap: replace the weights of the loaded adapter of this name in place, without recompilation.
            config: a `LoraConfig` or a dict of its options, for weights without configuration.

        Raises:
            ValueError: the adapter would load in part, without effect or with an unknown alpha. The pipeline does not
                change.
        """
        loaded = getattr(self.transformer, "peft_config", {})
        name = self._new_name(adapter_name, loaded, hotswap)
        self._require_unfused("load an adapter")
        source: Any = pretrained_model_name_or_path_or_dict
        state, settings = self.lora_state_dict(source, return_lora_metadata=True, **kwargs)
        if settings is not None:
            settings = {name.removeprefix(_PREFIX): value for name, value in settings.items()}
        state, settings = convert_adapter(
            state, settings, matrix_names(self.transformer), getattr(self._model, "_original_names", {})
        )
        settings = config if config is not None else settings
        if settings is None:
            raise ValueError(
                "The adapter has no configuration, so that its alpha is unknown: pass "
                "config=LoraConfig(r=..., lora_alpha=..., target_modules=...)."
            )
        stored = settings.get(PRESET_KEY) if isinstance(settings, dict) else None
        preset = None if stored is None else SamplingPreset.read(stored)
        settings = lora_config(settings)
        if foreign := [n for n in state if not n.startswith(_PREFIX)]:
            raise ValueError(
                f"The adapter does not belong to this model: {foreign[0]!r} does not begin with {_PREFIX!r}."
            )
        tensors = {n.removeprefix(_PREFIX): t for n, t in state.items()}
        check_adapter(self.transformer, tensors, settings)
        self._require_uncached(tensors)
        self.transformer.load_lora_adapter(
            dict(sorted(state.items())),  # diffusers detects the format by the first name
            metadata={f"{_PREFIX}{n}": v for n, v in settings.to_dict().items()},
            adapter_name=name,
            hotswap=hotswap,
            low_cpu_mem_usage=low_cpu_mem_usage and not hotswap,
            _pipeline=self,
        )
        if hotswap:
            self._renew_after_hotswap(name, settings)
        self._presets.pop(name, None)
        if preset is not None:
            self._presets[name] = preset

    @staticmethod
    def _new_name(name: str | None, loaded: dict, hotswap: bool) -> str:
        """The name to load an adapter under. Raises ValueError for an invalid name."""
        if hotswap:
            if name is None or name not in loaded:
                raise ValueError(f"hotswap=True replaces an adapter; {name!r} is none of {sorted(loaded)}.")
            return name
        if name is None:
            return next(n for i in range(len(loaded) + 1) if (n := f"default_{i}") not in loaded)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"adapter_name={name!r} must be a non-empty string without a dot.")
        if name in loaded:
            raise ValueError(f"The adapter name {name!r} is in use: use another one, or hotswap=True to replace it.")
        return name

    def _renew_after_hotswap(self, name: str, config) -> None:
        """Update rank and alpha, which set_adapters and saving read: PEFT replaces only weights and scaling."""
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
        """Write an adapter, with its configuration in the header of the file, and return the file's path.

        `adapter_name` is optional if one adapter is loaded. Raises ValueError for an unknown or ambiguous name.
        """
        from peft.utils import get_peft_model_state_dict

        transformer = self._model
        loaded = sorted(getattr(transformer, "peft_config", {}))
        if adapter_name is None and len(loaded) == 1:
            adapter_name = loaded[0]
        if adapter_name is None or adapter_name not in loaded:
            raise ValueError(f"adapter_name={adapter_name!r} must be one of the loaded adapters: {loaded}.")
        state = get_peft_model_state_dict(transformer, adapter_name=adapter_name)
        ranks = {key: layer.r[adapter_name] for key, layer in self._lora_layers() if adapter_name in layer.r}
        for name, tensor in state.items():  # enable_lora_hotswap pads all ranks to the largest one
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
            sampling_preset=self._presets.get(adapter_name),
        )
        return Path(save_directory, weight_name)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: Mapping[str, Any] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function=None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict | None = None,
        sampling_preset: SamplingPreset | None = None,
    ) -> None:
        """Write given weights as in diffusers. To save a loaded adapter by its name, use `save_lora_adapter`.

        Raises ValueError without weights or configuration, and for pickles; NotADirectoryError if the path is a file.
        """
        if not transformer_lora_layers or not transformer_lora_adapter_metadata:
            raise ValueError(
                "Pass transformer_lora_layers and transformer_lora_adapter_metadata (the LoraConfig as a dict): an "
                "adapter without its alpha cannot be loaded."
            )
        if not safe_serialization:
            raise ValueError("safe_serialization=False means pickled weights, which are not written.")
        if Path(save_directory).is_file():
            raise NotADirectoryError(f"{save_directory} is a file; adapters are saved into a folder.")
        if not is_main_process:
            return
        tensors = {f"{_PREFIX}{name}": tensor for name, tensor in transformer_lora_layers.items()}
        file = Path(save_directory, weight_name or DIFFUSERS_FILE)
        file.parent.mkdir(parents=True, exist_ok=True)
        if save_function is not None:
            save_function(tensors, str(file))
        else:
            write_adapter(file, tensors, transformer_lora_adapter_metadata, sampling_preset)

    # --- using ---

    @property
    def _model(self) -> Any:
        """The transformer without torch.compile's wrapper, which diffusers' methods of the pipeline skip."""
        return getattr(self.transformer, "_orig_mod", self.transformer)

    @property
    def _presets(self) -> dict[str, SamplingPreset]:
        """The sampling presets of the loaded adapters, by name."""
        return self._model.__dict__.setdefault("_adapter_presets", {})

    @property
    def sampling_preset(self) -> SamplingPreset | None:
        """The preset that calls use: that of the adapters that are active, turned on and not weighted by 0.

        Raises ValueError if two of them have different presets.
        """
        layers = [layer for _, layer in self._lora_layers() if not layer.disable_adapters] if self._presets else []
        acting = {n for layer in layers for n in layer.active_adapters if layer.scaling.get(n)}
        return self.sampling_preset_of(acting)

    def sampling_preset_of(self, adapters: Iterable[str]) -> SamplingPreset | None:
        """The preset that calls would use with these adapters active. Raises ValueError if two have different presets."""
        names = set(adapters)
        return common_preset({name: preset for name, preset in self._presets.items() if name in names})

    def _lora_layers(self) -> Iterator[tuple[str, Any]]:
        """Names and modules of the layers with adapters."""
        if not getattr(self.transformer, "peft_config", None):
            return
        from peft.tuners.lora import LoraLayer

        for name, module in self.transformer.named_modules():
            if isinstance(module, LoraLayer):
                yield name.removeprefix("_orig_mod.").replace("._orig_mod", ""), module

    def _require_adapters(self, names) -> None:
        loaded = sorted(getattr(self.transformer, "peft_config", {}))
        if not loaded:
            raise ValueError("No adapter is loaded; call load_lora_weights first.")
        if unknown := sorted(set(names) - set(loaded)):
            raise ValueError(f"There is no adapter {', '.join(map(repr, unknown))}; loaded are {', '.join(loaded)}.")

    def _require_unfused(self, what: str) -> None:
        """Raise ValueError if an adapter is fused; `what` is the action in the message."""
        if any(layer.merged_adapters for _, layer in self._lora_layers()):
            raise ValueError(
                f"An adapter is fused into the weights; to {what}, first call unfuse_lora(), or unload_lora_weights() "
                "to keep its effect permanently."
            )

    def _require_uncached(self, names) -> None:
        """Raise ValueError if adapters would wrap or replace a module that a step cache has hooked (proj_out)."""
        outside = [name for name in names if not name.startswith("layers.")]
        if outside and self._model.is_cache_enabled:
            raise ValueError(
                f"The adapter changes {outside[0]}, which a step cache may use: call "
                "pipe.transformer.disable_cache() first, and enable_cache again afterwards."
            )

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the loaded adapters, by component."""
        loaded = list(getattr(self._model, "peft_config", {}))
        return {"transformer": loaded} if loaded else {}

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters, including those that `disable_lora` turned off."""
        return next((list(layer.active_adapters) for _, layer in self._lora_layers()), [])

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights=None) -> None:
        """Activate these adapters.

        `adapter_weights`: one weight for all or a list; None means 1.0. A weight may be a dict by component, as in
        diffusers: {"transformer": 0.5}. Raises ValueError for other components.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        self._require_adapters(names)
        self._require_unfused("choose adapters")
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"adapter_names={names} must contain at least one adapter, and each one once. To use none, call disable_lora."
            )
        if len(weights) != len(names):
            raise ValueError(f"adapter_weights={adapter_weights!r} must have one weight per adapter: {len(names)}.")
        weights = [_of_component(weight, self.transformer_name) for weight in weights]
        weights = [1.0 if weight is None else _finite(weight, "adapter_weights") for weight in weights]
        self._model.set_adapters(names, weights)

    def enable_lora(self) -> None:
        """Turn the active adapters on again after `disable_lora`."""
        self._model.enable_lora()

    def disable_lora(self) -> None:
        """Turn all adapters off until `enable_lora`. Raises ValueError if an adapter is fused."""
        self._require_unfused("turn it off")
        self._model.disable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters. Other adapters stay active or inactive."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._require_adapters(names)
        self._require_unfused("delete an adapter")
        active = [n for n in self.get_active_adapters() if n not in names]
        self._model.delete_adapters(names)
        for name in names:
            self._presets.pop(name, None)
        for _, layer in self._lora_layers():
            layer.set_adapter(active)

    def unload_lora_weights(self) -> None:
        """Remove all adapters. Fused adapters remain in the weights permanently."""
        self._require_uncached(name for name, _ in self._lora_layers())
        self._model.unload_lora()
        for name in ("_scaling_before_fuse", "_adapter_presets"):
            self._model.__dict__.pop(name, None)
        self._merged_adapters = set()

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs,
    ) -> None:
        """Add the active adapters (or `adapter_names`), times `lora_scale`, to the weights, to save time per call.

        Raises ValueError if adapters are already fused or turned off, or if another one would stay active: layers with
        fused weights ignore it.
        """
        _require_no_options(kwargs)
        chosen = self.get_active_adapters() if adapter_names is None else list(adapter_names)
        if components not in (None, ["transformer"]):
            raise ValueError(f"components={components!r} must be ['transformer']: no other component has adapters.")
        self._require_adapters(chosen)
        self._require_unfused("fuse again")
        if beside := sorted(set(self.get_active_adapters()) - set(chosen)):
            raise ValueError(
                f"{', '.join(beside)} would have no effect beside fused adapters: fuse all, or call set_adapters."
            )
        layers = [layer for _, layer in self._lora_layers()]
        if any(layer.disable_adapters for layer in layers):
            raise ValueError("The adapters are turned off: call enable_lora() first.")
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

    def unfuse_lora(self, components: list[str] | None = None, **kwargs) -> None:
        """Subtract fused adapters from the weights, exact up to rounding. They stay loaded and active."""
        _require_no_options(kwargs)
        self._model.unfuse_lora()
        before = self._model.__dict__.pop("_scaling_before_fuse", ())
        for (_, layer), scaling in zip(self._lora_layers(), before):
            layer.scaling.update(scaling)
        self._merged_adapters = set()

    @contextlib.contextmanager
    def lora_scaled(self, attention_kwargs: dict | None) -> Iterator[None]:
        """Context that multiplies the weights of the active adapters by `attention_kwargs["scale"]`, as in diffusers.

        Raises ValueError for any other key, and if no adapter is loaded or one is fused.
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
    """The component's entry of a weight given as a dict; other weights do not change."""
    if not isinstance(weight, dict):
        return weight
    if set(weight) != {component}:
        raise ValueError(f"adapter_weights has {weight!r}: only {component!r} has adapters, with one weight.")
    return weight[component]


def _require_no_options(options: dict) -> None:
    if options:
        raise TypeError(f"unexpected arguments: {', '.join(options)}")


def _read_scale(options: dict) -> float:
    if not isinstance(options, dict) or set(options) - {"scale"}:
        raise ValueError(f'attention_kwargs={options!r} must be {{"scale": number}}.')
    return _finite(options.get("scale", 1.0), "the scale of attention_kwargs")


def _finite(value, what: str) -> float:
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{value!r} for {what} must be a finite number.")
    return float(value)
