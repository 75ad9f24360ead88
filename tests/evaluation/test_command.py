"""`echo4o evaluate` as people use it: whole runs, steps alone, and each kind of bad input in one line."""

import json
import shlex
import subprocess
import sys

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from echo4o.cli import app
from echo4o.common.json_lines import JsonLines
from echo4o.testing.openai_server import EndpointFault
from tests.evaluation.conftest import ROOT, write_pictures, write_prompts


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *(str(a) for a in arguments)])


def words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def given(server, prompts, pictures, tmp_path):
    """What a run over the pictures of a folder needs."""
    return [
        *("genevalpp", "--images", pictures, "--prompts", prompts),
        *("--judge", "openai:judge", "--judge-url", server.url, "--out", tmp_path / "out"),
    ]


def test_judge_images_of_any_model(given, server, tmp_path):
    result = run(*given)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert result.stdout.split() == [str(out / "result.json"), str(out / "report.html")]
    assert "8 paid judgements" in words(result.stderr)
    assert "score 0.500 (0.3" in words(result.stderr) and "coverage 100.0%" in words(result.stderr)
    found = json.loads((out / "result.json").read_text())
    assert {"benchmark", "score", "coverage", "groups"} <= set(list(found)[:8])
    assert found["groups"]["counting"] == {"score": 0.0, "scored": 4, "total": 4}
    for name in (
        "seed",
        "dtype",
        "guidance",
        "steps",
        "model_revision",
        "adapter",
        "judge",
        "prompt_hashes",
        "versions",
    ):
        assert name in found
    assert found["prompts"] == {"count": 8, "official": False, "part": None}
    assert found["prompt_hashes"]["correct"] and found["judge"]["endpoint"] == server.url
    record = next(iter(JsonLines(out / "records.jsonl")))
    assert {"id", "group", "status", "scores", "reason", "attempts"} <= set(record)


