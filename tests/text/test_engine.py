"""The engine as its users see it: texts, handles, threads, event loops, refusals."""

import asyncio
import dataclasses
import threading
import time

import jax
import numpy as np
import pytest
from tiny import random_model

import llorch_jax as lj

PROMPT = "the cat"


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def engine(model):
    with lj.Engine(model, slots=2, page_size=8) as engine:
        yield engine


def same(got, wanted):
    assert (got.text, got.token_ids) == (wanted.text, wanted.token_ids)
    assert (got.finish_reason, got.stop_reason) == (wanted.finish_reason, wanted.stop_reason)
    assert got.prompt_ids == wanted.prompt_ids
    assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2, "seed": 5},
        {"stop_ids": [101]},
        {"top_logprobs": 2},
        {"dry_multiplier": 0.8, "min_new_tokens": 4},
    ],
)
def test_a_result_is_that_of_generate(model, engine, options):
    handle = engine.submit(PROMPT, max_new_tokens=9, **options)
    got = handle.result(60)
    wanted = lj.generate(model, PROMPT, max_new_tokens=9, **options)
    same(got, wanted)
    assert "".join(piece.text for piece in handle) == wanted.text
    if options.get("top_logprobs"):
        assert [[id for id, _ in top] for top in got.top_logprobs] == [[id for id, _ in t] for t in wanted.top_logprobs]


def test_bytes_are_no_prompt(engine):
    with pytest.raises(lj.OptionError, match="prompt: expected a text or a list of token ids, got a bytes"):
        engine.submit(b"the cat")


@pytest.mark.parametrize("sample", [1, 2**31 - 1])
def test_a_sample_of_any_number_is_drawn_at_once(model, engine, sample):
    got = engine.submit(PROMPT, max_new_tokens=9, temperature=0.9, seed=3, sample=sample).result(60)
    ids, keys = model.tokenizer.encode(PROMPT), jax.random.fold_in(jax.random.key(3), sample)[None]
    wanted, _ = lj.generate_tokens(model.params, model.config, [ids], 9, sampler=lj.Sampling.create(0.9), key=keys)
    assert got.token_ids == wanted[0].tolist()


def test_a_stop_string_ends_the_text(model, engine):
    whole = lj.generate(model, PROMPT, max_new_tokens=12)
    stop = whole.text[4:6]
    same(
        engine.submit(PROMPT, max_new_tokens=12, stop=stop).result(60),
        lj.generate(model, PROMPT, max_new_tokens=12, stop=stop),
    )


def test_samples_are_those_of_generate_n(model, engine):
    wanted = lj.generate_n(model, PROMPT, n=2, max_new_tokens=5, temperature=1.0, seed=7)
    handles = [engine.submit(PROMPT, max_new_tokens=5, temperature=1.0, seed=7, sample=i) for i in range(2)]
    assert [handle.result(60).text for handle in handles] == [each.text for each in wanted]


def test_a_prompt_may_be_token_ids(model, engine):
    ids = model.tokenizer.encode(PROMPT)
    assert (
        engine.submit(ids, max_new_tokens=3).result(60).token_ids
        == engine.submit(PROMPT, max_new_tokens=3).result(60).token_ids
    )


