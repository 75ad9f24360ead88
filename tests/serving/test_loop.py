"""echo4o's own commands with `echo4o serve` as their endpoint: a judge of an evaluation, the artist of a synthesis."""

import json

import pytest

pytest.importorskip("fastapi", reason="pip install 'echo4o[app]'")

import yaml
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.evaluation.benchmarks.shapes4o.scene import COLOURS, SHAPES
from echo4o.testing.openai_server import API_KEY, OpenAIServer
from tests.dataset_scripts.synthesis.artist import Artist
from tests.serving.running import BASE, serving

pytestmark = pytest.mark.long
_PROBE = {(29, 62, 214): "blue", (255, 217, 15): "yellow"}


def run(*arguments: str):
    result = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def judging(tiny):
    """A server whose model sees: it names the colours of the probe, and finds every second image correct."""
    from echo4o import Echo4oPipeline
    from echo4o.serving.served_model import ServedModel

    class SeeingPipeline(Echo4oPipeline):
        """Answers from the pixels, because the quickstart's model writes no JSON."""

        asked = 0

        def chat(self, prompt: list[str], image: list | None = None, max_new_tokens: int = 512) -> list[str]:
            return [self.look(text, images) for text, images in zip(prompt, image or [[]] * len(prompt))]

        def look(self, text: str, images: list) -> str:
            if "test picture" in text:
                left, right = (_PROBE.get(images[-1].getpixel((x, 8)), "?") for x in (8, images[-1].width - 8))
                return json.dumps({"reason": "two halves", "left": left, "right": right})
            self.asked += 1
            return f"```json\n{json.dumps({'reason': 'looked', 'correct': self.asked % 2})}\n```"

    pipe = SeeingPipeline(**tiny.components, vae_image_limits=tiny.config.vae_image_limits)
    with serving(ServedModel(pipe)) as running:
        yield running


def test_an_evaluation_is_judged_by_the_server(judging, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    fresh, out = tmp_path / "fresh.jsonl", tmp_path / "scores"
    run("evaluate", "make-prompts", "genevalpp", "--seed", "7", "--out", fresh)
    arguments = ["--prompts", fresh, "--limit", "4", "--steps", "2", "--temperature", "default", "--min-coverage", "0"]
    judge = ["--judge", "openai:echo4o", "--judge-url", judging.url]
    run("evaluate", "genevalpp", "--model", BASE, "--out", out, *arguments, *judge)
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records if "status" in record].count("scored") == 4
    assert judging.engine.metrics["answers"] >= 5  # the probe, and four images


def test_a_synthesis_draws_with_the_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    (tmp_path / "objects.txt").write_text("\n".join(SHAPES) + "\n")
    (tmp_path / "colours.txt").write_text("\n".join(COLOURS) + "\n")
    words = str(tmp_path / "objects.txt"), str(tmp_path / "colours.txt")
    before = server.engine.metrics["images"]
    with OpenAIServer() as writer:
        Artist().serve(writer)
        image = {"name": "echo4o", "url": server.url, "size": "64x64", "options": {"steps": 2}, "send_seed": True}
        recipe = {
            "version": "loop-1",
            "models": {"text": {"name": "writer", "url": writer.url}, "image": image, "judge": None},
            "gates": {
                "verify": False,
                "duplicate_pictures": None,
                "contamination": None,
            },
            "instruction_following": {"rows": 4, "objects": words[0], "colours": words[1]},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run("dataset", "synthesize", tmp_path / "recipe.yaml", "--out", tmp_path / "made")
    assert server.engine.metrics["images"] >= before + 4
    run("dataset", "build", tmp_path / "made" / "dataset", "--out", tmp_path / "built")
