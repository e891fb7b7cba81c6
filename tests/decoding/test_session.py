"""Sessions: a text that is kept, saved and loaded continues as if it had been generated in one call."""

import jax
import numpy as np
import pytest
from cache_cases import make_batch, make_config, make_params

import llorch_jax as lj

CONFIG = make_config(layers=1, heads=2, kv_heads=1, head_dim=8)
PARAMS = make_params(CONFIG)
PROMPT, LENGTHS = make_batch([6, 3]).tokens[:, :6], [6, 3]
SAMPLER = lj.Sampling.create(temperature=[0.9, 1.3], top_k=40)


def cache_of(spec):
    return lj.make_cache(CONFIG, spec, batch_size=2, **({"slack": 3} if spec == "h2o:8" else {}))


def start(spec="dynamic", **settings):
    settings = {"sampler": SAMPLER, "key": jax.random.key(7), **settings}
    return lj.Session.start(PARAMS, CONFIG, PROMPT, cache_of(spec), LENGTHS, **settings)


@pytest.mark.parametrize("spec", ["dynamic", "paged:32", "rotating:9+1", "h2o:8"])
def test_tokens_are_those_of_one_call(spec, tmp_path):
    cache = cache_of(spec)
    expected, cache = lj.generate_tokens(PARAMS, CONFIG, PROMPT, 16, cache, LENGTHS, SAMPLER, jax.random.key(7))
    model = lj.fingerprint(PARAMS, CONFIG)
    session, parts = start(spec), []
    for count in (1, 4, 11):
        lj.save_session(tmp_path / "s.safetensors", session, fingerprint=model)
        session = lj.load_session(tmp_path / "s.safetensors", fingerprint=model)
        new, session = session.generate(PARAMS, CONFIG, count)
        parts.append(new)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    assert np.asarray(session.counts).tolist() == [22, 19]
    assert session.tokens[1, :19].tolist() == [*PROMPT[1, :3].tolist(), *expected[1].tolist()]
    assert np.asarray(session.state.cache.lengths).tolist() == np.asarray(cache.lengths).tolist()


def test_without_a_cache_it_grows():
    session = lj.Session.start(PARAMS, CONFIG, PROMPT)
    new, session = session.generate(PARAMS, CONFIG, 15)
    expected, _ = lj.generate_tokens(PARAMS, CONFIG, PROMPT, 15)
    np.testing.assert_array_equal(new, expected)
    assert isinstance(session.state.cache, lj.DynamicCache)


def test_a_row_ends_once():
    free, _ = lj.generate_tokens(PARAMS, CONFIG, PROMPT, 12, None, LENGTHS)
    eos = int(free[0, 4])
    at = [row.tolist().index(eos) if eos in row.tolist() else None for row in np.asarray(free)]
    expected, _ = lj.generate_tokens(PARAMS, CONFIG, PROMPT, 12, None, LENGTHS, eos_id=eos)
    session, parts = start(sampler=lj.Greedy(), eos_id=eos), []
    for _ in range(3):
        new, session = session.generate(PARAMS, CONFIG, 4)
        parts.append(new)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), expected)
    ends = [12 if place is None else place + 1 for place in at]
    assert np.asarray(session.counts).tolist() == [6 + ends[0], 3 + ends[1]]
    assert session.tokens[0, 5 + ends[0]] == eos


def test_what_does_not_fit_leaves_the_session_valid():
    session = start("static")
    with pytest.raises(lj.CapacityError, match="n_positions=64"):
        session.generate(PARAMS, CONFIG, 60)
    with pytest.raises(lj.CapacityError, match="max_new_tokens: expected a whole number"):
        session.generate(PARAMS, CONFIG, 0)
    new, _ = session.generate(PARAMS, CONFIG, 59)  # the last token needs no place in the cache
    assert new.shape == (2, 59)


def test_a_session_that_was_continued_is_refused_in_one_line():
    session = start("static")
    session.generate(PARAMS, CONFIG, 4)
    with pytest.raises(lj.CacheError, match="expected one that owns its buffers, got one that was donated"):
        session.generate(PARAMS, CONFIG, 4)


def test_refused_files(tmp_path):
    path = tmp_path / "s.safetensors"
    session = start()
    lj.save_session(path, session, fingerprint="a")
    with pytest.raises(lj.SessionError, match="expected a session of the model with fingerprint b, got one of a"):
        lj.load_session(path, fingerprint="b")
    with pytest.raises(lj.CacheError, match="expected a cache"):
        lj.load_cache(path)
    lj.save_cache(tmp_path / "c.safetensors", session.state.cache)
    with pytest.raises(lj.SessionError, match="expected a session, got DynamicCache"):
        lj.load_session(tmp_path / "c.safetensors")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(lj.SessionError, match="expected a saved session, got another file"):
        lj.load_session(path)
    session.generate(PARAMS, CONFIG, 2)
    with pytest.raises(lj.SessionError, match="donated"):
        lj.save_session(path, session)


def test_a_sampler_of_the_users_own_cannot_be_saved(tmp_path):
    class Own:
        needs_key = False
        needs_history = False

        def init(self, batch):
            return None

        def sample(self, logits, keys, history, eos_ids, state):
            return logits.argmax(-1).astype("int32"), state

    jax.tree_util.register_pytree_node(Own, lambda own: ((), None), lambda *_: Own())
    with pytest.raises(lj.SessionError, match=r"session: expected arrays, .*Greedy.* to save as decoding\.sampler"):
        lj.save_session(tmp_path / "s", start(sampler=Own()))
    assert not list(tmp_path.iterdir())
