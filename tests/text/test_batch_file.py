"""Prompts from a file: what each gets, runs that are stopped and go on, and files that are not what they should be."""

import json

import pytest

import llorch_jax as lj
from llorch_jax.errors import BatchFileError
from llorch_jax.text import batch_file
from llorch_jax.text.batch_file import generate_file
from llorch_jax.text.timing import Timings

PROMPTS = [
    {"prompt": "The king", "seed": 3},
    {"prompt": "A fox", "seed": 4, "id": "fox"},
    {"prompt": "Once upon a time", "max_new_tokens": 5},
    {"prompt": "The\u2028old woman"},
    {"prompt": "He said"},
]
SETTINGS = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 20}


@pytest.fixture(scope="module")
def model():
    return lj.load("demo")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in PROMPTS), encoding="utf-8")
    return path


def test_each_prompt_gets_what_it_gets_alone(model, source, tmp_path):
    seen = []
    target = tmp_path / "out.jsonl"
    count = generate_file(
        model, source, target, batch_size=2, progress=lambda done, total: seen.append((done, total)), **SETTINGS
    )
    lines = [json.loads(line) for line in target.read_text("utf-8").split("\n")[:-1]]
    assert (count, seen) == (5, [(0, 5), (2, 5), (3, 5), (5, 5)])
    assert [line["prompt"] for line in lines] == [each["prompt"] for each in PROMPTS]
    assert [line["id"] for line in lines] == [None, "fox", None, None, None]
    for line, given in zip(lines, PROMPTS, strict=True):
        own = {name: value for name, value in given.items() if name not in ("prompt", "id")}
        alone = lj.generate(model, given["prompt"], **{**SETTINGS, **own})
        assert (line["text"], line["token_ids"]) == (alone.text, alone.token_ids)


def test_a_run_stopped_anywhere_goes_on_to_the_same_file(model, source, tmp_path, monkeypatch):
    calls = []

    def fake(model, prompts, seed, **settings):
        calls.append(prompts)
        timings = Timings(0, 0, 0, 1)
        return [
            lj.Generation(f"{text}|{each}|{len(prompts)}", [each], "length", [0.0], [1], timings)
            for text, each in zip(prompts, seed, strict=True)
        ]

    monkeypatch.setattr(batch_file, "generate", fake)
    target = tmp_path / "out.jsonl"
    generate_file(model, source, target, batch_size=2, **SETTINGS)
    whole = target.read_bytes()
    for cut in range(len(whole) + 1):
        target.write_bytes(whole[:cut])
        calls.clear()
        assert generate_file(model, source, target, batch_size=2, **SETTINGS) == 5 - whole[:cut].count(b"\n")
        assert target.read_bytes() == whole
    assert not calls
    assert generate_file(model, source, target, batch_size=2, overwrite=True, **SETTINGS) == 5


def test_results_of_other_jobs_are_refused_and_left(model, source, tmp_path, monkeypatch):
    target = tmp_path / "out.jsonl"
    target.write_bytes(b'{"job": "0"}\nhalf')
    with pytest.raises(BatchFileError, match=r"out.jsonl: line 1: expected the result of prompt 1"):
        generate_file(model, source, target, **SETTINGS)
    assert target.read_bytes() == b'{"job": "0"}\nhalf'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r'line 2: expected a JSON object with a text as "prompt"'),
        ("{", r"line 2: expected a JSON object \("),
        ('{"prompt": ""}', r"line 2: expected a prompt and max_new_tokens of at least one token, got 0"),
        (
            '{"prompt": "A", "max_new_tokens": 600}',
            r"line 2: expected .* within the context of 512, got 1",
        ),
        ('{"prompt": "A", "top_p": 2}', r"line 2: top_p: expected"),
        ('{"prompt": "A", "top_q": 2}', r"line 2: .*top_q"),
        ('{"prompt": "A", "seed": "x"}', r"line 2: seed: expected a whole number, got 'x'"),
    ],
)
def test_bad_lines_are_named_before_anything_runs(model, tmp_path, line, message):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' + line)
    with pytest.raises(BatchFileError, match=message):
        generate_file(model, source, target)
    assert not target.exists()


def test_missing_and_unwritable_files(model, source, tmp_path):
    with pytest.raises(BatchFileError, match="expected a readable file"):
        generate_file(model, tmp_path / "none", tmp_path / "out")
    with pytest.raises(BatchFileError, match="expected a file"):
        generate_file(model, source, tmp_path, max_new_tokens=1)
    with pytest.raises(BatchFileError, match="batch_size: expected"):
        generate_file(model, source, tmp_path / "out", batch_size=0)
