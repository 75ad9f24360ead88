"""`--judge-prompt released` on scripts of the same form as the released ones, which are not part of this project."""

import base64
import hashlib
import io
import json
from dataclasses import replace

import pytest
from PIL import Image

from echo4o.evaluation import released_prompts
from echo4o.evaluation.released_prompts import ReleasedScript
from tests.evaluation.conftest import even_is_correct
from tests.evaluation.test_command import run, words

SCRIPT = '''
import base64, io, json, sys
from openai import OpenAI
from PIL import Image

sys.exit("this script must never run")
MODEL = "gpt-4.1"
LIMIT = 512
SYSTEM = "You are a careful examiner."
TEMPLATE = """Look at the picture for: {prompt}
Objects: {include}
Answer as {{"reason": "...", "correct": 0 or 1}}."""


def encode(path):
    buffer = io.BytesIO()
    Image.open(path).convert("RGB").save(buffer, format="JPEG", quality=70)
    return base64.b64encode(buffer.getvalue()).decode()


def judge(client, path, item):
    question = TEMPLATE.format(prompt=item["prompt"], include=json.dumps(item["include"]))
    link = f"data:image/jpeg;base64,{encode(path)}"
    messages = [
        {"role": "system", "content": SYSTEM},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": link, "detail": "low"}},
                {"type": "text", "text": question + "\\nBe strict."},
            ],
        },
    ]
    return client.chat.completions.create(model=MODEL, messages=messages, temperature=0.2, max_tokens=LIMIT)
'''


@pytest.fixture
def released(tmp_path, monkeypatch):
    """Lets a script stand for the released one of GenEval++."""

    def use(text: str, sha256: str | None = None):
        path = tmp_path / "script.py"
        path.write_text(text)
        digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        source = replace(released_prompts.SCRIPTS["genevalpp"], url=path.as_uri(), sha256=digest)
        monkeypatch.setitem(released_prompts.SCRIPTS, "genevalpp", source)

    return use


@pytest.fixture
def given(server, prompts, pictures, tmp_path):
    server.verdict = even_is_correct
    return [
        *("genevalpp", "--images", pictures, "--prompts", prompts, "--judge", "openai:judge"),
        *("--judge-url", server.url, "--judge-prompt", "released", "--out", tmp_path / "out"),
    ]


def test_the_judge_is_asked_as_the_script_asks(given, server, released, tmp_path):
    released(SCRIPT)
    done = run(*given)
    assert done.exit_code == 0, done.output
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["score"] == 0.5 and result["judge_words"] == "those of the released script"
    assert result["prompt_hashes"]["correct"] == f"released:{hashlib.sha256(SCRIPT.encode()).hexdigest()}"
    assert "the words of the released script" in (tmp_path / "out" / "report.html").read_text()
    body = next(call.body for call in server.judged if "number 3" in call.text)
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.2, 512, "judge")
    assert "response_format" not in body
    system, user = body["messages"]
    assert system == {"role": "system", "content": "You are a careful examiner."}
    image, text = user["content"]
    assert text["text"] == (
        "Look at the picture for: A photo of cups, number 3\n"
        'Objects: [{"class": "cup", "count": 4}]\n'
        'Answer as {"reason": "...", "correct": 0 or 1}.\nBe strict.'
    )
    assert image["image_url"]["detail"] == "low"
    data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    expected = io.BytesIO()
    with Image.open(tmp_path / "pictures" / "3.png") as picture:
        picture.convert("RGB").save(expected, "JPEG", quality=70)
    assert data == expected.getvalue()


def test_answers_without_a_reason_and_in_other_case_are_read(given, server, released, tmp_path):
    released(SCRIPT)
    server.verdict = lambda call: {"Correct": 1}
    assert run(*given).exit_code == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["score"] == 1.0


def test_another_checksum_is_refused(given, server, released):
    released(SCRIPT, "0" * 64)
    done = run(*given)
    assert done.exit_code == 2 and f"expected is {'0' * 64}" in words(done.stderr) and not server.calls


def test_our_own_words_say_so(given, tmp_path):
    at = given.index("--judge-prompt")
    assert run(*given[:at], *given[at + 2 :]).exit_code == 0
    assert "judge_words" not in json.loads((tmp_path / "out" / "result.json").read_text())
    assert "echo4o&#39;s own words" in (tmp_path / "out" / "report.html").read_text()


def test_an_unknown_gap_is_an_error_before_anything_is_asked(given, server, released):
    released(SCRIPT.replace('include=json.dumps(item["include"])', "include=secret()"))
    done = run(*given)
    assert done.exit_code == 2 and not server.calls
    assert "fills its text with 'secret()', which echo4o does not know" in words(done.stderr)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "is not Python"),
        ("print('no call')", "does not call a chat model"),
        ("f(messages=x)", "are not a list"),
    ],
)
def test_scripts_of_another_form(text, message):
    with pytest.raises(ValueError, match=message):
        ReleasedScript.read(text, "0")


def test_only_endpoints_and_known_benchmarks(given, released, tmp_path):
    released(SCRIPT)
    given[given.index("openai:judge")] = "self:model"
    assert "needs an openai: judge" in words(run(*given).stderr)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"tag": "colors", "include": [], "prompt": "x"}))
    assert released_prompts.SCRIPTS["imagine_bench"].sha256.startswith("0dd6a1214c6b")
    with pytest.raises(ValueError, match="there are released scripts of genevalpp, imagine_bench only"):
        from echo4o.evaluation.benchmarks import get_benchmark

        released_prompts.load_released_prompts(get_benchmark("geneval"))
