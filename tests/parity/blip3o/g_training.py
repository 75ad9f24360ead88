"""Training: rows to ids and batches, the loss and its gradients, and three optimizer steps."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from echo4o.modeling.blip3o.conditions_blip3o import IMAGE_SIDE, central_crop, image_states
from echo4o.modeling.blip3o.original_layout import key_of
from echo4o.modeling.blip3o.prompts_blip3o import CAPTION, IMAGE, RECONSTRUCT, encode, training_text
from echo4o.training.backbones.blip3o_objective import HeadCondition, TimeTable, add_noise, blip3o_errors

from ..golden import GoldenFile, Record
from ..report import Check
from .b_eva import PATCHES, PIXELS, golden_pixels
from .golden_set import GoldenSet
from .tolerances import FORWARD, TRAINING, close

NO_LABEL, VALUES = -100, 8


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    arguments, tensors = file.json["arguments"], file.tensors
    with check.trying("scheduler"):
        _check_scheduler(golden, tensors.under("scheduler"), check.of("scheduler"))
    limit = arguments["model_max_length"]
    check("model_max_length", golden.pipeline.config.tokenizer_max_length, limit)
    rows = arguments["rows"]
    ids = []
    for number, row in enumerate(rows):
        with check.trying(f"row{number}"):
            check(f"row{number}.type", row["type"], "T2I")
            text = training_text(CAPTION + row["txt"])
            check(f"row{number}.text", text, row["text"])
            ids.append(_check_ids(golden, text, tensors.under(f"row{number}"), check.of(f"row{number}")))
    for number, caption in enumerate(arguments["odd_captions_with_n_und_query_0"]):
        with check.trying(f"odd{number}"):
            text = training_text(CAPTION + caption, image_size=0)
            check(f"odd{number}.input_ids", encode(golden.pipeline.tokenizer, text), tensors[f"odd{number}.input_ids"])
    with check.trying("batch"):
        room = limit - golden.pipeline.transformer.config.num_queries - 1
        ids = [row[:room] for row in ids]
        names = [row["image"] for row in rows]
        features = _check_batch(golden, ids, names, tensors.under("batch"), check.of("batch"))
        with check.trying("forward"):
            _check_forward(golden, ids, features, arguments, file, check)
        with check.trying("optimizer"):
            _check_steps(golden, ids, features, arguments["optimizer"], file, check)
    with check.trying("i2i"):
        _check_i2i(
            golden,
            _i2i_picture(golden, tensors["i2i.gen_image.sub"]),
            arguments["n_und_query"],
            tensors.under("i2i"),
            check.of("i2i"),
        )


def _check_scheduler(golden: GoldenSet, tensors, check: Check) -> None:
    table = TimeTable.of(golden.pipeline.scheduler.config)
    for part, values in (("sigmas", table.sigmas), ("timesteps", table.timesteps)):
        for name in tensors:
            if name.startswith(f"{part}_first"):
                close(check, name, values[: len(tensors[name])], tensors[name])
            if name.startswith(f"{part}_last"):
                close(check, name, values[-len(tensors[name]) :], tensors[name])


def _check_ids(golden: GoldenSet, text: str, tensors, check: Check) -> list[int]:
    """Ids of a row; the original labels the assistant's turn (for a loss that it throws away)."""
    tokenizer = golden.pipeline.tokenizer
    ids = encode(tokenizer, text)
    before, _, answer = text.rpartition("<|im_start|>assistant")
    answered = encode(tokenizer, f"<|im_start|>assistant{answer}")
    check("input_ids", ids, tensors["input_ids"])
    check("labels", [NO_LABEL] * (len(ids) - len(answered)) + answered, tensors["labels"])
    return ids


def _padded(golden: GoldenSet, ids: list[list[int]]) -> torch.Tensor:
    tokens, queries = golden.pipeline.token_ids, golden.pipeline.transformer.config.num_queries
    rows = [torch.tensor([*row, tokens.image_start, *[tokens.image] * queries]) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokens.pad)


