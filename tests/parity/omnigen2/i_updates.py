"""Updates of the original's training script: batches, times, predictions, losses, gradients, weights, averages."""

from __future__ import annotations

import copy

import torch
from torch import nn

from echo4o.modeling.omnigen2.pipeline_omnigen2 import OmniGen2Pipeline
from echo4o.training.backbones.omnigen2 import OmniGen2Backbone, OmniGen2Sample, collate
from echo4o.training.backbones.omnigen2_recipe import OmniGen2LoraTuning, OmniGen2Objective, OmniGen2Recipe
from echo4o.training.ema import MovingAverage
from echo4o.training.model import TrainedModel, set_up
from echo4o.training.step import weighted_loss

from ..golden import GoldenFile
from ..report import SINGLE, Check
from .comparing import DELTA, LOSS, NORM, compare_gradient, compare_masks, compare_relative
from .golden_set import GoldenSet
from .i_time import released_rate


def check(golden: GoldenSet, file: GoldenFile, check: Check) -> None:
    Updates(golden, file, check).run()


class Updates:
    """The run of a file, repeated with our backbone."""

    def __init__(self, golden: GoldenSet, file: GoldenFile, check: Check):
        self.golden, self.json, self.tensors, self.check = golden, file.json, file.tensors, check
        self.train = file.json["config"]["train"]
        self.is_lora = self.train["lora_ft"]
        # Its own transformer: training must not change the one that other checks use.
        components = dict(golden.components)
        components["transformer"] = copy.deepcopy(components["transformer"])
        self.pipe = OmniGen2Pipeline(**components)
        self.backbone = OmniGen2Backbone(self.pipe, self._recipe())
        self.model = TrainedModel(self.backbone).train()
        set_up(self.model, self.backbone.recipe, self.backbone.component_classes)
        for name in ("vae", "mllm"):
            components[name].requires_grad_(False)

    def _recipe(self) -> OmniGen2Recipe:
        data, transport, train = self.json["config"]["data"], self.json["config"]["transport"], self.train
        objective = OmniGen2Objective(
            prompt_dropout=data["prompt_dropout_prob"],
            reference_dropout=data["ref_img_dropout_prob"],
            time_shift="v1" if transport["do_shift"] else "none",
            dynamic_time_shift=transport["dynamic_time_shift"],
            max_text_tokens=data["maximum_text_tokens"],
            max_input_pixels=tuple(data["max_input_pixels"]),
            max_output_pixels=data["max_output_pixels"],
            max_side_length=data["max_side_length"],
            loss_normalization="micro_batch",
        )
        self.check("snr_type", transport["snr_type"], "lognorm")
        self.check("use_chat_template", data["use_chat_template"], True)
        tune = {"method": "full"}
        if self.is_lora:
            rank, dropout = train["lora_rank"], train["lora_dropout"]
            tune = OmniGen2LoraTuning(method="lora", rank=rank, alpha=rank, dropout=dropout)
        options = {"backbone": "omnigen2", "model": ".", "output_dir": ".", "data": {"path": "."}, "steps": 1}
        return OmniGen2Recipe(**options, batch_size=1, tune=tune, objective=objective)

    def run(self) -> None:
        parameters = {name: p for name, p in self.model.transformer.named_parameters() if p.requires_grad}
        self._start(parameters)
        before = {name: p.detach().clone() for name, p in parameters.items()}
        train = self.train
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=train["learning_rate"],
            betas=(train["adam_beta1"], train["adam_beta2"]),
            eps=train["adam_epsilon"],
            weight_decay=train["adam_weight_decay"],
        )
        average = MovingAverage(self.model, train["ema_decay"], copy_first=True) if train["ema_decay"] else None
        batches = self._batches()
        self.check("updates", len(self.json["updates"]), train["max_train_steps"])
        for number, update in enumerate(self.json["updates"]):
            with self.check.trying(f"updates.{number}"):
                self._update(number, update, batches, parameters, optimizer)
                if average is not None:
                    average.update(self.model)
        self._check_changes("delta_norms", self.json["delta_norms"], before, parameters)
        for name in [n for n in self.tensors if n.startswith("final.")]:
            key = name.removeprefix("final.")
            self._check_change(name, parameters[key].detach() - before[key], self.tensors[name] - before[key])
        if average is not None:
            self._check_average(average, before)
        self.json.note("config")  # options of the original that nothing here depends on

    def _start(self, parameters: dict[str, nn.Parameter]) -> None:
        """The initial adapter of the original, or nothing to do."""
        if not self.is_lora:
            return
        self.check("trainable", len(parameters), self.json["trainable"])
        self.check("frozen_unchanged", self.json["frozen_unchanged"], True)
        wanted = {name.removeprefix("init.") for name in self.tensors if name.startswith("init.")}
        self.check("init", sorted(n for n in parameters if "lora_A" in n), sorted(wanted))
        rank = self.train["lora_rank"]
        for name, parameter in parameters.items():
            if "lora_B" in name:
                self.check(f"init.{name}", parameter.detach().abs().max(), 0.0)
            elif name in wanted:
                # Ours has the same distribution, N(0, 1/rank), from other random numbers.
                spread = float(parameter.detach().std()) * rank
                self.check(f"init.{name}: spread", spread, 1.0, 0.35)
                parameter.data.copy_(self.tensors[f"init.{name}"])

    # --- batches ---

    def _batches(self) -> list:
        batches = []
        for number, micro in enumerate(self.json["micro_batches"]):
            with self.check.trying(f"micro_batches.{number}"):
                batches.append(self._batch(micro, self.tensors.under(f"mb.{number}"), self.check.of(f"mb.{number}")))
        return batches

    def _batch(self, micro, tensors, check):
        backbone, samples = self.backbone, []
        ids, mask = tensors["text_ids"], tensors["text_mask"]
        lengths = mask.sum(1).tolist()
        compare_masks(check, "text_mask", lengths, mask)
        micro.note("task_type")
        for index, row in enumerate(micro["rows"]):
            own = check.of(index)
            kept = ids[index, : lengths[index]]
            text = self.pipe.tokenizer.decode(kept)
            own("text_ids", self.pipe.token_ids(text), kept)
            padding = ids[index, lengths[index] :]
            own("padding", padding, torch.full_like(padding, self.pipe.tokenizer.pad_token_id))
            states = backbone.text_states(text)
            if "text_feats" in tensors:
                own("text_feats", states, tensors["text_feats"][index, : len(states)], SINGLE)
            references = self._references(row, index, tensors, own)
            limit = backbone.objective.max_output_pixels
            image = self.golden.picture(row["output_image"])
            target = backbone.latent(backbone.moments(image, limit, ""), tensors[f"target_noise.{index}"][0])
            own("x1", target, tensors[f"x1.{index}"], SINGLE)
            samples.append(
                OmniGen2Sample(
                    id=str(index),
                    text=states,
                    references=references,
                    target=target,
                    noise=tensors[f"x0.{index}"],
                    raw_time=tensors["u"][index],
                    patch=backbone.patch,
                    full_length=0,
                )
            )
        check("refs", [len(sample.references) for sample in samples], micro["refs"])
        batch = collate(samples)
        check("num_elements", sum(x.numel() for x in batch.targets), micro["num_elements"])
        times = backbone.times(batch.raw_time, batch.targets)
        check("t", times, tensors["t"], 1e-6)
        for index in range(len(samples)):
            if f"xt.{index}" in tensors:
                noisy = times[index] * batch.targets[index] + (1 - times[index]) * batch.noises[index]
                check(f"xt.{index}", noisy, tensors[f"xt.{index}"], SINGLE)
        return batch

    def _references(self, row, index: int, tensors, check) -> list[torch.Tensor]:
        names = row["input_images"]
        limit = self.backbone.objective.input_pixels(len(names)) if names else 0
        latents = []
        for place, name in enumerate(names):
            noise = tensors[f"ref_noise.{index}.{place}"][0]
            latent = self.backbone.latent(self.backbone.moments(self.golden.picture(name), limit, ""), noise)
            check(f"ref.{place}", latent, tensors[f"ref.{index}.{place}"], SINGLE)
            latents.append(latent)
        return latents

    # --- updates ---

    def _update(self, number: int, update, batches, parameters, optimizer) -> None:
        own, train = self.check.of(f"updates.{number}"), self.train
        accumulation = train["gradient_accumulation_steps"]
        members = update["micro_batches"]
        optimizer.zero_grad()
        for member in members:
            self._backward(member, batches[member], accumulation)
        own("lr", self._rate(number, len(members)), update["lr"], 1e-9)
        norms = {name: float(p.grad.norm()) for name, p in parameters.items()}
        own("gradients", sorted(norms), sorted(update["grad_norms"]))
        for name, want in update["grad_norms"].items():
            if want < 1e-3:
                own(f"grad_norms.{name}", norms[name], want, 1e-5)
            else:
                compare_relative(own, f"grad_norms.{name}", norms[name], want, NORM)
        for name in [n for n in self.tensors if n.startswith(f"grad.{number}.")]:
            compare_gradient(own, name, parameters[name.removeprefix(f"grad.{number}.")].grad, self.tensors[name])
        total = torch.nn.utils.clip_grad_norm_(list(parameters.values()), train["max_grad_norm"])
        compare_relative(own, "total_grad_norm", total, update["total_grad_norm"], NORM)
        for group in optimizer.param_groups:
            group["lr"] = update["lr"]
        optimizer.step()

    def _backward(self, member: int, batch, accumulation: int) -> None:
        """Losses of a micro-batch. The original adds up the means of an update's micro-batches."""
        own, tensors = self.check.of(f"mb.{member}"), self.tensors.under(f"mb.{member}")
        outputs = []
        hook = self.model.transformer.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
        terms = self.model(batch)
        hook.remove()
        for index, predicted in enumerate(outputs[0]):
            if f"pred.{index}" in tensors:
                own(f"pred.{index}", predicted, tensors[f"pred.{index}"], SINGLE)
        term = terms["mse"]
        for index, want in enumerate(tensors["loss_sum"]):
            compare_relative(own, f"loss_sum.{index}", term.values[term.sample == index].sum(), want, LOSS)
        loss, _ = weighted_loss(terms, self.backbone.loss_weights(), self.backbone.denominators(batch))
        want = self.json["micro_batches"][member]["loss_given_to_backward"]
        compare_relative(own, "loss_given_to_backward", loss * accumulation, want, LOSS)
        loss.backward()

    def _rate(self, number: int, members: int) -> float:
        train, accumulation = self.train, self.train["gradient_accumulation_steps"]
        k = max(number - 1, 0) if accumulation == 1 or members < accumulation else number
        return released_rate(k, train["learning_rate"], train["warmup_t"], train["warmup_lr_init"])

    # --- weights ---

    def _check_changes(self, part: str, wanted, before, after) -> None:
        self.check(f"{part}: names", sorted(wanted), sorted(before))
        for name, want in wanted.items():
            compare_relative(self.check, f"{part}.{name}", (after[name].detach() - before[name]).norm(), want, DELTA)

    def _check_change(self, part: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """Changes after Adam: of equal size and direction. Single values flip where gradients are near zero."""
        compare_relative(self.check, f"{part}: size", got.norm(), want.norm(), DELTA)
        cosine = nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0)
        self.check(f"{part}: direction", cosine, 1.0, DELTA)

    def _check_average(self, average: MovingAverage, before) -> None:
        ema = self.json["ema"]
        self.check("ema.decay", average.decay, ema["decay"])
        self.check("ema.steps", average.updates, ema["steps"])
        self.check("ema.decay_used_last", average.decay_now(), ema["decay_used_last"], 1e-12)
        values = {name.removeprefix("transformer."): value for name, value in average.values.items()}
        self._check_changes("ema.delta_norms", ema["delta_norms"], before, values)
        for name in [n for n in self.tensors if n.startswith("ema.")]:
            key = name.removeprefix("ema.")
            self._check_change(name, values[key] - before[key], self.tensors[name] - before[key])
