"""Trains the quickstart's tokenizer: Qwen2's byte-level BPE, learned from the grammar of Shapes-4o."""

import json

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from echo4o.evaluation.benchmarks.shapes4o.grammar import captions

VOCABULARY = 448  # the 256 bytes, merges, then the special tokens: a cap, reached or not
# Qwen2's, in its order. BAGEL marks text with im_start and im_end, and pictures with vision_start and vision_end.
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
# Words that no instruction of Shapes-4o has, but a chat or a short description may.
OTHER_TEXTS = ("what is this?", "how many objects are there?", "a picture of one object on a light background.")


def train_tokenizer(number: int = 9000, seed: int = 0) -> Qwen2Tokenizer:
    """Learns the merges from ``number`` instructions, none of held-out content; always the same for the same seed."""
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
    # Built from the vocabulary alone, so that what is saved is what Qwen2's own class makes of it.
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        added_tokens_decoder=special,
        model_max_length=32768,
    )
