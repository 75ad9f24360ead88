"""How long a judge's answers take to come in: 280 pictures against an endpoint with 1 s latency."""

import os
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.evaluation.conftest import even_is_correct, write_pictures, write_prompts
from tests.evaluation.running import judge

PICTURES, LATENCY = 280, 1.0


def main(options: Namespace) -> None:
    """Print seconds by concurrency, beside the least that the latency allows."""
    os.environ["OPENAI_API_KEY"] = API_KEY
    print(f"{PICTURES} judgements, {LATENCY:g} s each; with the probe of the judge's eyes before them")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prompts, pictures = (
            write_prompts(work / "prompts.jsonl", PICTURES),
            write_pictures(work / "pictures", PICTURES),
        )
        for concurrency in (32, 64):
            with OpenAIServer(LATENCY) as server:
                server.verdict = even_is_correct
                start = time.perf_counter()
                judge(server.url, prompts, pictures, work / str(concurrency), None, concurrency)
                seconds = time.perf_counter() - start
                least = (1 + -(-PICTURES // concurrency)) * LATENCY
                print(
                    f"  concurrency {concurrency:3}: {seconds:6.2f} s, least possible {least:5.1f} s, most open {server.peak}"
                )
