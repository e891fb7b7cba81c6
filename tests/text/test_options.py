"""One set of options for every way of generating: what each takes, what it refuses by name, and near names."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from tokenizers import processors

import llorch_jax as lj
from llorch_jax.text.options import KNOWN, SAMPLING, TAKES, GenerationOptions

MODEL = tiny.random_model(n_layer=1, n_embd=16, n_head=1, num_kv_heads=1)
RECITING = tiny.reciting_model("one two three")
PAGE = Path(__file__).parents[2] / "docs" / "options.md"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_tokens", "expected max_new_tokens"),
        ("do_sample", "expected temperature"),
        ("num_return_sequences", "expected n of generate_n"),
        ("eos_token_id", "expected stop_ids"),
        ("temperatur", "did you mean temperature?"),
        ("repetition_penalti", "did you mean repetition_penalty?"),
        ("zzz", "expected one of max_new_tokens, "),
    ],
)
def test_unknown_options_name_the_nearest(name, near):
    for call in (lj.generate, lj.stream, lj.generate_n, lj.generate_speculative):
        with pytest.raises(lj.OptionError, match=re.escape(f"{name}: got an unknown option; {near}")):
            call(MODEL, "a", **{name: 1})


EXAMPLES = {
    "temperature": 0.5,
    "top_k": 5,
    "sampling settings": {"min_p": 0.1},
    "mirostat": {"temperature": 1.0, "mirostat_tau": 4.0},
    "cache layout": {"cache": "int8"},
    "sampler": lj.Greedy(),
    "overflow": "reencode",
    "stop": "b",
    "top_logprobs": 1,
    "constraint": {"choices": ["a"]},
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.1,
    "length_penalty": 0.5,
    "early_stopping": True,
    "penalty_alpha": 0.5,
}


@pytest.mark.parametrize("method", TAKES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_refuses_by_name_what_it_does_not_take(method, name):
    value = EXAMPLES[name]
    options = GenerationOptions.create(**(value if isinstance(value, dict) else {name: value}))
    if {name, *(["temperature"] if name == "mirostat" else [])} <= {*TAKES[method]}:
        options.check_method(method)
        return
    shown = f"({'|'.join(value)})" if isinstance(value, dict) and name != "constraint" else name
    with pytest.raises(lj.OptionError, match=f"{shown}: expected none with {method}, which cannot use it, got"):
        options.check_method(method)


def test_the_page_shows_what_each_method_takes():
    lines = [line for line in PAGE.read_text(encoding="utf-8").split("\n") if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert head[2:] == list(TAKES)
    documented = set()
    for row in rows:
        assert len(row) == len(head)
        names = re.findall(r"`([^`]+)`", row[0])
        documented |= set(names)
        if "object" in row[0]:
            names = ["cache object"]
        elif "layout" in row[0]:
            names = ["cache layout"]
        elif "one per prompt" in row[0]:
            names = [f"{names[0]} per prompt"]
        for method, cell in zip(head[2:], row[2:], strict=True):
            for name in names:
                if name in ("regex", "json_schema", "grammar", "choices"):
                    name = "constraint"
                kind = name
                if name in SAMPLING and name != "top_k":
                    kind = "mirostat" if name.startswith("mirostat") else "sampling settings"
                assert (cell == "yes") == (kind in TAKES[method]), (name, method)
    assert documented == set(KNOWN)


def test_a_custom_sampler():
    keys = lj.Sampling.create(0.7, top_k=5)
    own = lj.generate(MODEL, ["Once", "A"], 8, seed=3, sampler=keys)
    named = lj.generate(MODEL, ["Once", "A"], 8, seed=3, temperature=0.7, top_k=5)
    assert [out.token_ids for out in own] == [out.token_ids for out in named]
    streamed = [piece.token_id for piece in lj.stream(MODEL, "Once", 8, seed=3, sampler=keys)]
    assert streamed == own[0].token_ids
    with pytest.raises(lj.OptionError, match="sampler: expected no top_k with it"):
        lj.generate(MODEL, "a", 2, sampler=keys, top_k=4)
    with pytest.raises(lj.SamplerError, match=r"sampler: expected an object with .*'str'"):
        lj.generate(MODEL, "a", 2, sampler="greedy")


def test_a_prefilled_cache_goes_before_the_prompt():
    first, second = MODEL.tokenizer.encode("Once upon"), MODEL.tokenizer.encode(" a time")

    def prefilled():
        cache = lj.StaticCache.init(MODEL.config, batch_size=1, capacity=64)
        return lj.prefill(MODEL.params, MODEL.config, [first], cache)[1]

    whole = lj.generate(MODEL, "Once upon a time", 8)
    out = lj.generate(MODEL, " a time", 8, cache=prefilled())
    assert (out.token_ids, out.prompt_ids) == (whole.token_ids, second)
    pieces = list(lj.stream(MODEL, " a time", 8, cache=prefilled(), stop="zzz"))
    assert [piece.token_id for piece in pieces] == whole.token_ids


def test_a_wrong_cache_is_told_in_a_short_line():
    other = lj.StaticCache.init(tiny.CONFIG, batch_size=1, capacity=16)
    for wrong in (other, jax.numpy.zeros((50, 50)), {"keys": np.zeros(1000)}, 5, lj.Greedy):
        with pytest.raises(lj.CacheError, match="cache: expected") as error:
            lj.generate(MODEL, "a", 2, cache=wrong)
        assert len(str(error.value)) < 200
    with pytest.raises(lj.OptionError, match=r"cache: expected none with generate_n.*got a StaticCache"):
        lj.generate_n(MODEL, "a", 2, 2, cache=lj.make_cache(MODEL.config, batch_size=2))


def test_default_breakers_of_dry_are_those_of_llama_cpp():
    """A text that repeats across a newline: with the default breakers the repetition costs nothing after it."""
    model = MODEL
    newline = model.tokenizer.encode("\n")[0]
    by_default = GenerationOptions.create(dry_multiplier=1.0).sampler_for(model)
    texts = GenerationOptions.create(dry_multiplier=1.0, dry_breakers=["\n"]).sampler_for(model)
    none = GenerationOptions.create(dry_multiplier=1.0, dry_breakers=[]).sampler_for(model)
    marks = {id for mark in '\n:"*' for id in model.tokenizer.encode(mark)}
    assert set(np.asarray(by_default.more["dry_breakers"]).ravel().tolist()) - {-1} == marks
    assert set(np.asarray(texts.more["dry_breakers"]).ravel().tolist()) - {-1} == {newline}
    assert set(np.asarray(none.more["dry_breakers"]).ravel().tolist()) - {-1} == set()
    with pytest.raises(lj.SamplerError, match="dry_breakers"):
        GenerationOptions.create(dry_multiplier=1.0, dry_breakers=["a", 5])


def test_a_number_of_new_tokens_for_each_prompt():
    prompts = ["Once", "A fox", "x"]
    settings = {"temperature": 1.0, "top_k": 50}
    for method in ({}, {"stop": "zq"}, {"regex": "[a-z]{50}"}):
        if "regex" in method:
            pytest.importorskip("llguidance")
        outs = lj.generate(MODEL, prompts, [3, 60, 1], seed=[1, 2, 3], **settings, **method)
        assert [len(out.token_ids) for out in outs] == [3, 50 if "regex" in method else 60, 1]
        alone = lj.generate(MODEL, "Once", 3, seed=1, **settings, **method)
        assert outs[0].token_ids == alone.token_ids
    groups = lj.generate_n(MODEL, prompts, 2, [3, 5, 1], seed=1)
    assert [[len(out.token_ids) for out in group] for group in groups] == [[3, 3], [5, 5], [1, 1]]
    outs, _ = lj.generate_speculative(MODEL, prompts, [3, 5, 1])
    assert [len(out.token_ids) for out in outs] == [3, 5, 1]
    with pytest.raises(lj.OptionError, match="max_new_tokens: expected one, or 3, one per prompt, got 2"):
        lj.generate(MODEL, prompts, [3, 5])
    with pytest.raises(lj.OptionError, match="max_new_tokens: expected one number with beam search"):
        lj.generate(MODEL, prompts, [3, 5, 1], num_beams=2)
    for search in ({"num_beams": 2}, {"penalty_alpha": 0.5}):
        with pytest.raises(lj.OptionError, match="seed: expected one, or 3, one per prompt, got 2"):
            lj.generate(MODEL, prompts, 3, seed=[1, 2], **search)


def test_a_pinned_capacity_compiles_nothing_for_other_lengths():
    def run(count, new, **options):
        return lj.generate(MODEL, "a" * count, new, cache="static:64", **options).token_ids

    run(3, 4)
    before = lj.compile_count()
    for count, new in ((2, 20), (9, 1), (16, 33), (5, 50)):
        assert run(count, new) == lj.generate(MODEL, "a" * count, new, cache="static:64").token_ids
    assert lj.compile_count() - before <= 3  # one loop for each bucket of the number of new tokens
    again = lj.compile_count()
    for count, new in ((4, 24), (12, 40), (13, 7)):
        run(count, new)
    assert lj.compile_count() - again <= 1
    with pytest.raises(lj.CapacityError, match="32"):
        lj.generate(MODEL, "a" * 20, 20, cache="static:32")


def test_a_codec_for_any_layout():
    plain = lj.generate(MODEL, "Once", 6, cache="int8").token_ids
    assert lj.generate(MODEL, "Once", 6, cache="static", codec="int8").token_ids == plain
    assert len(lj.generate(MODEL, "Once", 6, cache="paged:8", codec="float16", num_beams=2).token_ids) == 6
    with pytest.raises(lj.CacheError, match="codec"):
        lj.generate(MODEL, "Once", 6, codec="int3")


class TestSearches:
    def test_beams_are_those_of_beam_search(self):
        prompts = ["Once", "A fox"]
        ids = [MODEL.tokenizer.encode(prompt) for prompt in prompts]
        tokens = np.zeros((2, 5), np.int32)
        for row, each in zip(tokens, ids, strict=True):
            row[: len(each)] = each
        expected = lj.beam_search(
            MODEL.params, MODEL.config, tokens, 6, num_beams=4, num_return=2, lengths=[len(each) for each in ids]
        )
        best = lj.generate(MODEL, prompts, 6, num_beams=4)
        assert [out.token_ids for out in best] == expected.tokens[:, 0].tolist()
        several = lj.generate_n(MODEL, prompts, 2, 6, num_beams=4, cache="paged:4")
        assert [[out.token_ids for out in group] for group in several] == expected.tokens.tolist()
        for group, scores in zip(several, expected.scores, strict=True):
            sums = [sum(out.logprobs) / 6 for out in group]
            np.testing.assert_allclose(sums, scores, rtol=1e-4)

    def test_a_beam_ends_with_the_text(self):
        out = lj.generate(RECITING, "o", 20, num_beams=2, length_penalty=0.0)
        assert (out.text, out.finish_reason, out.stop_reason) == ("ne two three", "stop", tiny.END_OF_TEXT)

    def test_contrastive_search(self):
        ids = MODEL.tokenizer.encode("Once")
        expected, _ = lj.contrastive_search(MODEL.params, MODEL.config, [ids], 6, top_k=3, penalty_alpha=0.6)
        out = lj.generate(MODEL, "Once", 6, penalty_alpha=0.6, top_k=3)
        assert out.token_ids == expected[0].tolist()
        stopped = lj.generate(RECITING, "o", 20, penalty_alpha=0.1, stop=" three")
        assert (stopped.text, stopped.stop_reason) == ("ne two", " three")
        logits = lj.forward(MODEL.params, MODEL.config, [[*ids, *out.token_ids]])
        logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
        places = range(len(ids) - 1, len(ids) + 5)
        np.testing.assert_allclose(
            out.logprobs, [logprobs[p, id] for p, id in zip(places, out.token_ids, strict=True)], atol=1e-4
        )

    def test_one_beam_is_no_search(self):
        sampled = lj.generate(MODEL, "Once", 6, temperature=1.0, seed=2)
        assert lj.generate(MODEL, "Once", 6, temperature=1.0, seed=2, num_beams=1).token_ids == sampled.token_ids
        for wrong in (0, 2.5, True, 10**9):
            with pytest.raises(lj.LlorchError, match="num_beams: expected a whole number"):
                lj.generate(MODEL, "Once", 6, num_beams=wrong)

    def test_cannot_be_streamed(self):
        with pytest.raises(lj.OptionError, match="num_beams: expected none with sampling"):
            lj.stream(MODEL, "a", 2, num_beams=2)
        with pytest.raises(lj.OptionError, match="temperature: expected none with beam search"):
            lj.generate(MODEL, "a", 2, num_beams=2, temperature=0.5)


class TestWideVocabulary:
    """A model of 320 ids, of which the tokenizer knows 257 and the model likes the others most."""

    model = tiny.random_model(n_layer=1, n_embd=16, n_head=1, num_kv_heads=1, vocab_size=320)
    weights = model.params.wte
    params = model.params.replace(wte=weights.at[257:].set(50 * weights[:63]))

    @pytest.fixture
    def wide(self):

        return dataclasses.replace(self.model, params=self.params)

    def test_the_model_would_say_unknown_ids(self, wide):
        tokens, _ = lj.generate_tokens(wide.params, wide.config, [wide.tokenizer.encode("Once")], 8)
        assert np.max(tokens) > 256

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"temperature": 1.0, "top_k": 50},
            {"stop": "zzz"},
            {"num_beams": 3},
            {"penalty_alpha": 0.6},
            {"sampler": lj.Greedy()},
        ],
        ids=str,
    )
    def test_none_is_ever_drawn(self, wide, options):
        for out in lj.generate(wide, ["Once", "A"], 8, **options):
            assert max(out.token_ids) < 257
            assert out.text == wide.tokenizer.decode(out.token_ids)

    @pytest.mark.parametrize("options", [{"num_beams": 258}, {"penalty_alpha": 1.0, "top_k": 258}], ids=str)
    def test_a_search_wider_than_the_known_ids_is_refused(self, wide, options):
        with pytest.raises(lj.SearchError, match=r"(num_beams|top_k): expected a whole number in 1 .. 257, got 258"):
            lj.generate(wide, "Once", 2, **options)

    def test_none_is_drawn_by_other_methods(self, wide):
        outs = [*lj.generate_n(wide, "Once", 2, 8), lj.generate_speculative(wide, "Once", 8)[0]]
        draft = lj.generate_speculative(wide, "Once", 8, draft=wide, temperature=1.0)[0]
        assert max(id for out in [*outs, draft] for id in out.token_ids) < 257
        assert all(piece.token_id < 257 for piece in lj.stream(wide, "Once", 8))


def test_a_begin_of_text_token_comes_before_prompts_but_not_after_a_cache():
    backend = tokenizers.Tokenizer.from_str(MODEL.tokenizer.to_json())
    template = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tiny.END_OF_TEXT)]
    )
    backend.post_processor = processors.Sequence([template])
    model = dataclasses.replace(MODEL, tokenizer=lj.Tokenizer(backend))
    plain = model.tokenizer.encode("Once")
    assert lj.generate(model, "Once", 4).prompt_ids == [tiny.END_OF_TEXT, *plain]
    empty = lj.make_cache(model.config)
    assert lj.generate(model, "Once", 4, cache=empty).prompt_ids == [tiny.END_OF_TEXT, *plain]
    _, filled = lj.prefill(model.params, model.config, [plain], lj.make_cache(model.config))
    assert lj.generate(model, "Once", 4, cache=filled).prompt_ids == plain
