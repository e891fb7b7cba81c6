"""Speculative decoding: plain decoding's tokens, or its distribution, whatever the draft is worth."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llorch_jax as lj
from llorch_jax.decoding.speculative import loop as speculative
from llorch_jax.decoding.speculative import verification
from llorch_jax.decoding.speculative.drafts import Context, DraftModel, PromptLookup
from llorch_jax.decoding.speculative.loop import speculate_tokens
from llorch_jax.decoding.steps import DecodeState
from llorch_jax.errors import DraftError
from llorch_jax.sampling import History

CONFIG = lj.GPT2Config(vocab_size=23, n_positions=48, n_embd=24, n_layer=1, n_head=2, num_kv_heads=1)
SMALL = lj.GPT2Config(vocab_size=23, n_positions=48, n_embd=8, n_layer=1, n_head=1)
LENGTHS = np.array([12, 1, 7], np.int32)
NEW = 30


def sharp(config, seed, factor=10.0):
    """Random weights with clear choices and uneven attention."""
    params = lj.init_params(config, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * factor if leaf.ndim == 2 else leaf, params)


@pytest.fixture(scope="module")
def params():
    return sharp(CONFIG, 0)


@pytest.fixture(scope="module")
def small():
    return DraftModel(sharp(SMALL, 1), SMALL)


@pytest.fixture(scope="module")
def prompts():
    period = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 4), np.int32)
    return np.tile(period, (1, 3))


SAMPLER = lj.Sampling.create([0.3, 1.0, 0.7], top_k=[20, 3, 5], top_p=0.9)


def both(params, prompts, draft, cache=None, **settings):
    """Tokens of plain and of speculative decoding, and the second's cache and statistics."""
    plain, _ = lj.generate_tokens(params, CONFIG, prompts, NEW, lengths=LENGTHS, **settings)
    tokens, cache, stats = speculate_tokens(params, CONFIG, prompts, NEW, draft, cache, LENGTHS, **settings)
    return np.asarray(plain), np.asarray(tokens), cache, stats


def looked_up(row, ngram, length):
    """What `PromptLookup` guesses after a list of tokens, in plain Python."""
    for size in range(min(ngram, len(row) - 1), 0, -1):
        for end in range(len(row) - 2, size - 2, -1):
            if row[end - size + 1 : end + 1] == row[-size:]:
                text = list(row)
                for step in range(length):
                    text.append(text[end + 1 + step])
                return text[len(row) :]
    return None


@pytest.mark.parametrize("ngram", [1, 3])
def test_prompt_lookup_equals_plain_python(ngram):
    generator = np.random.default_rng(ngram)
    history = generator.integers(0, 4, (60, 20), np.int32)
    known = generator.integers(1, 21, 60).astype(np.int32)
    past = History(jnp.asarray(history), jnp.asarray(known), jnp.asarray(known))
    context = Context(DecodeState(None, None, None, None, None, past), jnp.asarray(known), None)
    found = jax.jit(PromptLookup(ngram, 5).propose)(None, context)
    missing = 0
    for row, count, tokens, number in zip(history, known, found.tokens, found.count, strict=True):
        expected = looked_up(row[:count].tolist(), ngram, 5)
        missing += expected is None
        assert int(number) == (0 if expected is None else 5)
        assert expected is None or np.asarray(tokens).tolist() == expected
    assert 0 < missing < 60


CACHES = {
    "static": lambda: None,
    "dynamic": lambda: lj.DynamicCache.init(CONFIG, batch_size=3, initial=24),
    "paged": lambda: lj.PagedCache.init(CONFIG, batch_size=3, page_size=8, num_pages=16),
    "rotating": lambda: lj.RotatingCache.init(CONFIG, batch_size=3, window=40, sinks=1),
}


@pytest.mark.parametrize("cache", CACHES)
def test_greedy_equals_plain_decoding(params, prompts, cache):
    plain, _ = lj.generate_tokens(params, CONFIG, prompts, NEW, lengths=LENGTHS)
    tokens, after, stats = speculate_tokens(params, CONFIG, prompts, NEW, PromptLookup(), CACHES[cache](), LENGTHS)
    np.testing.assert_array_equal(tokens, plain)
    np.testing.assert_array_equal(after.lengths, LENGTHS + NEW - 1)
    assert stats.steps < NEW - 1
    assert 0 < stats.acceptance_rate < 1
    np.testing.assert_array_equal(stats.new_tokens, NEW)