def test_many_threads_and_an_event_loop_read_at_once(model, engine):
    prompts = [f"{PROMPT} {n}" for n in range(6)]
    wanted = [lj.generate(model, prompt, max_new_tokens=6).text for prompt in prompts]
    found = {}

    def read(number):
        found[number] = "".join(piece.text for piece in engine.submit(prompts[number], max_new_tokens=6))

    async def gather():
        handles = [engine.submit(prompt, max_new_tokens=6) for prompt in prompts]

        async def text(handle):
            return "".join([piece.text async for piece in handle])

        return await asyncio.gather(*map(text, handles)), (await handles[0].wait()).text

    threads = [threading.Thread(target=read, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    texts, first = asyncio.run(gather())
    for thread in threads:
        thread.join()
    assert texts == wanted
    assert first == wanted[0]
    assert [found[n] for n in range(6)] == wanted


def test_a_cancelled_handle_raises_after_its_pieces_and_holds_nothing(engine):
    handle = engine.submit(PROMPT, max_new_tokens=50)
    pieces = iter(handle)
    next(pieces)
    handle.cancel()
    with pytest.raises(lj.EngineError, match="cancelled"):
        handle.result(60)
    with pytest.raises(lj.EngineError, match="cancelled"):
        list(pieces)
    stats = engine.stats()
    assert (stats.running, stats.pages.held) == (0, 0)
    handle.cancel()
    assert engine.stats().cancelled == stats.cancelled


def test_a_handle_read_by_a_cancelled_task_can_be_read_again(engine):
    handle = engine.submit(PROMPT, max_new_tokens=6)

    async def start_and_stop():
        async for _ in handle:
            return

    asyncio.run(start_and_stop())
    assert handle.result(60).finish_reason == "length"


def test_a_timeout_leaves_the_request_alone(engine):
    handle = engine.submit(PROMPT, max_new_tokens=40)
    with pytest.raises(TimeoutError, match="expected one within"):
        handle.result(timeout=0.0)
    assert len(handle.result(60).token_ids) == 40


def test_a_prefix_hit_is_counted(engine):
    text = "a" * 40
    engine.submit(text, max_new_tokens=1).result(60)
    before = engine.stats()
    engine.submit(text + "b", max_new_tokens=1).result(60)
    after = engine.stats()
    assert after.cached_tokens - before.cached_tokens == 40
    assert 0 < after.hit_rate < 1
    engine.submit(text + "b", max_new_tokens=1, cache_salt="other").result(60)
    assert engine.stats().cached_tokens == after.cached_tokens


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"regex": "a+", "stop": "b"}, lj.OptionError, "stop: expected none with constrained generation"),
        ({"num_beams": 2}, lj.OptionError, "num_beams: expected none with the engine"),
        ({"penalty_alpha": 0.5}, lj.OptionError, "penalty_alpha: expected none with the engine"),
        ({"cache": "int8"}, lj.OptionError, "cache: expected none with the engine"),
        ({"codec": "int8"}, lj.OptionError, "codec: expected none with the engine"),
        ({"overflow": "reencode"}, lj.OptionError, "overflow: expected none with the engine"),
        ({"sampler": lj.Greedy()}, lj.OptionError, "sampler: expected none with the engine"),
        ({"mirostat_tau": 4.0, "temperature": 1.0}, lj.OptionError, "mirostat_tau: expected none with the engine"),
        ({"temperature": [0.5]}, lj.SamplerError, "temperature"),
        ({"max_new_tokens": [3]}, lj.OptionError, "max_new_tokens: expected one number with the engine"),
        ({"seed": [3]}, lj.OptionError, "seed: expected one number with the engine"),
        ({"max_new_tokens": 100}, lj.CapacityError, "within the context of 64, got 7 and 100"),
        ({"top_logprobs": 21}, lj.OptionError, r"top_logprobs: expected 0 \.\. 20"),
        ({"logit_bias": {999: 1.0}}, lj.SamplerError, "logit_bias: expected ids in 0"),
        ({"priority": 1.5}, lj.OptionError, "priority: expected a whole number"),
        ({"deadline": 0}, lj.OptionError, "deadline: expected seconds above 0"),
        ({"deadline": 10**400}, lj.OptionError, "deadline: expected seconds above 0"),
        ({"deadline": True}, lj.OptionError, "deadline: expected seconds above 0"),
        ({"cache_salt": 3}, lj.OptionError, "cache_salt: expected a text"),
        ({"sample": -1}, lj.OptionError, "sample: expected a whole number"),
        ({"tempreature": 1}, lj.OptionError, "did you mean temperature"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_name_at_once(engine, options, error, message):
    before = engine.stats().requests
    with pytest.raises(error, match=message):
        engine.submit(PROMPT, **options)
    assert engine.stats().requests == before


@pytest.mark.parametrize("prompt", ["", [], [999], [-1], [1.5], 7])
def test_a_bad_prompt_is_refused(engine, prompt):
    with pytest.raises((lj.TokenError, lj.OptionError), match="prompt"):
        engine.submit(prompt)


@pytest.mark.parametrize(
    "sizes", [{"slots": 0}, {"num_pages": 0}, {"page_size": 0}, {"chunk": 0}, {"idle_chunk": 0}, {"max_waiting": 0}]
)
def test_bad_sizes_are_refused(model, sizes):
    with pytest.raises(lj.EngineError, match=f"{next(iter(sizes))}: expected a whole number"):
        lj.Engine(model, **sizes)


def test_a_bad_codec_is_refused_in_the_callers_thread(model):
    with pytest.raises(lj.CacheError, match="codec: expected one of"):
        lj.Engine(model, codec="int3")


def test_no_more_requests_wait_than_may(model):
    with lj.Engine(model, slots=1, page_size=8, max_waiting=1) as engine:
        running = engine.submit(PROMPT, max_new_tokens=50)
        next(iter(running))
        waiting = engine.submit(PROMPT, max_new_tokens=1)
        with pytest.raises(lj.EngineError, match="queue: expected fewer than 1 waiting requests, got 1"):
            engine.submit(PROMPT, max_new_tokens=1)
        assert waiting.result(60).finish_reason == "length"


def test_a_closed_engine_has_answered_what_was_under_way_and_takes_nothing_more(model):
    with lj.Engine(model, slots=2, page_size=8) as engine:
        handles = [engine.submit(PROMPT, max_new_tokens=9) for _ in range(3)]
    assert all(len(handle.result(0).token_ids) == 9 for handle in handles)
    with pytest.raises(lj.EngineError, match="closed"):
        engine.submit(PROMPT, max_new_tokens=1)
    with pytest.raises(lj.EngineError, match="closed"):
        engine.stats()
    engine.close()


def test_closing_without_draining_gives_requests_up_within_a_step(model):
    engine = lj.Engine(model, slots=2, page_size=8)
    handle = engine.submit(PROMPT, max_new_tokens=50)
    next(iter(handle))
    start = time.perf_counter()
    engine.close(drain=False)
    assert time.perf_counter() - start < 30
    with pytest.raises(lj.EngineError, match="closed"):
        handle.result(0)


def test_a_reader_that_never_reads_blocks_nobody(engine):
    engine.submit(PROMPT, max_new_tokens=20)
    assert engine.submit("a dog", max_new_tokens=3).result(60).finish_reason == "length"


@pytest.mark.parametrize(
    "settings", [{}, {"sliding_window": 7}, {"num_kv_heads": 1, "tie_word_embeddings": False}], ids=str
)
def test_the_log_probabilities_of_a_prompt_are_those_of_one_pass(settings):
    model = random_model(**settings)
    ids = list(range(40))
    with lj.Engine(model, slots=1, page_size=8, chunk=16) as engine:
        running = engine.submit("abc", max_new_tokens=30)
        found = engine.prompt_logprobs(ids, top_logprobs=3)
        same(running.result(60), lj.generate(model, "abc", max_new_tokens=30))
    rows = np.asarray(jax.nn.log_softmax(lj.forward(model.params, model.config, [ids])[0]))
    assert found.token_ids == ids
    assert (found.logprobs[0], found.top_logprobs[0]) == (None, None)
    np.testing.assert_allclose(found.logprobs[1:], [rows[i, id] for i, id in enumerate(ids[1:])], atol=1e-5)
    for row, top in zip(rows, found.top_logprobs[1:], strict=False):
        assert [id for id, _ in top] == np.argsort(-row, kind="stable")[:3].tolist()
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[:-4:-1], atol=1e-5)


