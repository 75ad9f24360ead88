"""The objective on the golden training batch, and the draws that it is fed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from echo4o.modeling.bagel.segments_bagel import SpecialTokens, image_segment, pack, patchify, text_segment
from echo4o.training.objective import LossTerms, add_noise, loss_terms, named_generator, shift_time

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
    terms = loss_terms(Recorded(golden), vision, sequence, made)
    torch.testing.assert_close(terms.mse, golden["out.mse"], atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.cross_entropy, golden["out.ce"], atol=1e-4, rtol=0)
    torch.testing.assert_close(terms.weights, golden["ce_loss_weights"], atol=1e-6, rtol=0)
    mse_sum, mse_count, ce_sum, ce_count = terms.sums()
    assert abs(mse_sum / mse_count - plan["loss"]["mse_mean"]) < 1e-4
    assert abs(ce_sum / ce_count - plan["loss"]["ce_mean"]) < 1e-4
    _, _, ce_sum, ce_weight = terms.sums(reweight=True)
    assert abs(ce_sum / ce_weight - plan["loss"]["ce_reweighted"]) < 1e-4


def test_sums_add_up_over_parts():
    generator = torch.Generator().manual_seed(0)
    whole = LossTerms(*(torch.rand(shape, generator=generator) for shape in ((6, 4), (5,), (5,))))
    first = LossTerms(whole.mse[:2], whole.cross_entropy[:1], whole.weights[:1])
    second = LossTerms(whole.mse[2:], whole.cross_entropy[1:], whole.weights[1:])
    torch.testing.assert_close(first.sums() + second.sums(), whole.sums())


def test_wrong_number_of_times_is_said():
    sequence, golden, _ = golden_batch()
    with pytest.raises(ValueError, match="2 noised pictures.*\\(3,\\) times"):
        add_noise(sequence, golden["noise"][sequence.gen_noised], torch.zeros(3), 1.0)


def test_shift_keeps_the_ends():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(shift_time(t, 4.0), torch.tensor([0.0, 0.8, 1.0]))


def test_named_draws_depend_on_their_whole_name():
    draws = {
        name: torch.randn(4, generator=named_generator(*name))
        for name in [(0, "a", 0, "noise"), (1, "a", 0, "noise"), (0, "b", 0, "noise"), (0, "a", 1, "noise")]
        + [(0, "a", 0, "time"), (0, "a\0", 0, "noise")]
    }
    assert len({tuple(v.tolist()) for v in draws.values()}) == len(draws)
    again = torch.randn(4, generator=named_generator(0, "a", 0, "noise"))
    assert torch.equal(again, draws[0, "a", 0, "noise"])
