"""`loongjax generate --input`: files answered by an engine of this process."""

from __future__ import annotations

import json

import pytest

from loongjax.api.llm import LLM
from loongjax.cli.main import main
from loongjax.sampling.params import SamplingParams

MODEL = ("--model", "random:tiny", "--max-model-len", "128", "--pool-slots", "256")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    """A folder of compiled programs for all tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(tmp_path):
    """Runs a job over some lines; gives the exit code, and the lines of output by line."""

    def run(lines, *arguments, name="in.jsonl", model=MODEL):
        source, target = tmp_path / name, tmp_path / "out.jsonl"
        if lines is not None:
            source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code = main(
            ["generate", *model, "--input", str(source), "--output", str(target), *arguments]
        )
        written = target.read_text().splitlines() if target.exists() else []
        return code, {told["line"]: told for told in map(json.loads, written)}

    return run


def test_answers_are_those_of_generate(run, capsys):
    lines = [{"id": i, "prompt": f"prompt number {i}"} for i in range(40)]
    lines.append({"id": "own", "prompt": [1, 2, 3], "max_tokens": 2, "n": 2, "seed": 1})
    code, found = run(lines, "--max-tokens", "4", "--json", "--in-flight", "16")
    report = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (report["lines"], report["answered"], report["errors"]) == (41, 41, 0)
    assert len(found[41]["outputs"]) == 2
    with LLM("random:tiny", max_model_len=128, pool_slots=256) as llm:
        params = SamplingParams(temperature=0, max_tokens=4)
        expected = llm.generate([line["prompt"] for line in lines[:40]], params)
    for place, output in enumerate(expected, start=1):
        assert found[place]["id"] == place - 1
        assert tuple(found[place]["token_ids"]) == output.token_ids
        assert found[place]["text"] == output.text
        assert found[place]["prompt_tokens"] == len(output.prompt_token_ids)


def test_bad_lines_are_final_and_the_exit_code_says_so(run, capsys):
    lines = [{"prompt": "fine"}, {"prompt": ""}, {"prompt": "x" * 500}, {"prompt": [99_999]}]
    code, found = run(lines, "--max-tokens", "2")
    assert code == 3
    assert "3 of 4 lines cannot be answered" in capsys.readouterr().err
    assert "error" not in found[1]
    assert "empty" in found[2]["error"]
    assert "the prompt has 500 tokens" in found[3]["error"]
    assert "outside the vocabulary" in found[4]["error"]
    again = run(None, "--max-tokens", "2", model=("--model", "absent-for-nothing-is-left"))
    assert again == (3, found)


def test_openai_batch_files(run, capsys):
    def line(name, url="/v1/completions", **body):
        body = {"model": "tiny", "max_tokens": 3, "temperature": 0} | body
        return {"custom_id": name, "method": "POST", "url": url, "body": body}

    chats = "/v1/chat/completions"
    lines = [
        line("a", prompt="one", return_token_ids=True),
        line("b", prompt=["two"], n=2, seed=1),
        line("c", chats, messages=[{"role": "user", "content": "three"}]),
        line("d", prompt="x", top_p=1.5),
        line("e", prompt="x", model="gpt-9"),
        line("f", prompt=["x", "y"]),
        line("g", prompt="x", stream=True),
        line("h", "/v1/embeddings", prompt="x"),
        line("i", chats, messages=[{"role": "user", "content": "x"}], max_completion_tokens=3),
        {"custom_id": "j", "prompt": "x"},
        line("k"),
    ]
    code, found = run(lines, "--format", "openai", "--served-model-name", "tiny")
    assert code == 3
    assert [found[i]["custom_id"] for i in range(1, 12)] == list("abcdefghijk")
    assert all(set(f) == {"id", "custom_id", "line", "response", "error"} for f in found.values())
    body = found[1]["response"]["body"]
    assert found[1]["error"] is None
    assert found[1]["response"]["status_code"] == 200
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert len(body["choices"][0]["token_ids"]) == 3
    assert len(found[2]["response"]["body"]["choices"]) == 2
    said = {told["custom_id"]: told["error"]["message"] for told in found.values() if told["error"]}
    assert "chat template" in said["c"]  # the model has none
    assert said["d"].startswith("body: top_p: Input should be less than or equal to 1")
    assert said["e"] == "body: model 'gpt-9' is not here; 'tiny' is"
    assert "has 2 prompts" in said["f"]
    assert "stream is not supported" in said["g"]
    assert "url must be one of" in said["h"]
    assert "not both" in said["i"]
    assert "exactly body, custom_id, method, url" in said["j"]
    assert said["k"] == "body: prompt is missing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "IN"], "--input needs --output"),
        (["--input", "IN", "--output", "IN"], "is input and output at once"),
        (["--input", "no.jsonl", "--output", "o"], "no.jsonl"),
        (["--input", "IN", "--output", "o", "--server", "x:1"], "--model or --server"),
        (["--input", "IN", "--output", "o", "--server-ca", "x"], "need --server"),
        (["--input", "IN", "--output", "o", "--in-flight", "0"], "in_flight must be at least 1"),
        (["--input", "IN", "--output", "o", "--template", "x"], "names no column"),
        (["--input", "IN", "--output", "o", "--temperature", "-1"], "temperature"),
        (["--input", "IN", "--output", "o", "--format", "openai", "--chat"], "native lines"),
        (["--input", "IN", "--output", "o", "--format", "openai", "--seed", "1"], "own sampling"),
        (["--prompt", "x", "--output", "o"], "--output needs --input"),
        (["--prompt", "x", "--template", "{x}"], "--template needs --input"),
    ],
)
def test_a_users_mistake_exits_2_with_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IN.jsonl").write_text('{"prompt": "x"}\n')
    arguments = ["IN.jsonl" if each == "IN" else each for each in arguments]
    assert main(["generate", *MODEL, *arguments]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("loongjax: ")]
    assert message in line
    assert (tmp_path / "IN.jsonl").read_text() == '{"prompt": "x"}\n'


def test_a_prompt_needs_a_model(capsys):
    assert main(["generate", "--prompt", "x"]) == 2
    assert "give --model" in capsys.readouterr().err