def test_the_cache_is_that_of_the_tokens(params, prompts):
    _, tokens, cache, _ = both(params, prompts, PromptLookup())
    rows = [np.concatenate([row[:n], new]) for row, n, new in zip(prompts, LENGTHS, tokens, strict=True)]
    logits, _ = lj.decode_step(params, CONFIG, [row[-1] for row in rows], cache)
    for row, got in zip(rows, logits, strict=True):
        np.testing.assert_allclose(got, lj.forward(params, CONFIG, row[None])[0, -1], atol=1e-4)


def test_goes_on_from_a_cache(params, prompts):
    plain, _ = lj.generate_tokens(params, CONFIG, prompts, NEW)
    cache = lj.StaticCache.init(CONFIG, batch_size=3, capacity=48)
    _, cache = lj.prefill(params, CONFIG, prompts[:, :5], cache)
    tokens, cache, _ = speculate_tokens(params, CONFIG, prompts[:, 5:], NEW, cache=cache)
    np.testing.assert_array_equal(tokens, plain)
    np.testing.assert_array_equal(cache.lengths, 12 + NEW - 1)


def test_an_end_of_text_as_the_first_token(params, prompts):
    eos = int(lj.generate_tokens(params, CONFIG, prompts[:1], NEW)[0][0, 0])
    tokens, cache, stats = speculate_tokens(params, CONFIG, prompts[:1], NEW, eos_id=eos)
    assert np.asarray(tokens).tolist() == [[eos] * NEW]
    assert (int(cache.lengths[0]), stats.steps, stats.new_tokens.tolist()) == (12, 0, [1])


def test_end_of_text_inside_accepted_guesses(params, prompts):
    plain, _, _, _ = both(params, prompts, PromptLookup())
    eos = [int(plain[0, 9]), int(plain[2, 20])]
    plain, tokens, cache, stats = both(params, prompts, PromptLookup(), eos_id=eos)
    np.testing.assert_array_equal(tokens, plain)
    ends = [min([*np.flatnonzero(np.isin(row, eos)), NEW - 1]) for row in plain]
    np.testing.assert_array_equal(cache.lengths, LENGTHS + ends)
    np.testing.assert_array_equal(stats.new_tokens, np.array(ends) + 1)
    assert np.all(stats.accepted <= stats.new_tokens - 1)


@pytest.mark.parametrize("kind", ["lookup", "coupled"])
def test_sampling_with_matched_guesses_equals_plain_decoding(params, small, prompts, kind):
    draft = PromptLookup() if kind == "lookup" else small.replace(coupled=True)
    plain, tokens, _, stats = both(params, prompts, draft, sampler=SAMPLER, key=jax.random.key(3))
    np.testing.assert_array_equal(tokens, plain)
    assert stats.accepted.sum() > 0


def test_greedy_with_a_draft_model(params, small, prompts):
    plain, tokens, _, stats = both(params, prompts, small)
    np.testing.assert_array_equal(tokens, plain)
    assert 0 < stats.acceptance_rate < 0.9


def test_a_perfect_draft_is_always_accepted(params, prompts):
    draft = DraftModel(params, CONFIG, length=4)
    _, _, stats = speculate_tokens(
        params, CONFIG, prompts, NEW + 1, draft, None, LENGTHS, sampler=lj.Sampling.create(0.8), key=jax.random.key(0)
    )
    assert stats.acceptance_rate == 1
    assert stats.steps == NEW // 5
    assert stats.tokens_per_step == 5


def test_the_rule_of_rejection_gives_the_target(params):
    """q(x) a(x) summed over the guesses, and the residual for what is left, must be p: exactly, without drawing."""
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(9), (2, 6)).astype(np.float32)
    p[0], p[1, :4] = q[0], 0  # equal, and partly impossible
    p[1] /= p[1].sum()
    with np.errstate(divide="ignore"):
        target, draft = np.log(p), np.log(q)
    guesses = np.tile(np.arange(9, dtype=np.int32), (6, 1))
    spread = [np.broadcast_to(x[:, None], (6, 9, 9)) for x in (target, draft)]
    accepted = np.exp(verification.acceptance(*spread, guesses))
    np.testing.assert_allclose(accepted, np.minimum(1, p / q), rtol=1e-5)
    rest = np.exp(jax.nn.log_softmax(verification.residual(target, draft, jnp.ones(6, bool))))
    np.testing.assert_allclose(q * accepted + (1 - np.sum(q * accepted, 1, keepdims=True)) * rest, p, atol=1e-6)
    kept = verification.residual(target, draft, jnp.zeros(6, bool))
    np.testing.assert_array_equal(kept, target)