@torch.no_grad()
def _check_batch(golden: GoldenSet, ids: list[list[int]], names: list[str], tensors, check: Check) -> torch.Tensor:
    """Ids, labels and mask of the batch; returns the image features of its pictures."""
    batch, tokens = _padded(golden, ids), golden.pipeline.token_ids
    check("input_ids", batch, tensors["input_ids"])
    check("attention_mask", batch != tokens.pad, tensors["attention_mask"])
    check("i_s_pos", [len(row) + 1 for row in ids], tensors["i_s_pos"])
    labels, want = torch.full_like(batch, NO_LABEL), tensors["labels"]
    for row, values in enumerate(ids):
        start, end = len(values), len(values) + 1 + golden.pipeline.transformer.config.num_queries
        labels[row, start:end] = batch[row, start:end]
        labelled = (want[row, :start] != NO_LABEL).nonzero()[:, 0]
        labels[row, labelled] = batch[row, labelled]  # of the text's own labels, which the rows check
    check("labels", labels, want)
    pixels = torch.cat([golden_pixels(golden, golden.picture(name)) for name in names])
    close(check, "gen_image.sub", pixels[..., ::PIXELS, ::PIXELS], tensors["gen_image.sub"])
    model = golden.pipeline.vision_model
    return model.pool(model(pixels))


def _errors(golden, head, ids, features, tensors, images=None) -> tuple[torch.Tensor, Any]:
    """Squared errors with recorded noise, times and dropped conditions, and the noised features."""
    pipe = golden.pipeline
    pipe.language_model.requires_grad_(False)
    table, tokens = TimeTable.of(pipe.scheduler.config), pipe.token_ids
    noised = add_noise(features, tensors["noise"], tensors["u"], table)
    rows = [[*row, tokens.image_start] for row in ids]
    dropped = tensors["drop"].bool()
    condition = HeadCondition(rows, tokens.pad, dropped, images=images, image_pad_id=tokens.image_pad)
    return blip3o_errors(head, pipe.language_model, noised, condition), noised


def _check_forward(golden, ids, features, arguments: Record, file: GoldenFile, check: Check) -> None:
    head, tensors, seen = golden.new_head, file.tensors.under("forward"), {}
    hooks = [
        head.caption_projection.register_forward_pre_hook(lambda m, args: seen.update(condition=args[0])),
        head.register_forward_hook(lambda m, args, out: seen.update(prediction=out[0])),
    ]
    errors, noised = _errors(golden, head, ids, features, tensors)
    for hook in hooks:
        hook.remove()
    check = check.of("forward")
    close(check, "timesteps", noised.timestep, tensors["timesteps"])
    close(check, "noisy", noised.hidden_states, tensors["noisy"])
    close(check, "condition", seen["condition"], tensors["condition"])
    close(check, "prediction", seen["prediction"], tensors["prediction"])
    loss = errors.mean()
    close(check, "loss", loss, tensors["loss"], TRAINING)
    close(check, "loss in the json", loss, arguments["loss"], TRAINING)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    theirs = {name: key_of(name).name for name in arguments["trainable"]}
    check("trainable", sorted(theirs.values()), sorted(gradients))
    for name, norm in arguments["grad_norms"].items():
        close(check, f"grad_norms.{name}", gradients[theirs[name]].norm(), norm, TRAINING)
    check("grad_norms: all", len(arguments["grad_norms"]), len(theirs))
    total = torch.stack([g.norm() for g in gradients.values()]).norm()
    close(check, "total_grad_norm", total, arguments["total_grad_norm"], TRAINING)
    for name in file.tensors.under("grad"):
        close(check, f"grad.{name}", gradients[theirs[name]], file.tensors[f"grad.{name}"], TRAINING)
    head.zero_grad(set_to_none=True)


