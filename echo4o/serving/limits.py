"""What a server accepts: sizes, counts and times. Everything above a limit is refused before any work is done."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Args:
        queue: images and answers that may wait; more requests get 429.
        batch: most images, or answers, of one call of the pipeline.
        images: most images of one request.
        steps: most sampler updates of an image.
        pixels: most pixels of a generated image.
        new_tokens: most tokens of an answer or of a plan.
        prompt_letters: most letters of all texts of a request.
        upload_bytes: most bytes of the body of a request.
        upload_pixels: most pixels of an uploaded image.
        upload_seconds: seconds that the body of a request may take to arrive.
    """

    queue: int = 64
    batch: int = 8
    images: int = 10
    steps: int = 250
    pixels: int = 2048 * 2048
    new_tokens: int = 4096
    prompt_letters: int = 20_000
    upload_bytes: int = 64 * 2**20
    upload_pixels: int = 50_000_000
    upload_seconds: float = 60.0
