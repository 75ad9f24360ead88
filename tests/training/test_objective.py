"""The objective on the golden training batch, and the draws that it is fed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from echo4o.modeling.bagel import transformer_bagel
from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack, patchify, text_segment
from echo4o.training.backbones import bagel_objective
from echo4o.training.backbones.bagel import BagelBatch, BagelLoraTuning, BagelSample, collate
from echo4o.training.backbones.bagel_objective import add_noise, bagel_losses, shift_time
from echo4o.training.backbones.base import named_generator
from echo4o.training.model import TrainedModel, add_lora
from echo4o.training.step import weighted_loss

from .conftest import make_backbone

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"


def golden_batch():
    """The golden training batch as a packed sequence with its clean latents, and the golden tensors."""
    plan = json.loads((GOLDEN / "b_train_forward.json").read_text())
    golden = load_file(GOLDEN / "b_train_forward.safetensors")
    special = json.loads((GOLDEN / "manifest.json").read_text())["special_tokens"]
    tokens = SpecialTokens(*(special[k] for k in ("bos_token_id", "eos_token_id", "start_of_image", "end_of_image")))
    # The original pads the latents of its pictures to one size; the true size is the upper left part.
    shapes = iter(plan["args"]["patchified_vae_latent_shapes"])
    latents = iter(golden["in.padded_latent"])
    vision = iter(golden["in.packed_vit_tokens"].split(golden["in.vit_token_seqlens"].tolist()))
    samples = []
    for sample in plan["samples"]:
        texts, pictures, segments = iter(sample["text_ids"]), iter(sample["image_shapes"]), []
        for item in sample["plan"]:
            if item["type"] == "text":
                segments.append(text_segment(next(texts), tokens, loss=bool(item["loss"])))
                continue
            _, height, width = next(pictures)
            if item["type"] == "vit_image":
                segments.append(image_segment("vit", (height // 14, width // 14), tokens, next(vision)))
            else:
                rows, columns = next(shapes)
                data = patchify(next(latents)[:, : rows * 2, : columns * 2], 2)
                segments.append(image_segment("noise" if item["loss"] else "vae", (rows, columns), tokens, data))
        samples.append(segments)
    return pack(samples, latent_positions=16, patch_positions=16), golden, plan


class Recorded(torch.nn.Module):
    """A transformer that answers with the golden velocities and logits, so that only the objective is tested."""

    def __init__(self, golden):
        super().__init__()
        self.golden = golden

    def forward(self, hidden_states, timestep, sequence, vision_embeds=None, *, logit_index=None):
        class Output:
            sample = torch.zeros_like(hidden_states)
            logits = self.golden["out.ce_logits"]

        Output.sample[sequence.gen_noised] = self.golden["out.v_pred"]
        assert logit_index.tolist() == (sequence.labels != -100).nonzero()[:, 0].tolist()
        return Output


def test_golden_noise_and_losses():
    sequence, golden, plan = golden_batch()
    noised = sequence.gen_noised
    raw = golden["in.packed_timesteps"][noised]
    starts = torch.unique_consecutive(sequence.gen_segment[noised], return_counts=True)[1].cumsum(0).roll(1)
    starts[0] = 0
    made = add_noise(sequence, golden["noise"][noised], raw[starts], plan["timestep_shift"])
    torch.testing.assert_close(made.timestep, golden["out.t_shifted"], atol=1e-6, rtol=0)
    torch.testing.assert_close(made.hidden_states, golden["out.noised_latent_tokens"], atol=1e-5, rtol=0)

    vision = lambda *args: type("Output", (), {"embeds": None})  # noqa: E731
    terms = bagel_losses(Recorded(golden), vision, sequence, made)
    torch.testing.assert_close(terms.mse, golden["out.mse"], atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.cross_entropy, golden["out.ce"], atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.weights, golden["ce_loss_weights"], atol=1e-6, rtol=0)
    assert abs(terms.mse.mean() - plan["loss"]["mse_mean"]) < 1e-4
    assert abs(terms.cross_entropy.mean() - plan["loss"]["ce_mean"]) < 1e-4


@pytest.mark.parametrize("reweight", [False, True])
def test_losses_and_denominators_are_the_golden_means(tiny_pipeline, reweight, monkeypatch):
    sequence, golden, plan = golden_batch()
    vision = lambda *args: type("Output", (), {"embeds": None})  # noqa: E731
    models = SimpleNamespace(transformer=Recorded(golden), vision_model=vision)
    noised = sequence.gen_noised
    backbone = make_backbone(tiny_pipeline, time_shift=plan["timestep_shift"], ce_reweight=reweight)
    raw = golden["in.packed_timesteps"][noised]
    counts = torch.unique_consecutive(sequence.gen_segment[noised], return_counts=True)[1]
    starts = counts.cumsum(0) - counts
    batch = BagelBatch(["a", "b"], sequence, golden["noise"][noised], raw[starts])
    terms, totals = backbone.losses(models, batch), backbone.denominators(batch)
    _, shares = weighted_loss(terms, backbone.loss_weights(), totals)
    expected = plan["loss"]["mse_mean"], plan["loss"]["ce_reweighted" if reweight else "ce_mean"]
    assert shares.tolist() == pytest.approx(expected, abs=1e-4)
    assert {int(i) for i in terms["mse"].sample} <= {0, 1} and len(terms["ce"].sample) == len(terms["ce"].values)


def test_wrong_number_of_times_is_reported():
    sequence, golden, _ = golden_batch()
    with pytest.raises(ValueError, match="2 noised images.*\\(3,\\) times"):
        add_noise(sequence, golden["noise"][sequence.gen_noised], torch.zeros(3), 1.0)


def test_shift_keeps_the_ends():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_time(t, 4.0), torch.tensor([0.0, 0.8, 1.0]))


def test_named_generators_depend_on_their_whole_name():
    draws = {
        name: torch.randn(4, generator=named_generator(*name))
        for name in [(0, "a", 0, "noise"), (1, "a", 0, "noise"), (0, "b", 0, "noise"), (0, "a", 1, "noise")]
        + [(0, "a", 0, "time"), (0, "a\0", 0, "noise")]
    }
    assert len({tuple(v.tolist()) for v in draws.values()}) == len(draws)
    again = torch.randn(4, generator=named_generator(0, "a", 0, "noise"))
    assert torch.equal(again, draws[0, "a", 0, "noise"])


def training_batch(tiny_pipeline, rows):
    backbone = make_backbone(tiny_pipeline)
    asked = {"id": "q", "instruction": "what is it?", "answer": "a red square", "image": None}
    asked |= {"reference_images": [rows[0]["image"]]}
    special = tiny_pipeline.special_tokens
    picture = lambda kind: image_segment(kind, (3, 2), special, torch.randn(6, 64))  # noqa: E731
    view = image_segment("vit", (2, 2), special, torch.randn(4, 588))
    text = text_segment([5, 6, 7], special)
    chain = [text, view, picture("vae"), text, picture("noise"), text, picture("noise")]
    samples = [backbone.sample(row, 0) for row in backbone.prepare([*rows.select(range(4)), asked])]
    samples.append(BagelSample("chain", chain, torch.randn(12, 64), torch.randn(2)))
    return samples


def losses_and_gradients(model, batch):
    model.zero_grad()
    terms = model(batch)
    backbone = model.backbone
    weighted_loss(terms, backbone.loss_weights(), backbone.denominators(batch))[0].backward()
    return terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["full", "lora"])
def model(request, tiny_pipeline):
    model = TrainedModel(make_backbone(tiny_pipeline, time_shift=4.0)).train()
    if request.param == "lora":
        model.requires_grad_(False)
        add_lora(model.transformer, BagelLoraTuning(method="lora", rank=4, alpha=4), 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_without_labels_no_gradients_of_zeros_are_computed(model, tiny_pipeline, rows, monkeypatch):
    samples = [s for s in training_batch(tiny_pipeline, rows) if s.id != "q"]
    batch, lora = collate(samples, 16, 16), not model.transformer.lm_head.weight.requires_grad
    passed = []
    for place in (0, -1):
        model.transformer.layers[place].und.ff.register_full_backward_hook(lambda *_, at=place: passed.append(at))
    terms, gradients = losses_and_gradients(model, batch)
    assert passed == ([0] if lora else [-1, 0]), "what learns has a gradient on every process, if only of zeros"
    monkeypatch.setattr(bagel_objective, "_only_used_for_logits", lambda transformer: model.parameters())
    whole, expected = losses_and_gradients(model, batch)
    assert (
        passed[-2:] == [-1, 0]
        and torch.equal(terms["mse"].values, whole["mse"].values)
        and gradients.keys() == expected.keys()
    )
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-7, rtol=1e-5, msg=name)


def test_long_samples_attend_by_segment_with_the_same_numbers(model, tiny_pipeline, rows, monkeypatch):
    batch, found = collate(training_batch(tiny_pipeline, rows), 16, 16), []
    for least in (10**9, 1):
        monkeypatch.setattr(transformer_bagel, "LONG_SAMPLE", least)
        found.append(losses_and_gradients(model, batch))
    calls = transformer_bagel.training_plan(batch.sequence)
    assert len(calls) == sum(map(len, batch.sequence.spans)) and sum(call.mask is None for call in calls) > 10
    (terms, gradients), (whole, expected) = found
    torch.testing.assert_close(terms["mse"].values, whole["mse"].values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(terms["ce"].values, whole["ce"].values, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)
