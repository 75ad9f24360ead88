"""Times the judging of 280 images by an endpoint with a latency of 1 s."""

import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.evaluation.conftest import even_is_correct, write_pictures, write_prompts
from tests.evaluation.running import judge

IMAGES, LATENCY = 280, 1.0


def main(options: Namespace) -> None:
    """Print seconds by concurrency, with the smallest time that the latency allows."""
    os.environ["OPENAI_API_KEY"] = API_KEY
    print(f"{IMAGES} judgements, {LATENCY:g} s each; preceded by the vision probe of the judge")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prompts, images = (
            write_prompts(work / "prompts.jsonl", IMAGES),
            write_pictures(work / "pictures", IMAGES),
        )
        for concurrency in (32, 64):
            with OpenAIServer(LATENCY) as server:
                server.verdict = even_is_correct
                start = time.perf_counter()
                judge(server.url, prompts, images, work / str(concurrency), None, concurrency)
                seconds = time.perf_counter() - start
                least = (1 + -(-IMAGES // concurrency)) * LATENCY
                print(
                    f"  concurrency {concurrency:3}: {seconds:6.2f} s, least possible {least:5.1f} s, at most {server.peak} open requests"
                )
