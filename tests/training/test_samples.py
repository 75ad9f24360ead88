"""Rows to samples: order of segments, keyed draws, dropout."""

import pytest
import torch

from echo4o.training.backbones.bagel import collate

from .conftest import make_backbone


@pytest.fixture
def backbone(tiny_pipeline):
    return make_backbone(tiny_pipeline)


def test_references_come_first_each_as_vae_then_vit(backbone, rows):
    samples = [backbone.sample(row, 0) for row in backbone.prepare(list(rows))]
    assert [s.kind for s in samples[0].segments] == ["text", "noise"]
    assert [s.kind for s in samples[3].segments] == ["vae", "vit", "vae", "vit", "text", "noise"]
    sample = samples[3]
    assert sample.segments[0].grid == (2, 4)  # 64 x 32 pixels, 16 per latent token
    assert sample.segments[1].grid == (2, 4)  # brought to 56 x 28, 14 per patch
    assert sample.noise.shape == sample.segments[-1].data.shape == (8, 64)
    assert sample.raw_time.shape == (1,)


def test_random_numbers_belong_to_the_sample_not_to_its_batch(backbone, rows):
    alone = backbone.sample(backbone.prepare([rows[3]])[0], 0)
    together = backbone.sample(backbone.prepare(list(rows))[3], 0)
    for a, b in zip(alone.segments, together.segments, strict=True):
        if a.data is not None:
            torch.testing.assert_close(a.data, b.data, atol=1e-5, rtol=0)
    assert torch.equal(alone.noise, together.noise) and torch.equal(alone.raw_time, together.raw_time)
    later = backbone.sample(backbone.prepare([rows[3]])[0], 1)
    assert not torch.equal(alone.noise, later.noise) and not torch.equal(alone.raw_time, later.raw_time)


def test_latents_are_those_of_the_pipeline(backbone, rows, tiny_pipeline):
    prepared = backbone.prepare([rows[0]])[0]
    _, tokens = backbone.latent_tokens(prepared.moments, torch.Generator().manual_seed(3))
    segment = tiny_pipeline.latent_segment(rows[0]["image"], torch.Generator().manual_seed(3))
    torch.testing.assert_close(tokens, segment.data, atol=1e-5, rtol=0)


def test_dropout_has_its_probabilities_and_keeps_the_target(tiny_pipeline, rows):
    backbone = make_backbone(tiny_pipeline, text_dropout=0.1, vit_dropout=0.3, vae_dropout=0.3)
    prepared = backbone.prepare([rows[3]])[0]
    dropped = [[s.dropped for s in backbone.sample(prepared, epoch).segments] for epoch in range(400)]
    share = torch.tensor(dropped, dtype=torch.float).mean(0)
    torch.testing.assert_close(share, torch.tensor([0.3, 0.3, 0.3, 0.3, 0.1, 0.0]), atol=0.08, rtol=0)
    assert dropped == [[s.dropped for s in backbone.sample(prepared, epoch).segments] for epoch in range(400)]


def test_collate_packs_in_order(backbone, rows):
    samples = [backbone.sample(row, 0) for row in backbone.prepare(list(rows)[:4])]
    batch = collate(samples, 16, 16)
    assert batch.ids == ["row-0", "row-1", "row-2", "row-3"]
    assert len(batch.sequence.spans) == 4 and batch.raw_time.shape == (4,)
    assert batch.noise.shape[0] == int(batch.sequence.gen_noised.sum()) == sum(len(s.noise) for s in samples)
    assert len(batch.sequence.input_ids) + len(batch.sequence.gen_segment) == sum(map(len, samples))


def test_an_answer_is_learned_from_the_image_and_the_question(backbone, rows, tiny_pipeline):
    question = {"id": "q", "instruction": "what is it?", "answer": "a red square", "image": None}
    prepared = backbone.prepare([{**question, "reference_images": [rows[0]["image"]]}, rows[0]])
    samples = [backbone.sample(row, 0) for row in prepared]
    assert [s.kind for s in samples[0].segments] == ["vit", "text", "text"]
    batch = collate(samples, 16, 16)
    labels = batch.sequence.labels[batch.sequence.labels >= 0].tolist()
    assert labels == [*backbone.token_ids("a red square"), tiny_pipeline.special_tokens.text_end]
    assert batch.raw_time.shape == (1,) and batch.noise.shape == (16, 64)
