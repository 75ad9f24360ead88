"""Trains the tokenizer of the quickstart: the byte-level BPE of Qwen2, trained on the grammar of Shapes-4o."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from echo4o.evaluation.benchmarks.shapes4o.grammar import captions

VOCABULARY = 448  # at most: the 256 bytes, merges and special tokens
# Those of Qwen2, in its order. BAGEL encloses text in im_start and im_end, images in vision_start and vision_end.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words of chats and descriptions that do not occur in instructions of Shapes-4o.
OTHER_TEXTS = ("what is this?", "how many objects are there?", "a picture of one object on a light background.")


def train_tokenizer(number: int = 9000, seed: int = 0) -> Qwen2Tokenizer:
    """Trains the tokenizer on ``number`` instructions without held-out content. Deterministic for a seed."""
    bpe = Tokenizer(BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([*captions(number, seed), *OTHER_TEXTS * 3], trainer)
    model = json.loads(bpe.to_str())["model"]
    first = len(model["vocab"])
    special = {first + i: AddedToken(token, normalized=False, special=True) for i, token in enumerate(SPECIAL_TOKENS)}
    # Qwen2Tokenizer builds its backend from the vocabulary, so that saving and loading give the same tokenizer. Its
    # annotations do not list pairs as merges and no unknown token, which it accepts (transformers 5).
    options: dict[str, Any] = {"merges": [tuple(merge) for merge in model["merges"]], "unk_token": None}
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        **options,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        added_tokens_decoder=special,
        model_max_length=32768,
    )
