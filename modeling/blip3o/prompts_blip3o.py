"""Texts and token ids as BLIP3-o reads them: chat template, image placeholders, the tokens before the queries."""

from dataclasses import dataclass

SYSTEM = "You are a helpful assistant."
CAPTION = "Please generate image based on the following caption: "
RECONSTRUCT = "Please reconstruct the given image."
NEGATIVE_PROMPT = " "  # of the decoder's guidance; used without the template
IMAGE = "<image>"  # stands for an image in a text
IMAGE_START = "[IMG]"  # precedes the queries
PAD = "<|endoftext|>"


def user_turn(text: str) -> str:
    """A conversation up to the place of the answer."""
    return f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def generation_text(prompt: str) -> str:
    """The text before `[IMG]` when an image is generated from a prompt."""
    return user_turn(CAPTION + prompt)


def reconstruction_text(prompt: str = RECONSTRUCT) -> str:
    """The text before `[IMG]` when an image is generated from an image and a prompt."""
    return user_turn(f"{IMAGE}\n{prompt}")


def training_text(content: str, matched: bool = False, image_size: int = 0) -> str:
    """The text before `[IMG]` of a training row.

    Args:
        content: of the user's turn: [`CAPTION`] and a caption.
        matched: as in generation. The released training code closes the empty answer first (`<|im_end|>`), which
            generation does not.
        image_size: tokens that an `<image>` in the content becomes; the content is stripped then, as in the original.
    """
    if IMAGE in content:
        content = content.replace(IMAGE, image_tokens(image_size)).strip()
    return user_turn(content) + ("" if matched else "<|im_end|>\n")


def image_tokens(count: int) -> str:
    """The text of an image of `count` tokens."""
    return f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>"


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens; the release's are 151643, 151655, 151665 and 151667."""

    pad: int
    image_pad: int
    image_start: int
    image: int

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "TokenIds":
        """Raises ValueError if the tokenizer lacks one of them."""
        names = (PAD, "<|image_pad|>", IMAGE_START, IMAGE)
        known = tokenizer.get_vocab()
        if lacking := [name for name in names if name not in known]:
            raise ValueError(f"The tokenizer lacks {', '.join(lacking)}; it is not a tokenizer of BLIP3-o.")
        return cls(*(known[name] for name in names))


def check_tokenizer(tokenizer, vocabulary: int | None) -> None:
    """Raise ValueError if a tokenizer lacks special tokens, or has more tokens than the language model embeds."""
    TokenIds.from_tokenizer(tokenizer)
    if vocabulary is not None and len(tokenizer) > vocabulary:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the language model embeds {vocabulary}: they do not belong "
            "together."
        )


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text; special tokens in it are read as such."""
    return tokenizer.encode(text, add_special_tokens=False)


def special_tokens_in(tokenizer, text: str) -> list[str]:
    """The special tokens that a user's text contains, sorted."""
    return sorted(token for token in map(str, tokenizer.added_tokens_decoder.values()) if token in text)
