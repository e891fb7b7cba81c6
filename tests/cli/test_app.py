"""The command line: what is printed, exit codes, and errors in one line."""

import io
import json
import os
import re
import sys

import jax
import numpy as np
import pytest
import tiny

import llorch_jax as lj
from llorch_jax import kernels
from llorch_jax.cli import app, loading, models

PROMPT = "Once"


@pytest.fixture(scope="module")
def model():
    return tiny.random_model(bos_token_id=tiny.END_OF_TEXT)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A directory with the tiny model."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    lj.save_model(path, model.config, model.params, model.tokenizer)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(loading, "enable_compilation_cache", lambda: None)  # a setting of the whole process

    def command(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = app.run([*map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def check_error(result, message, code=1):
    """One line on standard error that matches, and nothing else."""
    assert (result[0], result[1]) == (code, "")
    assert re.fullmatch(r"error: [^\n]*\n", result[2]), result[2]
    assert re.search(message, result[2]), result[2]


class TestGenerate:
    def test_prints_the_text_of_generate(self, run, model, folder):
        expected = lj.generate(model, PROMPT, 12, temperature=0.9, top_k=50, top_p=0.9, seed=5).text
        arguments = ["generate", PROMPT, "-m", folder, "-n", 12, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.9]
        streamed = run(*arguments, "--seed", 5)
        assert streamed == (0, PROMPT + expected + "\n", "")
        assert run(*arguments, "--seed", 5, "--no-stream") == streamed
        assert run(*arguments, "--seed", 6)[1] != streamed[1]

    def test_json(self, run, model, folder):
        code, out, err = run("generate", PROMPT, "-m", folder, "-n", 12, "--temperature", 0.8, "--seed", 5, "--json")
        fields, expected = json.loads(out), lj.generate(model, PROMPT, 12, temperature=0.8, seed=5)
        assert (code, err, out.count("\n")) == (0, "", 1)
        assert set(fields.pop("timings")) == {"compile", "prefill", "decode", "new_tokens", "ms_per_token"}
        assert fields.pop("logprobs") == pytest.approx(expected.logprobs, abs=1e-4)
        assert fields == {
            "prompt": PROMPT,
            "text": expected.text,
            "token_ids": expected.token_ids,
            "finish_reason": "length",
            "prompt_ids": expected.prompt_ids,
            "stop_reason": None,
            "top_logprobs": None,
        }

    def test_reads_standard_input(self, run, folder):
        given = run("generate", "été", "-m", folder, "-n", 4)
        assert run("generate", "-", "-m", folder, "-n", 4, stdin="été".encode()) == given
        assert given[1].startswith("été")

    def test_timings_go_to_standard_error(self, run, folder):
        code, out, err = run("generate", PROMPT, "-m", folder, "-n", 4, "--timings")
        assert (code, out) == run("generate", PROMPT, "-m", folder, "-n", 4)[:2]
        number = r"\d+\.\d+"
        line = rf"load {number} s, compile {number} s, prefill {number} ms, {number} ms/token over 4 tokens\n"
        assert re.fullmatch(line, err)

    def test_constraints(self, run, folder, tmp_path):
        pytest.importorskip("llguidance")
        schema = tmp_path / "schema.json"
        schema.write_text('{"enum": ["grün", 12]}', encoding="utf-8")
        options = {
            "--regex": ("[xyz]{3}[0-9]", "[xyz]{3}[0-9]"),
            "--json-schema": (schema, '"grün"|12'),
            "--grammar": ('root ::= "a" | "bc"', "a|bc"),
        }
        for option, (given, pattern) in options.items():
            code, out, err = run("generate", PROMPT, "-m", folder, "-n", 12, option, given)
            assert (code, err) == (0, "")
            assert re.fullmatch(f"{PROMPT}({pattern})\n", out)
        assert run("generate", PROMPT, "-m", folder, "-n", 12, "--json-schema", schema.read_text("utf-8"))[0] == 0
        result = run("generate", PROMPT, "-m", folder, "--json-schema", tmp_path / "none.json")
        check_error(result, r"--json-schema: expected the JSON of a schema .* \(No such file")

    def test_speculation_gives_the_same_text_and_tells_what_the_guesses_were_good_for(self, run, folder):
        arguments = ["generate", "abcabcabc", "-m", folder, "-n", 12, "--temperature", 0]
        plain = run(*arguments)
        for more in (["--speculative", "lookup"], ["--draft", folder]):
            code, out, err = run(*arguments, *more)
            assert (code, out) == plain[:2]
            assert re.fullmatch(r"guesses: \d+% of \d+ accepted, \d\.\d\d tokens per step over \d+ steps\n", err)
        check_error(run(*arguments, "--speculative", "lookup", "--overflow", "reencode"), "--overflow")

    def test_searches(self, run, model, folder):
        found = run("generate", PROMPT, "-m", folder, "-n", 6, "--beams", 2, "--length-penalty", 0.5)
        assert found == (0, PROMPT + lj.generate(model, PROMPT, 6, num_beams=2, length_penalty=0.5).text + "\n", "")
        found = run("generate", PROMPT, "-m", folder, "-n", 6, "--contrastive-alpha", 0.6)
        assert found == (0, PROMPT + lj.generate(model, PROMPT, 6, penalty_alpha=0.6).text + "\n", "")

    def test_options_with_texts_and_ids(self, run, model, folder):
        tokenizer = model.tokenizer
        common = ["generate", PROMPT, "-m", folder, "-n", 8, "--temperature", 0]
        plain = lj.generate(model, PROMPT, 8)
        banned = tokenizer.decode(plain.token_ids[:1])
        forced = tokenizer.encode("X")[0]
        expected = lj.generate(
            model,
            PROMPT,
            8,
            logit_bias={plain.token_ids[1]: -100.0},
            bad_words=[tokenizer.encode(banned), tokenizer.encode(" " + banned)],
            forced_tokens=[forced],
        )
        more = ["--logit-bias", f"{plain.token_ids[1]}=-100", "--bad-word", banned, "--forced-token", forced]
        assert run(*common, *more) == (0, PROMPT + expected.text + "\n", "")
        assert expected.text != plain.text


class TestOtherCommands:
    def test_score(self, run, model, folder):
        expected = lj.score(model, "Once upon")
        code, out, err = run("score", "Once upon", "-m", folder)
        assert (code, err) == (0, "")
        assert out.splitlines() == [
            f"perplexity {expected.perplexity:.4f}",
            f"bits_per_byte {expected.bits_per_byte:.4f}",
            f"logprob {expected.total:.4f}",
        ]
        fields = json.loads(run("score", "-", "-m", folder, "--json", stdin=b"Once upon")[1])
        assert fields == {
            "perplexity": expected.perplexity,
            "bits_per_byte": expected.bits_per_byte,
            "logprob": expected.total,
            "token_ids": expected.token_ids,
            "logprobs": expected.logprobs,
            "num_bytes": 9,
        }

    def test_an_infinite_perplexity_is_null_in_json(self, run, folder, monkeypatch):
        hopeless = lj.Score(token_ids=[1, 2], logprobs=[0.0, -1e6], num_bytes=2)
        monkeypatch.setattr(models, "score", lambda *arguments, **settings: hopeless)
        fields = json.loads(run("score", "ab", "-m", folder, "--json")[1], parse_constant=pytest.fail)
        assert fields["perplexity"] is None

    def test_inspect_says_which_kernels_run(self, run):
        code, out, _ = run("inspect", "--kernels")
        isa = kernels.describe().isa
        assert code == 0
        assert out.startswith(f"native kernels: {isa or 'none'}, ")

    def test_inspect_needs_no_weights(self, run, model, tmp_path):
        folder = tmp_path / "[bold]"  # not to be taken for markup
        lj.save_model(folder, model.config, model.params)
        (folder / "model.safetensors").unlink()
        code, out, err = run("inspect", folder)
        assert (code, err) == (0, "")
        assert "[bold]" in out
        assert re.search(r"n_embd *│ *32 ", out)
        assert f"parameters: {lj.count_params(model.params):,};" in out
        cache = lj.StaticCache.init(model.config).memory_usage()
        assert f"static cache: {cache:,} bytes per sequence of up to 64 tokens" in out

    def test_weights_in_low_precision(self, run, folder):
        small = lj.load(folder, weights="int8", group_size=32)
        options = ["-m", folder, "--weights", "int8", "--group-size", 32]
        found = run("generate", PROMPT, "-n", 8, *options)
        assert found == (0, PROMPT + lj.generate(small, PROMPT, 8).text + "\n", "")
        assert f"perplexity {lj.score(small, 'Once upon').perplexity:.4f}" in run("score", "Once upon", *options)[1]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
        assert re.search(rf"; {size:,} bytes.* in int8", run("inspect", folder, *options[2:])[1])
        check_error(run("generate", PROMPT, "-m", folder, "--weights", "int3"), "error: --weights: expected one of")
        check_error(run("generate", PROMPT, "-m", folder, "--group-size", 32), "error: --group-size")

    def test_bench(self, run, folder):
        arguments = ["bench", folder, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2, "--batch", 2]
        code, out, err = run(*arguments)
        assert (code, err) == (0, "")
        number = r"[\d,]+\.\d\d"
        assert re.search(rf"prefill, 2 x 8 tokens *│ {number} ms *│ {number} to {number} ms *│ [\d,]+", out)
        assert re.search(r"decode step, 2 x 1 token *│", out)
        assert re.search(r"2 measurements on \d+ cores?\n", out)
        fields = json.loads(run(*arguments, "--json")[1])
        assert len(fields["step"]) == 2
        check_error(run("bench", folder, "--new-tokens", 1), "error: --new-tokens: expected a whole number in 2")

    def test_bench_counts_the_cores_that_the_process_may_use(self, run, folder, monkeypatch):
        arguments = ["bench", folder, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 2]
        for allowed, shown in (({0}, "1 core"), ({1, 4, 5}, "3 cores")):
            monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed, raising=False)
            assert run(*arguments)[1].endswith(f"2 measurements on {shown}\n")

    def test_convert(self, run, folder, tmp_path):
        assert run("convert", folder, tmp_path / "new") == (0, f"wrote {tmp_path / 'new'}\n", "")
        generated = [run("generate", PROMPT, "-m", source, "-n", 12) for source in (folder, tmp_path / "new")]
        assert generated[0] == generated[1]
        check_error(run("convert", folder, tmp_path / "new", "--dtype", "bfloat16"), "give --overwrite to replace it")
        assert run("convert", folder, tmp_path / "new", "--dtype", "float32", "--overwrite")[0] == 0
        assert run("convert", folder, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "new")]
        assert sizes[0] < 0.6 * sizes[1]


@pytest.fixture(scope="module")
def arrays(model):
    tokens = np.asarray([[1, 2, 3]], np.int32)
    found = lj.intermediates(model.params, model.config, tokens, temperature=0.5, new_tokens=3)
    return {"tokens": tokens, **{name: np.asarray(value) for name, value in found.items()}}


class TestValidate:
    def rows(self, out):
        """Number and verdict of each row of the table."""
        return re.findall(r"^│ *(\d+) .*│ (\S[^│]*?) *│$", out, re.MULTILINE)

    def write(self, folder, arrays):
        np.savez(folder / "reference.npz", **arrays)
        (folder / "reference.json").write_text('{"parameters": {"temperature": 0.5}}')
        return folder / "reference.npz"

    def test_passes(self, run, folder, arrays, tmp_path):
        code, out, err = run("validate", folder, "--reference", self.write(tmp_path, arrays))
        assert (code, err) == (0, "")
        assert self.rows(out) == [(str(number), "pass") for number in range(1, 13)]

    def test_tells_the_point_that_fails(self, run, folder, arrays, tmp_path):
        changed = {
            **arrays,
            "06_mlp_out": arrays["06_mlp_out"] + np.float32(2e-4),
            "10_argmax": arrays["10_argmax"][:0],
        }
        code, out, err = run("validate", folder, "-r", self.write(tmp_path, changed))
        assert (code, err) == (1, "")
        failed = {"6": "FAIL", "10": "FAIL 10_argmax: expected shape (0,), got (1,)"}
        assert self.rows(out) == [(str(number), failed.get(str(number), "pass")) for number in range(1, 13)]
        assert re.search(r"2\.00e-04 *│ *1e-04", out)

    def test_a_reference_without_values(self, run, folder, arrays, tmp_path):
        only = {"tokens": arrays["tokens"], "12_greedy": np.zeros((), np.int32)}
        code, out, _ = run("validate", folder, "-r", self.write(tmp_path, only))
        assert code == 1
        assert all(verdict.startswith("FAIL") for _, verdict in self.rows(out))

    def test_no_reference(self, run, folder, tmp_path):
        check_error(run("validate", folder, "-r", tmp_path / "none.npz"), r"none\.npz: cannot be read")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--model", "no/such/directory"], "'no/such/directory' is no such directory"),
            (["-n", "64"], "n_positions=64 per row, got 67"),
            (["-n", "0"], "error: --max-new-tokens: .* got 0"),
            (["-n", "2147483649"], "error: --max-new-tokens: .* got 2147483649"),
            (["-n", "2147483649", "--overflow", "reencode"], "error: --max-new-tokens: .* got 2147483649"),
            (["--beams", "2", "--temperature", "1"], "error: --temperature: expected none with beam search"),
            (["--choice", "a", "--stop", "b"], "error: --stop: expected none"),
            (["--temperature", "-1"], r"error: --temperature: expected 0, .* got -1\.0"),
            (["--temperature", "0", "--top-k", "-2"], "error: --top-k: .* got -2"),
            (["--top-p", "1.5"], r"error: --top-p: .* got 1\.5"),
            (["--logit-bias", "x=1"], "error: --logit-bias: expected ID=X, .* got x=1"),
            (["--grammar", "none.lark"], "error: --grammar: expected .*; none.lark: cannot be read"),
        ],
    )
    def test_bad_input(self, run, folder, arguments, message):
        for mode in ("--stream", "--no-stream"):
            check_error(run("generate", PROMPT, "-m", folder, *arguments, mode), message)

    def test_bad_texts(self, run, folder):
        check_error(run("generate", "", "-m", folder), "at least one token, got an empty text")
        check_error(run("generate", "-", "-m", folder, stdin=b"\xff"), "standard input: expected utf-8 text")
        check_error(run("score", "", "-m", folder), "at least 1 tokens to score")
        check_error(
            run("score", "abc", "-m", folder, "--stride", 65), r"stride: expected a whole number in 1 \.\. 64, got 65"
        )

    def test_a_seed_of_any_size(self, run, folder):
        assert run("generate", PROMPT, "-m", folder, "-n", 4, "--seed", 2**70)[0] == 0

    def test_directories(self, run, folder, tmp_path):
        check_error(run("inspect", tmp_path), r"config\.json: missing")
        check_error(run("inspect", folder, "--cache", "paged:1000"), "page-size: expected")
        check_error(run("convert", folder, tmp_path / "new", "--dtype", "int8"), "dtype: expected one of .*'int8'")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["generate"],
            ["generate", PROMPT, "--no-such-option"],
            ["generate", PROMPT, "-n", "many"],
            ["generate", PROMPT, "--top-logprobs", "2"],
            ["generate", PROMPT, "--draft", "demo", "--speculative", "lookup"],
            ["generate", PROMPT, "--batch-size", "2"],
            ["generate", PROMPT, "--overwrite"],
            ["generate", "--file", "prompts.jsonl", "--out", "out.jsonl", "--json"],
            ["generate", "--file", "prompts.jsonl", "--out", "out.jsonl", "--timings"],
            ["no-such-command"],
            ["validate", "demo"],
        ],
    )
    def test_wrong_usage(self, run, arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert "Usage: " in err


def test_prompts_from_a_file(run, folder, tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "One", "max_new_tokens": 4}\n{"prompt": "Two"}\n')
    arguments = ["generate", "-m", folder, "--file", source, "--out", target, "-n", 5, "--seed", 2]
    code, out, err = run(*arguments)
    assert (code, out) == (0, "")
    assert err.startswith("continued 2 prompts")
    first = target.read_text("utf-8")
    assert [json.loads(line)["line"] for line in first.splitlines()] == [1, 2]
    assert run(*arguments)[2].startswith("continued 0 prompts")
    assert target.read_text("utf-8") == first
    assert run("generate", "--file", source)[0] == 2