def test_the_rest_of_a_prompt_that_nobody_wants_is_not_scored(model):
    chunks = iter([True, True, False])
    with lj.Engine(model, slots=1, page_size=8, chunk=8) as engine:
        found = engine.prompt_logprobs(list(range(50)), wanted=lambda: next(chunks))
    assert len(found.logprobs) == 17


@pytest.mark.parametrize(
    ("prompt", "top", "error", "message"),
    [
        ("", 0, lj.TokenError, "prompt 0: expected at least one token"),
        ([999], 0, lj.OptionError, "prompt: expected ids in 0"),
        ([1] * 66, 0, lj.CapacityError, "expected at most n_positions=64 per row, got 65"),
        ("a", 21, lj.OptionError, "top_logprobs: expected .* 0 .. 20, got 21"),
    ],
)
def test_what_cannot_be_scored_is_refused(engine, prompt, top, error, message):
    with pytest.raises(error, match=message):
        engine.prompt_logprobs(prompt, top)


def test_logits_that_are_not_numbers_are_reported_and_the_engine_goes_on(model):
    final = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), model.params.ln_f)
    broken = lj.Model(model.config, dataclasses.replace(model.params, ln_f=final), model.tokenizer)
    with lj.Engine(broken, slots=1, page_size=8) as engine:
        for _ in range(2):
            with pytest.raises(lj.NonFiniteError):
                engine.prompt_logprobs("abc")
        assert engine.stats().failures == 0
