"""The tokens that a new BLIP3-o adds to a Qwen2.5-VL."""

import pytest
import torch

from echo4o.modeling.blip3o.convert import components_from_original
from echo4o.modeling.blip3o.vocabulary import ADDED_TOKENS, set_up_vocabulary, shrunk_table

from .conftest import CHECKPOINT


def test_set_up_of_a_language_model():
    others = ("transformer", "vision_model", "unet", "vae")
    parts = components_from_original(CHECKPOINT, skip=others)
    model, tokenizer = parts["language_model"], parts["tokenizer"]
    rows = len(tokenizer)
    model.resize_token_embeddings(rows + 10, mean_resizing=False)  # spare rows, as Qwen's tables have
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    set_up_vocabulary(model, tokenizer)
    assert torch.equal(model.get_input_embeddings().weight, before[:rows])  # the tokens are there already
    assert torch.equal(model.get_output_embeddings().weight, head[:rows])
    assert len(tokenizer) == rows == model.config.text_config.vocab_size
    assert all(token in tokenizer.get_vocab() for token in ADDED_TOKENS)


def test_a_table_that_is_too_small_is_an_error():
    with pytest.raises(ValueError, match="has 3 rows"):
        shrunk_table(torch.zeros(3, 2), 4)