def _check_steps(golden, ids, features, settings: Record, file: GoldenFile, check: Check) -> None:
    """AdamW with the recorded learning rates, on the recorded noise."""
    head = golden.new_head
    check("optimizer.class", settings["class"], "torch.optim.AdamW")
    check("optimizer.schedule", settings["schedule"], "cosine")
    warmup, total = settings["warmup_steps"], settings["total_steps"]
    options = {key: settings[key] for key in ("lr", "eps", "weight_decay")} | {"betas": tuple(settings["betas"])}
    optimizer = torch.optim.AdamW(head.parameters(), **options)
    for number, step in enumerate(settings["steps"]):
        with check.trying(f"step{number}"):
            tensors = file.tensors.under(f"step{number}")
            errors, noised = _errors(golden, head, ids, features, tensors)
            loss = errors.mean()
            close(check, f"step{number}.timesteps", noised.timestep, tensors["timesteps"])
            close(check, f"step{number}.loss", loss, step["loss"], TRAINING)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(head.parameters(), settings["max_grad_norm"])
            close(check, f"step{number}.grad_norm", norm, step["grad_norm_before_clip"], TRAINING)
            rate = options["lr"] * _cosine(number, warmup, total)
            close(check, f"step{number}.lr_used", rate, step["lr_used"])
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
    parameters = {name: parameter.detach() for name, parameter in head.named_parameters()}
    for name, norm in settings["parameter_norms_after"].items():
        close(check, f"after.norm.{name}", parameters[key_of(name).name].norm(), norm, TRAINING)
    for name in file.tensors.under("after"):
        close(check, f"after.{name}", parameters[key_of(name).name], file.tensors[f"after.{name}"], TRAINING)


def _cosine(step: int, warmup: int, total: int) -> float:
    """The recorded schedule: linear warm-up, then half a cosine to 0."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * (step - warmup) / (total - warmup)))))


def _i2i_picture(golden: GoldenSet, want: torch.Tensor) -> Image.Image:
    """The picture with these pixels, cropped as such rows are; the file does not say which one the row has."""
    for path in sorted((golden.directory / "inputs").iterdir()):
        picture = central_crop(golden.picture(path.name).convert("RGB"), IMAGE_SIDE)
        pixels = golden_pixels(golden, picture)[..., ::PIXELS, ::PIXELS]
        if pixels.shape == want.shape and (pixels - want).abs().max() <= FORWARD:
            return picture
    raise ValueError("No picture of the directory has the pixels of the i2i row.")


@torch.no_grad()
def _check_i2i(golden: GoldenSet, picture: Image.Image, image_size: int, tensors, check: Check) -> None:
    """A row with a picture to read: the objective knows them, the training backbone refuses them."""
    pipe = golden.pipeline
    image = pipe.image_processor(images=[picture], return_tensors="pt")
    close(check, "und_image.sub", image["pixel_values"][::PATCHES, ::VALUES], tensors["und_image.sub"], FORWARD)
    check("grid_thw", image["image_grid_thw"], tensors["grid_thw"])
    ids = _check_ids(golden, training_text(f"{IMAGE}\n{RECONSTRUCT}", image_size=image_size), tensors, check)
    check("batch.input_ids", _padded(golden, [ids]), tensors["batch.input_ids"])
    check("batch.i_s_pos", [len(ids) + 1], tensors["batch.i_s_pos"])
    pixels = golden_pixels(golden, picture)
    close(check, "gen_image.sub", pixels[..., ::PIXELS, ::PIXELS], tensors["gen_image.sub"])
    features = pipe.vision_model.pool(pipe.vision_model(pixels))
    images = {0: image_states(pipe.language_model, image["pixel_values"], image["image_grid_thw"])}
    seen = {}
    hook = pipe.transformer.caption_projection.register_forward_pre_hook(lambda m, args: seen.update(z=args[0]))
    errors, noised = _errors(golden, pipe.transformer, [ids], features, tensors, images)
    hook.remove()
    close(check, "timesteps", noised.timestep, tensors["timesteps"])
    close(check, "condition", seen["z"], tensors["condition"])
    close(check, "loss", errors.mean(), tensors["loss"], TRAINING)
