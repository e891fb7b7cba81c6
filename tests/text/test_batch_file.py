"""Prompts from a file: what each gets, runs that are stopped and go on, and files that are not what they should be."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import pytest
import tiny

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
def model(short_demo):
    return lj.load(short_demo)


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


def test_ids_of_a_logit_bias_are_texts_as_json_has_them(tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once", "logit_bias": {"65": 1000}}')
    generate_file(tiny.random_model(), source, target, max_new_tokens=3, logit_bias={66: 500})
    assert json.loads(target.read_text("utf-8"))["token_ids"] == [65] * 3


def test_a_run_stopped_anywhere_resumes_to_the_same_file(model, source, tmp_path, monkeypatch):
    calls = []

    def fake(model, prompts, options):
        calls.append(prompts)
        timings = Timings(0, 0, 0, 1)
        return [
            lj.Generation(f"{text}|{seed}|{len(prompts)}", [seed], "length", [0.0], [1], timings)
            for text, seed in zip(prompts, options.seed, strict=True)
        ]

    monkeypatch.setattr(batch_file, "continue_texts", fake)
    monkeypatch.setattr(batch_file, "fingerprint", lambda params, config: "of this model")  # takes a while
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


def test_results_of_other_weights_are_refused_and_left(model, source, tmp_path):
    target = tmp_path / "out.jsonl"
    generate_file(model, source, target, **SETTINGS)
    whole = target.read_bytes()
    target.write_bytes(whole[: whole.index(b"\n") + 1])  # the run was stopped after its first result
    other = dataclasses.replace(model, params=lj.quantize(model.params, "bfloat16"))
    with pytest.raises(BatchFileError, match=r"out.jsonl: line 1: expected the result of prompt 1"):
        generate_file(other, source, target, **SETTINGS)
    renamed = dataclasses.replace(model, name="elsewhere")
    assert generate_file(renamed, source, target, **SETTINGS) == 4
    assert target.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r'line 2: expected a JSON object with a text as "prompt"'),
        ("{", r"line 2: expected a JSON object \("),
        ('{"prompt": ""}', r"line 2: prompt 0: expected at least one token"),
        ('{"prompt": "A", "max_new_tokens": 600}', r"line 2: prompt and .* within the context of 512, got 1 and 600"),
        ('{"prompt": "A", "max_new_tokens": 0}', r"line 2: max_new_tokens: expected"),
        ('{"prompt": "A", "max_new_tokens": 20, "cache": "rotating"}', r"line 2: .*expected"),
        ('{"prompt": "A", "cache": "nine"}', r"line 2: cache: expected .*'nine'"),
        ('{"prompt": "A", "cache": 5}', r"line 2: cache: expected .*got a int"),
        ('{"prompt": "A", "overflow": "wrap"}', r"line 2: overflow: expected"),
        ('{"prompt": "A", "stop": [""]}', r"line 2: stop: expected"),
        ('{"prompt": "A", "stop": 1}', r"line 2: stop: expected"),
        ('{"prompt": "A", "stop_ids": [99999]}', r"line 2: stop_ids: expected ids"),
        ('{"prompt": "A", "stop_ids": ["a"]}', r"line 2: stop_ids: expected whole numbers"),
        ('{"prompt": "A", "bad_words": [[99999]]}', r"line 2: bad_words: expected ids"),
        ('{"prompt": "A", "temperature": [0.5, 0.7]}', r"line 2: temperature: expected one value, got 2"),
        ('{"prompt": "A", "min_p": [0.5, 0.7]}', r"line 2: min_p: expected one value, got 2"),
        ('{"prompt": "A", "top_logprobs": 99999}', r"line 2: top_logprobs: expected"),
        ('{"prompt": "A", "seed": [1]}', r"line 2: seed: expected one whole number"),
        ('{"prompt": "A", "id": "\\ud800"}', r"line 2: 'id': expected text that UTF-8 can encode"),
        ('{"prompt": "A", "id": 1e999}', r"line 2: id: expected finite numbers"),
        ('{"prompt": "A", "\\ud800": 1}', r"line 2: .*UTF-8"),
        ('{"prompt": "\\udfff"}', r"line 2: 'prompt': expected text that UTF-8"),
        ('{"prompt": "A", "seed": ' + "9" * 5000 + "}", r"line 2: expected .* number of too many digits"),
        ('{"prompt": "A", "id": ' + "[" * 100000 + "]" * 100000 + "}", r"line 2: expected .* nested too deeply"),
        ('{"prompt": "A", "regex": "(a"}', r"line 2: regex: "),
        ('{"prompt": "A", "constraint": {"a": 1}}', r"line 2: constraint: expected one Constraint with a file"),
        ('{"prompt": "A", "num_beams": 2, "top_k": 5}', r"line 2: top_k: expected none with beam search"),
        ('{"prompt": "A", "num_beams": "x"}', r"line 2: num_beams: expected a whole number"),
        ('{"prompt": "A", "num_beams": 4, "num_beam_groups": 3}', r"line 2: num_beam_groups: expected a divisor"),
        ('{"prompt": "A", "num_beams": 4, "length_penalty": "x"}', r"line 2: length_penalty: expected a finite number"),
        ('{"prompt": "A", "num_beams": 4, "early_stopping": 2}', r"line 2: early_stopping: expected"),
        ('{"prompt": "A", "penalty_alpha": 2}', r"line 2: penalty_alpha: expected a finite number from 0 to 1"),
        (
            '{"prompt": "A", "penalty_alpha": 0.5, "top_k": 99999}',
            r"line 2: top_k: expected a whole number in 1 ",
        ),
        ('{"prompt": "A", "codec": "int3"}', r"line 2: codec: expected"),
        ('{"prompt": "A", "residual": -1}', r"line 2: residual: expected"),
        ('{"prompt": "A", "max_new_tokens": [3]}', r"line 2: max_new_tokens: expected one whole number"),
        ('{"prompt": "A", "cache": "static:8"}', r"line 2: prompt and max_new_tokens: .* within the context of 8"),
        ('{"prompt": "A", "sampler": "greedy"}', r"line 2: sampler: expected an object"),
        ('{"prompt": "A", "top_p": 2}', r"line 2: top_p: expected"),
        ('{"prompt": "A", "logit_bias": {"07": 1}}', r"line 2: logit_bias: expected ids as keys, got '07'"),
        ('{"prompt": "A", "logit_bias": {"7": "x"}}', r"line 2: logit_bias: expected a number for the id 7, got 'x'"),
        ('{"prompt": "A", "num_beams": 4096, "max_new_tokens": 9, "length_penalty": -99}', r"line 2: length_penalty: "),
        ('{"prompt": "A", "penalty_alpha": 1' + "0" * 400 + "}", r"line 2: penalty_alpha: expected a finite number"),
        ('{"prompt": "A", "top_q": 2}', r"line 2: top_q: got an unknown option; did you mean top_"),
        ('{"prompt": "A", "seed": "x"}', r"line 2: seed: expected a whole number, got 'x'"),
    ],
)
def test_bad_lines_are_named_before_anything_runs(model, tmp_path, line, message):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "Once"}\n' + line)
    with pytest.raises(BatchFileError, match=message):
        generate_file(model, source, target)
    assert not target.exists()


@pytest.mark.parametrize(
    "content", [b"all my notes", b"one\ntwo\n", b'{"jo', b'{"job": "0123456789abcdef", "li', b"\n", b"\xff"]
)
def test_only_a_half_written_result_of_this_job_is_cut(model, source, tmp_path, content):
    target = tmp_path / "notes.txt"
    target.write_bytes(content)
    if content == b'{"jo':  # the start of any result
        assert generate_file(model, source, target, **SETTINGS) == 5
        return
    with pytest.raises(BatchFileError, match=r"notes.txt: line [12]: expected the result of prompt"):
        generate_file(model, source, target, **SETTINGS)
    assert target.read_bytes() == content


def test_the_prompts_are_no_target(model, source, tmp_path):
    before = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for target in (source, tmp_path / "link", tmp_path / "hard"):
        for overwrite in (False, True):
            with pytest.raises(BatchFileError, match="expected another file than that of the prompts"):
                generate_file(model, source, target, overwrite=overwrite, **SETTINGS)
    assert source.read_bytes() == before


def test_only_regular_files_are_written(model, source, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for target in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(BatchFileError, match="expected a regular file or none"):
            generate_file(model, source, target, overwrite=True, **SETTINGS)
    with pytest.raises(BatchFileError, match="expected a regular file"):
        generate_file(model, tmp_path / "fifo", tmp_path / "out")


def test_constraints_and_searches_in_lines_and_for_all(model, tmp_path):
    pytest.importorskip("llguidance")
    lines = [{"regex": "[a-c]{3}"}, {}, {"choices": ["yes", "no"]}, {"regex": None}, {"num_beams": 2, "regex": None}]
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": "Once", **line}) for line in lines))
    generate_file(model, source, target, max_new_tokens=4, regex="[0-9]{2}")
    texts = [json.loads(line)["text"] for line in target.read_text().splitlines()]
    assert re.fullmatch("[a-c]{3}", texts[0])
    assert re.fullmatch("[0-9]{2}", texts[1])
    assert texts[2] in ("yes", "no")
    assert texts[3] == lj.generate(model, "Once", 4).text
    assert texts[4] == lj.generate(model, "Once", 4, num_beams=2).text


def test_options_that_no_file_has_are_refused(model, source, tmp_path):
    cache = lj.make_cache(model.config, "static")
    for options in ({"sampler": lj.Greedy()}, {"cache": cache}):
        with pytest.raises(lj.OptionError, match="with a file of prompts"):
            generate_file(model, source, tmp_path / "out", **options)


def test_a_full_disk_is_one_line_and_the_next_run_resumes(model, source, tmp_path, monkeypatch):
    generate_file(model, source, tmp_path / "whole", batch_size=2, **SETTINGS)
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    target = tmp_path / "out"
    with pytest.raises(BatchFileError, match=r"out: expected a file that can be written \(No space left on device\)"):
        generate_file(model, source, target, batch_size=2, **SETTINGS)
    monkeypatch.undo()
    target.write_bytes(target.read_bytes()[:-7])  # as much as the disk had room for
    assert 0 < generate_file(model, source, target, batch_size=2, **SETTINGS) < 5
    assert target.read_bytes() == (tmp_path / "whole").read_bytes()


def test_missing_and_unwritable_files(model, source, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for name, message in (("none", "cannot be read"), ("x" * 300, "cannot be read"), ("fifo", "got a pipe")):
        with pytest.raises(BatchFileError, match=message):
            generate_file(model, tmp_path / name, tmp_path / "out")
    with pytest.raises(BatchFileError, match="expected a file"):
        generate_file(model, source, tmp_path, max_new_tokens=1)
    with pytest.raises(BatchFileError, match="batch_size: expected"):
        generate_file(model, source, tmp_path / "out", batch_size=0)