def test_two_runs_of_the_same_inputs_give_the_same_bytes(given, tmp_path):
    run(*given)
    run(*given[:-1], tmp_path / "again", "--no-cache", "--concurrency", "3")
    for name in ("result.json", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_each_step_alone(given, server, tmp_path):
    out = tmp_path / "out"
    assert run("score", "--out", out).exit_code == 2
    judged = run("judge", "--benchmark", *given)
    assert judged.exit_code == 0, judged.output
    assert "next: echo4o evaluate score" in words(judged.stderr)
    scored = run("score", "--out", out, "--bootstrap-seed", 3)
    assert scored.exit_code == 0, scored.output
    assert json.loads((out / "result.json").read_text())["intervals"]["seed"] == 3
    other = tmp_path / "other"
    run("judge", "--benchmark", *given[:-1], other)
    compared = run("compare", out, other, "--json")
    assert json.loads(compared.stdout)["score"]["difference"] == 0.0
    assert "counting" in run("compare", out, other).stdout


def test_generate_judge_and_score_the_golden_model(server, tmp_path):
    """The whole way with a real pipeline: 2 prompts, 2 pictures each, references read by the model."""
    prompts = write_prompts(tmp_path / "prompts.jsonl", 2)
    server.verdict = lambda call: {"reason": "fine", "correct": 1}
    arguments = [
        *("genevalpp", "--model", ROOT / "tests" / "parity" / "golden" / "checkpoint", "--prompts", prompts),
        *("--judge", "openai:judge", "--judge-url", server.url, "--out", tmp_path / "out", "--device", "cpu"),
        *("--num-images", 2, "--steps", 1, "--height", 32, "--width", 32, "--seed", 5),
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (found["score"], found["seed"], found["steps"], found["height"]) == (1.0, 5, 1, 32)
    assert found["pictures_per_prompt"] == 2 and found["statuses"]["scored"] == 4
    assert found["model_revision"].startswith("folder:") and found["dtype"] == "float32"
    asked = len(server.calls)
    assert run(*arguments).exit_code == 0
    assert len(server.calls) == asked


def test_a_part_of_the_prompts_gives_no_overall_score(given, tmp_path):
    result = run(*given, "--group", "counting")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["score"] is None and found["withheld"] == "a part of the prompts was evaluated: only counting"
    assert found["groups"] == {"counting": {"score": 0.0, "scored": 4, "total": 4}}


def test_repeats_show_the_judges_own_variance(given, server, tmp_path):
    answers = iter(range(1000))
    server.verdict = lambda call: {"reason": "by turns", "correct": next(answers) % 2}
    assert run(*given, "--repeats", 2, "--concurrency", 1).exit_code == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["repeats"]["pictures_judged_differently"] == 1.0
    assert found["statuses"]["scored"] == 16


def test_the_budget_is_a_limit(given, server, tmp_path):
    # 1000 tokens in at 10 USD and 100 out at 10 USD per million: 0.011 per call.
    refused = run(*given, "--price", "10,10", "--budget", 0.01)
    assert refused.exit_code == 2 and "expected to cost about 0.06; no call was made" in words(refused.stderr)
    assert server.calls == []
    stopped = run(*given, "--price", "10,10", "--budget", 0.068, "--concurrency", 2)
    assert stopped.exit_code == 2 and "the budget of 0.068 USD is reached" in words(stopped.stderr)
    assert sum(server.paid.values()) * 0.011 <= 0.068
    kept = len(list(JsonLines(tmp_path / "out" / "records.jsonl")))
    assert kept == len(server.judged) > 0
    assert run(*given, "--price", "10,10", "--budget", 1).exit_code == 0
    assert len(server.judged) == 8
    unknown = run(*given[:-1], tmp_path / "other", "--budget", 1)
    assert "--budget needs the price" in words(unknown.stderr)


def test_a_replaced_judge_prompt_is_used_and_named(given, server, tmp_path):
    words_of = tmp_path / "words.md"
    words_of.write_text("Is it {{ instruction }}? {{ answer_format }}")
    run(*given)
    first = json.loads((tmp_path / "out" / "result.json").read_text())
    assert run(*given, "--judge-prompt", words_of).exit_code == 0
    second = json.loads((tmp_path / "out" / "result.json").read_text())
    assert first["prompt_hashes"]["correct"] != second["prompt_hashes"]["correct"]
    assert len(server.judged) == 16 and server.calls[-1].text.endswith('"correct": 0 or 1}')


def test_missing_images_have_to_be_allowed(given, server, pictures, tmp_path):
    (pictures / "3.png").unlink()
    (pictures / "5.png").write_bytes(b"\x89PNG not really")
    refused = run(*given)
    assert refused.exit_code == 2
    assert "2 of 8 images are missing: 3 (there is no such file), 5 (it does not decode" in words(refused.stderr)
    assert server.calls == []
    assert run(*given, "--allow-missing").exit_code == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["score"] is None and found["statuses"]["missing_image"] == 2
    missing = [
        record for record in JsonLines(tmp_path / "out" / "records.jsonl") if record["status"] == "missing_image"
    ]
    assert [record["id"] for record in missing] == ["3", "5"] and all(record["reason"] for record in missing)
    assert run("score", "--out", tmp_path / "out", "--min-coverage", 0.7).exit_code == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["score"] == 0.5


MISTAKES = {
    "no key": ([], "the environment variable OPENAI_API_KEY is not set"),
    "another variable": (["--judge-key-env", "OTHER_KEY"], "the environment variable OTHER_KEY is not set"),
    "unknown benchmark": (["genevalplus"], "there is no benchmark 'genevalplus'; known are genevalpp"),
    "unknown group": (["--group", "colours"], "there is no group or type 'colours'"),
    "unknown judge": (["--judge", "human"], "there is no judge 'human'; the judges are openai:MODEL"),
    "no pictures": (["--images", "nowhere"], "nowhere: there is no such folder of images"),
    "both": (["--model", "x"], "pass --model to generate images, or --images"),
    "self without a model": (["--judge", "self"], "--judge self asks the evaluated model: give --model"),
    "no prompt file": (["--prompts", "none.jsonl"], "none.jsonl: No such file or directory"),
    "bad URL": (["--judge-url", "localhost:8000"], "must start with http:// or https://"),
    "bad price": (["--price", "cheap"], "--price cheap: must be two numbers"),
    "bad temperature": (["--temperature", "hot"], "--temperature hot: must be a number or 'default'"),
    "no judge prompt": (["--judge-prompt", "none.md"], "none.md: No such file or directory"),
    "several per prompt": (["--num-images", "2"], "16 of 16 images are missing"),
    "pixels": (["--judge", "pixels"], "the judge pixels knows Shapes-4o only"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_before_anything_is_asked(name, given, server, tmp_path, monkeypatch):
    more, message = MISTAKES[name]
    if name in ("no key", "another variable"):
        monkeypatch.delenv("OPENAI_API_KEY")
    arguments = [*more, *given[1:]] if name == "unknown benchmark" else [*given, *more]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in words(result.stderr)
    assert "Traceback" not in result.output and result.stdout == ""
    assert server.calls == []


def test_two_images_for_one_id(given, pictures):
    Image.new("RGB", (8, 8)).save(pictures / "3.jpg")
    assert "3.jpg and 3.png are two images for the one id 3" in words(run(*given).stderr)
    (pictures / "3.jpg").rename(pictures / "003.jpg")
    assert "003.jpg and 3.png are two images for the one id 3" in words(run(*given).stderr)


def test_images_named_as_the_original_asks(given, pictures, tmp_path):
    for path in list(pictures.iterdir()):
        path.unlink()
    write_pictures(pictures, suffix=".jpg")
    assert run(*given).exit_code == 0


def test_a_judge_prompt_that_hides_the_instruction(given, tmp_path, server):
    (tmp_path / "words.md").write_text("Is it nice?")
    assert "the judge would not see the prompt" in words(run(*given, "--judge-prompt", tmp_path / "words.md").stderr)
    (tmp_path / "words.md").write_text("{{ prompt }}")
    refused = words(run(*given, "--judge-prompt", tmp_path / "words.md").stderr)
    assert "'prompt' is undefined; a judge prompt can use answer_format, checklist, instruction, tag" in refused
    assert server.calls == []


def test_a_folder_belongs_to_its_prompts(given, tmp_path):
    run(*given)
    refused = run(*given, "--limit", 2)
    assert "holds an evaluation of other prompts (part differs): use another --out" in words(refused.stderr)


def test_a_wrong_key_is_one_line(given, monkeypatch, server):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-and-secret")
    result = run(*given)
    assert result.exit_code == 2 and "(http_401)" in result.stderr
    assert "sk-wrong-and-secret" not in result.output and "[key]" in result.stderr


def test_a_blind_judge_is_one_line(given, server):
    server.vision = False
    assert "does not seem to see images" in words(run(*given).stderr)
    assert run(*given, "--no-probe").exit_code == 0


def test_an_error_is_shown_and_the_rest_kept(given, server, tmp_path):
    server.inject(EndpointFault("refusal", times=9, match="number 2"))
    result = run(*given)
    assert result.exit_code == 0
    assert "no overall score: coverage is 0.8750, below --min-coverage 1 (coverage 87.5%)" in words(result.stderr)


def test_make_prompts(tmp_path):
    result = run("make-prompts", "genevalpp", "--seed", 4, "--out", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 280
    again = run(
        "make-prompts", "genevalpp", "--seed", 4, "--exclude", tmp_path / "p.jsonl", "--out", tmp_path / "q.jsonl"
    )
    assert again.exit_code == 0 and (tmp_path / "q.jsonl").read_text() != (tmp_path / "p.jsonl").read_text()
    assert "for genevalpp and geneval only" in words(run("make-prompts", "omnicontext").stderr)


def test_help_is_cheap():
    code = "import sys\nimport echo4o.cli\ntry: echo4o.cli.app(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'openai', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    "command", ["run", "generate", "judge", "score", "compare", "make-prompts", "convert-detector"]
)
def test_each_step_shows_an_example(command):
    assert "Example: " in words(run(command, "--help").output)


def documented() -> list[str]:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    return [
        line.partition("echo4o evaluate")[2]
        for line in text.splitlines()
        if "echo4o evaluate " in line and line[0] in "ea"
    ]


@pytest.mark.parametrize("line", documented())
def test_documented_commands_parse(line):
    command = typer.main.get_command(app).commands["evaluate"]
    with command.make_context("evaluate", shlex.split(line)) as context:
        name, chosen, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        chosen.make_context(name, rest, parent=context)


def test_the_endpoint_of_the_environment(given, server, monkeypatch, tmp_path):
    """As the documentation has it for vLLM."""
    at = given.index("--judge-url")
    monkeypatch.setenv("OPENAI_BASE_URL", given[at + 1])
    assert run(*given[:at], *given[at + 2 :]).exit_code == 0
    assert len(server.judged) == 8


def test_omnicontext_shows_the_references_and_asks_twice(server, pictures, tmp_path):
    rows = [
        {"key": "k1", "task_type": "scene_object", "instruction": "put it there", "input_images": ["pictures/1.png", "pictures/2.png"]},
        {"key": "k2", "task_type": "single_character", "instruction": "let her wave", "input_images": ["pictures/3.png"]},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for row, number in zip(rows, (4, 5)):
        drawn = tmp_path / "drawn" / row["task_type"]
        drawn.mkdir(parents=True)
        (drawn / f"{row['key']}.png").write_bytes((pictures / f"{number}.png").read_bytes())
    server.verdict = lambda call: {
        "reason": "as it is",
        **({"prompt_following": 4} if "`prompt_following`" in call.text else {"subject_consistency": 9}),
    }
    arguments = ["--images", tmp_path / "drawn", "--prompts", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    result = run("omnicontext", *arguments, "--judge", "openai:judge", "--judge-url", server.url)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["score"] == found["also"]["score_6_tasks"] == 6.0
    assert found["fields"] == {"prompt_following": 4.0, "subject_consistency": 9.0}
    for call in server.judged:
        number = 4 if "put it there" in call.text else 5
        references = [1, 2] if number == 4 else [3]
        assert [call.open_image(i).getpixel((0, 0))[0] for i in range(len(call.images))] == [*references, number]
        assert "Picture to grade" in call.text and "Reference picture 1" in call.text
    assert len(server.judged) == 4


def test_imagine_bench_reads_three_grades(server, pictures, tmp_path):
    row = {"id": 7, "type": "TIME", "instruction": "a knight with a phone", "note": "the phone is the unreal element"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    server.verdict = lambda call: {
        "reason": "so so", "fantasy_fulfillment": 9, "identity_preservation": 5, "aesthetic_quality": 8,
    }  # fmt: skip
    arguments = ["--images", pictures, "--prompts", tmp_path / "rows.jsonl", "--out", tmp_path / "out"]
    result = run("imagine-bench", *arguments, "--judge", "openai:judge", "--judge-url", server.url)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["groups"]["spatiotemporal"]["score"] == pytest.approx(5.6)
    (call,) = server.judged
    assert row["note"] in call.text and row["instruction"] in call.text
    assert call.open_image().getpixel((0, 0))[0] == 7
