"""The texts that OmniGen2 was trained with, in the turns of Qwen2.5-VL's chat format."""

SYSTEM_PROMPT = "You are a helpful assistant that generates high-quality images based on user instructions."
DROPPED_SYSTEM_PROMPT = (
    "You are a helpful assistant that generates images."  # training, when the instruction is dropped
)
IMAGE_TOKEN = "<|image_pad|>"
GENERATE_TOKEN = "<|img|>"  # an answer that begins with it asks for an image
END_TOKENS = ("<|im_end|>", GENERATE_TOKEN, "<|endoftext|>")  # where an answer ends


def prompt_text(prompt: str, system: str = SYSTEM_PROMPT) -> str:
    """The system and the user turn, without the header of an answer."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"


def chat_text(prompt: str, images: int = 0) -> str:
    """As [`prompt_text`], with `images` numbered images before the prompt, and with the header of the answer."""
    vision = "".join(f"<img{i}>: <|vision_start|>{IMAGE_TOKEN}<|vision_end|>" for i in range(1, images + 1))
    return prompt_text(vision + prompt) + "<|im_start|>assistant\n"
