"""The settings of the app: one control for each option that the model has, and none for those it lacks."""

from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from echo4o.serving.served_model import ServedModel

# option -> (label, lowest, highest, step)
_SLIDERS = {
    "num_inference_steps": ("Updates (more: finer and slower)", 1, None, 1),
    "guidance_scale": ("Strength of the prompt", 1.0, 15.0, 0.1),
    "image_guidance_scale": ("Strength of the references", 1.0, 10.0, 0.1),
}
_PRESET_LABELS = {"text_to_image": "text to image", "with_references": "with references"}
_BY_PRESET = "of the checkpoint"


@dataclass
class Controls:
    """The components of one tab's settings, by the name of what they set."""

    model: ServedModel
    components: dict[str, Any] = field(default_factory=dict)

    def read(self, values: dict[Any, Any]) -> dict[str, Any]:
        """Arguments of `ServedModel.image_tasks` from the values of the components.

        Raises:
            ValueError: for values that the model does not allow.
        """
        given = {name: values.get(component) for name, component in self.components.items()}
        options = {name: given[name] for name in _SLIDERS if given.get(name) is not None}
        if given.get("preset", _BY_PRESET) == _BY_PRESET:
            options = {name: value for name, value in options.items() if name == "num_inference_steps"}
        elif given.get("preset") in _PRESET_LABELS:
            preset = self.model.preset(given["preset"] == "with_references")
            options |= {name: value for name, value in preset.items() if name in self.model.image_options}
        for name in ("think", "negative_prompt"):
            if given.get(name):
                options[name] = given[name]
        height, width = _size(given)
        names = given.get("adapters")
        scales = [float(given[_scale_of(name)] or 0.0) for name in names] if names else None
        return {
            "count": int(given.get("count") or 1),
            "seed": _seed(given.get("seed")),
            "height": height,
            "width": width,
            "options": self.model.read_options(options),
            "adapters": self.model.read_adapters(names, scales),
        }

    def restore(self, seed: int, settings: dict[str, Any]) -> dict[Any, Any]:
        """Updates that set the components to the settings of an image."""
        updates = {self.components["seed"]: str(seed), self.components["count"]: 1}
        for name in (*_SLIDERS, "think", "negative_prompt"):
            if name in self.components and name in settings:
                updates[self.components[name]] = settings[name]
        if "preset" in self.components:
            updates[self.components["preset"]] = "my own"
        if "size" in self.components:
            updates[self.components["size"]] = "custom"
            updates[self.components["height"]] = settings["height"]
            updates[self.components["width"]] = settings["width"]
        if "adapters" in self.components:
            adapters = settings.get("adapters", [])
            updates[self.components["adapters"]] = [each["name"] for each in adapters]
            updates |= {self.components[_scale_of(each["name"])]: each["scale"] for each in adapters}
        return updates


def _scale_of(adapter: str) -> str:
    """Name of the component with the scale of an adapter."""
    return f"scale of {adapter}"


def _seed(text: str | None) -> int | None:
    text = (text or "").strip()
    if text and not text.isdecimal():
        raise ValueError(f"seed: must be a whole number, or empty (given: {text[:40]!r})")
    return int(text) if text else None


def _size(given: dict[str, Any]) -> tuple[int | None, int | None]:
    size = given.get("size")
    if size == "custom":
        return int(given["height"]), int(given["width"])
    if not size or size == "automatic":
        return None, None
    width, _, height = size.partition(" x ")
    return int(height), int(width.split(" ")[-1])


def size_presets(model: ServedModel) -> list[str]:
    """Sizes as "WIDTH x HEIGHT": squares and common formats within the checkpoint's limits, where it has some."""
    limits = getattr(model.pipe, "vae_limits", None)
    if limits is None or not model.takes_size:
        return []
    largest, stride = limits.max_size, limits.stride

    def fitting(value: float) -> int:
        return max(stride, round(value / stride) * stride)

    sizes = [(largest, largest)]
    for ratio in (3 / 2, 16 / 9):
        short = fitting(largest / ratio)
        sizes += [(largest, short), (short, largest)]
    if limits.min_size < largest:
        sizes.append((limits.min_size, limits.min_size))
    return list(dict.fromkeys(f"{width} x {height}" for width, height in sizes))