TINY = lj.GPT2Config(vocab_size=5, n_positions=16, n_embd=8, n_layer=1, n_head=1)
DRAWS = 2000


def exact_joint(params, sampler, prompt, count):
    """Probability of every continuation of `count` tokens, [V ** count], by the uncached forward pass."""
    texts = np.array(list(itertools.product(range(TINY.vocab_size), repeat=count)), np.int32)
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = lj.forward(params, TINY, rows)[:, len(prompt) - 1 : -1]
    logprobs = jax.nn.log_softmax(jax.vmap(sampler.filtered, 1, 1)(logits))
    return np.exp(np.take_along_axis(np.asarray(logprobs), texts[..., None], axis=2)[..., 0].sum(1))


def chi_square(tokens, probabilities):
    """How many standard deviations Pearson's statistic lies above its mean, rare cells put together."""
    counts = np.bincount(
        np.ravel_multi_index(tokens.T, (TINY.vocab_size,) * tokens.shape[1]), minlength=probabilities.size
    )
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * len(tokens)
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    cells = observed.size - 1
    return (np.sum((observed - expected) ** 2 / expected) - cells) / np.sqrt(2 * cells)


def test_the_distribution_of_rejection_sampling_is_exact():
    params, other = sharp(TINY, 0, 6.0), sharp(TINY, 1, 6.0)
    sampler = lj.Sampling.create(0.9, top_k=4)
    draft = DraftModel(other, TINY, length=2)
    prompt = np.array([3, 1, 3, 1], np.int32)
    tokens, _, stats = speculate_tokens(
        params, TINY, np.tile(prompt, (DRAWS, 1)), 3, draft, sampler=sampler, key=jax.random.key(5)
    )
    probabilities = exact_joint(params, sampler, prompt, 3)
    assert np.isclose(probabilities.sum(), 1, atol=1e-4)
    assert abs(chi_square(np.asarray(tokens), probabilities)) < 4
    assert 0.1 < stats.acceptance_rate < 0.95
    wrong = exact_joint(other, sampler, prompt, 3)  # the test would notice the draft's distribution
    assert 0.5 * np.abs(wrong - probabilities).sum() > 0.2


def test_the_cache_stays_in_its_buffers(params, prompts):
    cache = lj.StaticCache.init(CONFIG, batch_size=3, capacity=48)
    before = [leaf.unsafe_buffer_pointer() for leaf in (*cache.keys, *cache.values)]
    _, after, _ = speculate_tokens(params, CONFIG, prompts, NEW, cache=cache, lengths=LENGTHS)
    assert [leaf.unsafe_buffer_pointer() for leaf in (*after.keys, *after.values)] == before


def test_one_program_serves_all_lengths_and_settings(params, prompts):
    def run(count, lengths, sampler):
        cache = lj.StaticCache.init(CONFIG, batch_size=3, capacity=48)
        key = jax.random.key(0)
        speculate_tokens(params, CONFIG, prompts, count, None, cache, lengths, sampler=sampler, key=key)

    run(17, LENGTHS, SAMPLER)
    compiled = speculative._loop._cache_size()
    run(19, LENGTHS - [4, 0, 2], lj.Sampling.create([1.5, 0.2, 1.0], top_k=[9, 1, 4], top_p=0.5))
    assert speculative._loop._cache_size() == compiled


def test_a_single_new_token_needs_no_step(params, prompts):
    tokens, cache, stats = speculate_tokens(params, CONFIG, prompts, 1, lengths=LENGTHS)
    np.testing.assert_array_equal(tokens, lj.generate_tokens(params, CONFIG, prompts, 1, lengths=LENGTHS)[0])
    np.testing.assert_array_equal(cache.lengths, LENGTHS)
    assert (stats.steps, stats.acceptance_rate) == (0, 0)


def test_up_to_the_end_of_the_context(params, prompts):
    count = CONFIG.n_positions + 1 - 12
    tokens, cache, _ = speculate_tokens(params, CONFIG, prompts, count)
    np.testing.assert_array_equal(tokens, lj.generate_tokens(params, CONFIG, prompts, count)[0])
    np.testing.assert_array_equal(cache.lengths, CONFIG.n_positions)


def test_a_draft_of_another_vocabulary_is_refused(params, prompts):
    draft = DraftModel(sharp(TINY, 0), TINY)
    with pytest.raises(DraftError, match="vocab_size=23, got 5"):
        speculate_tokens(params, CONFIG, prompts, 4, draft)


