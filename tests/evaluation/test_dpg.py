"""DPG-Bench from images to report: one call per question, one per image, grids, and the original's answers."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from echo4o.common.json_lines import JsonLines
from echo4o.evaluation.benchmarks import get_benchmark
from echo4o.evaluation.benchmarks.dpg import prompts as dpg_prompts
from echo4o.evaluation.benchmarks.prompt_files import load_prompts
from echo4o.testing.openai_server import OpenAIServer
from tests.evaluation.conftest import ROOT, official
from tests.evaluation.test_command import run, words

HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
TABLE = f"""{HEADER}
7,"A red dog, with a cat",k,1,0,entity,whole,entity - whole (dog),Is there a dog?
7,"A red dog, with a cat",k,2,1,attribute,color,"attribute - color (dog, red)","Is the dog red, really?"
7,"A red dog, with a cat",k,3,0,entity,whole,entity - whole (cat),Is there a cat?
drawbench9,An old sign,k,1,0,entity,whole,entity - whole (sign),Is there a sign?
drawbench9,An old sign,k,2,"0, 1",other,text,"other - text (sign, ""Hi"")",Does the sign say Hi?
"""
# The first channel of an image says which questions its prompt's images answer with no.
NO = {1: ["Is there a dog?"], 2: [], 3: ["Is there a cat?"], 4: ["Is there a dog?", "Is there a cat?"]}
# Of drawbench9 all answers are yes; of 7, image by image: the dog takes its colour along.
SCORES = {"7": [1 / 3, 1.0, 2 / 3, 0.0], "drawbench9": [1.0] * 4}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "questions.csv"
    path.write_text(TABLE)
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for item in SCORES:
        for number in NO:
            Image.new("RGB", (16, 16), (number, 0, 0)).save(folder / f"{item}_{number}.png")
    return folder


@pytest.fixture
def grids(tmp_path):
    folder = tmp_path / "grids"
    folder.mkdir()
    for item in SCORES:
        grid = Image.new("RGB", (32, 32))
        for number in NO:
            grid.paste((number, 0, 0), (16 * ((number - 1) % 2), 16 * ((number - 1) // 2), *_end(number)))
        grid.save(folder / f"{item}.png")
    return folder


def _end(number: int) -> tuple[int, int]:
    return 16 * ((number - 1) % 2) + 16, 16 * ((number - 1) // 2) + 16


def answer(call) -> dict:
    no = NO[call.open_image().getpixel((0, 0))[0]]
    listed = re.findall(r"^- (q\d+): (.*)$", call.text, re.M)
    if listed:
        return {name: "no" if text in no else "yes" for name, text in listed}
    return {"answer": "no" if any(text in call.text for text in no) else "yes"}


@pytest.fixture
def judge():
    with OpenAIServer() as server:
        server.verdict = answer
        yield server


def options(server, table, out):
    return ["--questions", table, "--judge", "openai:judge", "--judge-url", server.url, "--out", out]


def result_of(out) -> dict:
    return json.loads((out / "result.json").read_text())


def check_scores(out, title: str):
    found = result_of(out)
    means = [sum(of) / 4 for of in SCORES.values()]
    assert found["score"] == pytest.approx(100 * sum(means) / 2)
    assert found["coverage"] == 1.0 and found["statuses"]["scored"] == 8
    broad, detailed = found["categories"]["broad"], found["categories"]["detailed"]
    assert broad["entity"] == {
        "score": pytest.approx(100 * 8 / 12),
        "raw": pytest.approx(100 * 8 / 12),
        "questions": 12,
    }
    assert detailed["attribute - color"] == {"score": 50.0, "raw": 100.0, "questions": 4}
    assert found["measure"]["name"] == title and found["measure"]["published"] is None
    assert found["prompts"]["official"] is False and len(found["prompts"]["questions_blob"]) == 40
    report = (out / "report.html").read_text()
    assert "no: Is there a dog?" in report and "without the dependency rule" in report and "BLIP3-o" not in report


def test_one_call_per_question(judge, table, images, tmp_path):
    out = tmp_path / "out"
    done = run("dpg", "--images", images, *options(judge, table, out), "--price", "2,8")
    assert done.exit_code == 0, done.output
    assert "20 paid judgements" in words(done.stderr) and len(judge.judged) == 20
    check_scores(out, "DPG-Bench")
    assert {record["aspect"] for record in JsonLines(out / "records.jsonl")} == {"q1", "q2", "q3"}
    schema = judge.judged[0].body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"answer": {"type": "string", "enum": ["yes", "no"]}}
    other = tmp_path / "other"
    judge.verdict = lambda call: {"answer": "no"}
    assert run("dpg", "--images", images, *options(judge, table, other), "--no-cache").exit_code == 0
    compared = run("compare", out, other, "--json")
    assert compared.exit_code == 0, compared.output
    score = json.loads((out / "result.json").read_text())["score"]
    assert abs(json.loads(compared.stdout)["score"]["difference"]) == pytest.approx(score)


def test_all_questions_of_an_image_in_one_call(judge, table, images, tmp_path):
    out = tmp_path / "out"
    done = run("dpg_one_call", "--images", images, *options(judge, table, out))
    assert done.exit_code == 0, done.output
    assert len(judge.judged) == 8
    check_scores(out, "DPG-Bench, all questions of an image in one call")
    # One missing answer makes the image a judge error, not a zero.
    judge.verdict = lambda call: {name: text for name, text in answer(call).items() if name != "q3"}
    done = run("dpg_one_call", "--images", images, *options(judge, table, tmp_path / "other"), "--no-cache")
    assert done.exit_code == 0, done.output
    found = result_of(tmp_path / "other")
    assert found["statuses"]["judge_error"] == 4 and found["score"] is None


def test_an_unanswered_question_is_a_judge_error(judge, table, images, tmp_path):
    judge.verdict = lambda call: {"answer": "maybe"} if "sign say" in call.text else answer(call)
    done = run("dpg", "--images", images, *options(judge, table, tmp_path / "out"), "--min-coverage", "0.5")
    assert done.exit_code == 0, done.output
    found = result_of(tmp_path / "out")
    assert found["statuses"]["judge_error"] == 4 and found["score"] == pytest.approx(50.0)


def test_the_budget_counts_short_answers(judge, table, images, tmp_path):
    given = options(judge, table, tmp_path / "out")
    done = run("dpg", "--images", images, *given, "--price", "0,1000", "--budget", "0.2")
    assert done.exit_code != 0 and "the 20 open judgements are expected to cost about 0.24" in words(done.stderr)
    assert not judge.calls


def test_grids_are_cut_as_the_original_cuts_them(judge, table, grids, tmp_path):
    out = tmp_path / "out"
    given = ["dpg", "--images", grids, "--grid", 16, *options(judge, table, out)]
    for _ in range(2):
        done = run(*given)
        assert done.exit_code == 0, done.output
    check_scores(out, "DPG-Bench")
    assert len(judge.judged) == 20
    done = run("dpg", "--images", grids, "--grid", 8, *options(judge, table, tmp_path / "other"))
    assert done.exit_code == 2
    assert "7.png: the grid has 32 x 32 pixels; 2 x 2 images with --grid 8 have 16 x 16" in words(done.stderr)
    (grids / "7.png").unlink()
    done = run("dpg", "--images", grids, "--grid", 16, *options(judge, table, tmp_path / "missing"))
    assert done.exit_code == 2 and "4 of 8 images are missing" in words(done.stderr)


@pytest.mark.long
def test_kill_and_resume(table, images, tmp_path):
    out = tmp_path / "out"
    with OpenAIServer(latency=0.05) as server:
        server.verdict = answer
        given = ["dpg", "--images", images, *options(server, table, out), "--concurrency", 2]
        command = [sys.executable, "-m", "echo4o", "evaluate", *map(str, given)]
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(JsonLines(out / "records.jsonl"))) < 4:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert 4 <= len(list(JsonLines(out / "records.jsonl"))) < 20
        assert run(*given).exit_code == 0
        assert 20 <= len(server.judged) <= 22
    check_scores(out, "DPG-Bench")


# --- the original's answers ---


def detail_lines() -> list[str]:
    texts = {"7": ["Is there a dog?", "Is the dog red, really?", "Is there a cat?"]}
    texts["drawbench9"] = ["Is there a sign?", "Does the sign say Hi?"]
    lines = []
    for item, questions in texts.items():
        for number in NO:
            x, y = 512 * ((number - 1) % 2), 512 * ((number - 1) // 2)
            for text in questions:
                said = "no" if text in NO[number] else "yes"
                lines.append(f"out/pics/{item}.png, ({x}, {y}, {x + 512}, {y + 512}), {text}, {said}")
    return lines


def test_the_originals_answers_are_scored_correctly(table, tmp_path):
    file, out = tmp_path / "run_detail.txt", tmp_path / "out"
    file.write_text("\n".join(detail_lines()) + "\n")
    done = run("dpg", "--answers", file, "--questions", table, "--out", out)
    assert done.exit_code == 0, done.output
    found = result_of(out)
    assert found["score"] == pytest.approx(100 * (0.5 + 1.0) / 2) and found["judge"]["judge"] == "mplug"
    assert found["categories"]["detailed"]["attribute - color"]["raw"] == 100.0
    again = run("dpg", "--answers", file, "--questions", table, "--out", out)
    assert again.exit_code == 0 and result_of(out) == found
    # A lost question is a judge error, not a no; an image without a line is missing.
    file.write_text("\n".join(detail_lines()[1:-2]) + "\n")
    done = run("dpg", "--answers", file, "--questions", table, "--out", tmp_path / "less", "--min-coverage", 0.5)
    assert done.exit_code == 0, done.output
    statuses = result_of(tmp_path / "less")["statuses"]
    assert statuses == {"scored": 6, "judge_error": 1, "missing_image": 1, "not_judged": 0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("out/7.png, Is there a dog?, yes", "line 1: it is not of the form FILE"),
        ("out/8.png, (0, 0, 512, 512), Is there a dog?, yes", "line 1: there is no prompt '8'"),
        ("out/7.png, (0, 0, 512, 512), Is there a bird?, yes", "is not a question about 7"),
        (
            "out/7.png, (0, 0, 512, 512), Is there a dog?, yes\nout/7.png, (0, 0, 512, 512), Is there a dog?, no",
            "line 2: 7, image 1 was answered with 'yes' before",
        ),
        ("", "does not contain an answer"),
    ],
)
def test_answers_that_cannot_be_read(line, message, table, tmp_path):
    file = tmp_path / "run_detail.txt"
    file.write_text(line)
    done = run("dpg", "--answers", file, "--questions", table, "--out", tmp_path / "out")
    assert done.exit_code == 2 and message in words(done.stderr)


# --- prompts and questions ---


def test_published_numbers_stand_beside_the_originals_judge_and_questions_only():
    dpg, one_call = get_benchmark("dpg"), get_benchmark("dpg-one-call")
    facts = {"official": True, "official_questions": True}
    assert dpg.measure(facts, {"judge": "mplug"}).published == "dpg"
    assert dpg.measure(facts, {"judge": "openai:gpt"}).published is None
    assert one_call.measure(facts, {"judge": "openai:gpt"}).published is None
    assert dpg.measure(facts | {"official": False}, {"judge": "mplug"}).published is None
    assert dpg.measure({"official": False, "official_questions": False}, {"judge": "mplug"}).published is None


def test_the_official_prompts_are_known_in_any_form(tmp_path):
    file = official("dpg/dpg_prompts.jsonl")
    texts = dpg_prompts.read_texts(file)
    assert len(texts) == dpg_prompts.PROMPTS == 1065
    assert dpg_prompts.prompts_hash(texts) == dpg_prompts.OFFICIAL_PROMPTS
    folder = tmp_path / "prompts"
    folder.mkdir()
    for item, text in texts.items():
        (folder / f"{item}.txt").write_text(f"{text}\n")
    assert dpg_prompts.prompts_hash(dpg_prompts.read_texts(folder)) == dpg_prompts.OFFICIAL_PROMPTS
    changed = texts | {"0": texts["0"].replace("e", "a", 1)}
    assert dpg_prompts.prompts_hash(changed) != dpg_prompts.OFFICIAL_PROMPTS


def test_the_official_table_is_known_by_its_blob_id(table, monkeypatch, tmp_path):
    from dataclasses import replace

    from echo4o.evaluation.benchmarks.base import git_blob_id

    dpg, source = get_benchmark("dpg"), replace(dpg_prompts.QUESTIONS, url=table.as_uri())
    monkeypatch.setattr(dpg_prompts, "QUESTIONS", source)
    with pytest.raises(ValueError, match=r"has the git blob id .*, expected is 98457fc9.* --questions FILE"):
        load_prompts(dpg)
    monkeypatch.setattr(dpg_prompts, "QUESTIONS", replace(source, sha256=git_blob_id(table.read_bytes())))
    prompts = load_prompts(dpg)
    assert prompts.official is True and [prompt.id for prompt in prompts.prompts] == ["7", "drawbench9"]
    table.unlink()  # fetched once
    assert load_prompts(dpg).sha256 == prompts.sha256


def test_tables_and_prompts_that_do_not_fit(judge, table, images, tmp_path):
    def error(text: str, *more) -> str:
        table.write_text(text)
        done = run("dpg", "--images", images, *options(judge, table, tmp_path / "out"), *more)
        assert done.exit_code == 2 and not judge.calls
        return words(done.stderr)

    assert "question 2 of 7 depends on question 5, which 7 does not have" in error(TABLE.replace("k,2,1,", "k,2,5,"))
    assert "row 2: 7 has another text" in error(TABLE.replace("A red dog", "A dog", 1))
    (tmp_path / "prompts.jsonl").write_text('{"item_id": "8", "prompt": "x"}')
    assert "it has no question about the prompt '8'" in error(TABLE, "--prompts", tmp_path / "prompts.jsonl")
    done = run("genevalpp", "--images", images, *options(judge, table, tmp_path / "out"))
    assert done.exit_code == 2 and "--questions is for dpg only" in words(done.stderr)


def test_another_table_needs_another_folder(judge, table, images, tmp_path):
    assert run("dpg", "--images", images, *options(judge, table, tmp_path / "out")).exit_code == 0
    table.write_text(TABLE.replace("Is there a sign?", "Is a sign there?"))
    done = run("dpg", "--images", images, *options(judge, table, tmp_path / "out"))
    assert done.exit_code == 2 and "holds an evaluation of other prompts" in words(done.stderr)