def build_controls(model: ServedModel, tab: str) -> Controls:
    """The settings of a tab, inside the current layout."""
    controls = Controls(model)
    parts = controls.components
    with gr.Row():
        parts["count"] = gr.Slider(
            1, model.limits.images, 1, step=1, label="Number of images", elem_id=f"{tab}-count", min_width=200
        )
        parts["seed"] = gr.Textbox("", label="Seed (empty: a new one)", elem_id=f"{tab}-seed", min_width=140)
    with gr.Accordion("Settings", open=False, elem_id=f"{tab}-settings"):
        _build_options(model, parts, tab)
        _build_size(model, parts, tab)
        if model.adapter_names:
            _build_adapters(model, parts, tab)
    return controls


def _build_options(model: ServedModel, parts: dict[str, Any], tab: str) -> None:
    with_references = tab == "edit"
    preset = model.preset(with_references)
    values = model.default_settings(with_references, model.default_adapters)
    known = [name for name in _SLIDERS if name in model.image_options]
    if preset:
        parts["preset"] = gr.Dropdown(
            [_BY_PRESET, *_PRESET_LABELS, "my own"],
            value=_BY_PRESET,
            label="Guidance",
            info="The checkpoint's own for the task or a few-step adapter's, one of its presets, or the values below",
            elem_id=f"{tab}-preset",
        )
    with gr.Row():
        for name in known:
            label, low, high, step = _SLIDERS[name]
            value = values.get(name, low)
            high = high or model.limits.steps
            slider = gr.Slider(low, high, value, step=step, label=label, elem_id=f"{tab}-{name}", min_width=200)
            parts[name] = slider
            if preset and name != "num_inference_steps":
                slider.input(lambda: "my own", None, parts["preset"], api_visibility="private", show_progress="hidden")
    if "think" in model.image_options:
        parts["think"] = gr.Checkbox(False, label="Plan in words first", elem_id=f"{tab}-think")
    if "negative_prompt" in model.image_options:
        parts["negative_prompt"] = gr.Textbox("", label="What to avoid", elem_id=f"{tab}-negative")


def _build_adapters(model: ServedModel, parts: dict[str, Any], tab: str) -> None:
    """The selection of adapters and their strengths. It sets the number of updates, which few-step adapters reduce."""
    active = dict(model.default_adapters)

    def updates_of(names: list[str]) -> int:
        try:
            adapters = model.read_adapters(names, None)
        except ValueError:  # they need different sampling, which is an error when images are generated
            adapters = ()
        return model.default_settings(False, adapters)["num_inference_steps"]

    parts["adapters"] = gr.CheckboxGroup(
        model.adapter_names, value=list(active), label="Adapters", elem_id=f"{tab}-adapters"
    )
    steps = parts.get("num_inference_steps")
    if steps is not None:
        parts["adapters"].input(updates_of, parts["adapters"], steps, api_visibility="private", show_progress="hidden")
    with gr.Row():
        for name in model.adapter_names:
            scale = active.get(name, 1.0)
            low, high = min(0.0, scale), max(2.0, scale)
            parts[_scale_of(name)] = gr.Slider(
                low, high, scale, step=0.05, label=f"Strength of {name}", elem_id=f"{tab}-scale-{name}", min_width=200
            )


def _build_size(model: ServedModel, parts: dict[str, Any], tab: str) -> None:
    if not model.takes_size:
        return
    with gr.Row():
        parts["size"] = gr.Dropdown(
            ["automatic", *size_presets(model), "custom"],
            value="automatic",
            label="Size (width x height)",
            info="automatic: the checkpoint's size, or that of the last reference",
            elem_id=f"{tab}-size",
        )
        limits = getattr(model.pipe, "vae_limits", None)
        side = limits.max_size if limits else 1024
        parts["width"] = gr.Number(side, label="Width, for custom", precision=0, minimum=1, min_width=120)
        parts["height"] = gr.Number(side, label="Height, for custom", precision=0, minimum=1, min_width=120)