def test_a_draft_of_a_shorter_context_than_the_texts_is_refused_by_name(params, prompts):
    config = dataclasses.replace(SMALL, n_positions=16)
    with pytest.raises(DraftError, match=r"draft: expected a context of \d+ tokens, as long as the texts, got 16"):
        speculate_tokens(params, CONFIG, prompts, NEW, DraftModel(sharp(config, 0), config))


@pytest.mark.parametrize("draft", [PromptLookup(0), *(PromptLookup(length=each) for each in (0, 2.0, 49, 2**31))])
def test_impossible_settings_are_refused(params, prompts, draft):
    with pytest.raises(DraftError, match=r"expected a whole number (from 1 up|in 1 \.\. 48)"):
        speculate_tokens(params, CONFIG, prompts, 4, draft)


@pytest.mark.parametrize("layout", ["rotating:16", "recent:8", "h2o:48"])
def test_a_cache_that_cannot_roll_back_is_refused_and_stays_valid(params, prompts, layout):
    cache = lj.make_cache(CONFIG, layout, batch_size=3)
    with pytest.raises(lj.CacheError, match=r"take back rejected guesses, got a .*Cache that .* 41 of them"):
        speculate_tokens(params, CONFIG, prompts, NEW, cache=cache)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def test_an_evicting_cache_that_holds_all_tokens_equals_plain_decoding(params, prompts):
    cache = lj.make_cache(CONFIG, "recent:16", batch_size=3)
    plain, tokens, _, stats = both(params, prompts, PromptLookup(), cache)
    np.testing.assert_array_equal(tokens, plain)
    assert stats.accepted.sum() > 0


def test_a_sampler_without_a_distribution_is_refused(params, small, prompts):
    class Odd(lj.Greedy):
        needs_key = True

    with pytest.raises(DraftError, match="`filtered`"):
        speculate_tokens(params, CONFIG, prompts, 4, small, sampler=Odd(needs_key=True), key=jax.random.key(0))


SAMPLERS = {
    "penalties": lj.Sampling.create(greedy=True, repetition_penalty=[5.0, 1.3, 1.0], no_repeat_ngram_size=4),
    "lengths": lj.Sampling.create(greedy=True, min_new_tokens=[9, 4, 0], forced_tokens=[[2, None, 3], [], [1]]),
    "drawn": lj.Sampling.create(0.8, top_k=12, frequency_penalty=0.3, dry_multiplier=0.8, repeat_last_n=8),
    "mirostat": lj.Mirostat.create([2.0, 1.0, 3.0]),
    "superset": lj.Sampling.superset(
        [{"temperature": 0}, {"presence_penalty": 1.0, "top_p": 0.9}, {"bad_words": [[3]]}]
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_that_look_at_the_text_or_keep_a_state_equal_plain_decoding(params, prompts, name):
    eos = int(lj.generate_tokens(params, CONFIG, prompts, 1, lengths=LENGTHS)[0][0, 0])  # likely at once
    settings = {"sampler": SAMPLERS[name], "key": jax.random.key(2), "eos_id": eos}
    plain, tokens, cache, stats = both(params, prompts, PromptLookup(length=3), **settings)
    np.testing.assert_array_equal(tokens, plain)
    ends = [min([*np.flatnonzero(row == eos), NEW - 1]) for row in plain]
    np.testing.assert_array_equal(cache.lengths, LENGTHS + ends)
    np.testing.assert_array_equal(stats.new_tokens, np.array(ends) + 1)
    assert stats.proposed.sum() > 0


def test_a_coupled_draft_under_penalties_equals_plain_decoding(params, small, prompts):
    sampler = lj.Sampling.create([0.4, 1.0, 0.7], repetition_penalty=1.3, top_k=9)
    settings = {"sampler": sampler, "key": jax.random.key(4)}
    plain, tokens, _, stats = both(params, prompts, small.replace(coupled=True), **settings)
    np.testing.assert_array_equal(tokens, plain)
    assert stats.accepted.sum() > 0


def test_drawn_guesses_under_penalties_are_refused_before_the_cache_is_donated(params, small, prompts):
    cache = lj.StaticCache.init(CONFIG, batch_size=3)
    for sampler in (lj.Sampling.create(1.0, presence_penalty=0.5), lj.Mirostat.create()):
        with pytest.raises(DraftError, match=f"got a {type(sampler).__name__} that has none or looks at more"):
            speculate_tokens(params, CONFIG, prompts, 4, small, cache, sampler=sampler, key=jax.random.key(0))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))
