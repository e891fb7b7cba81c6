"""Pages that leave the device's pool come back from the second one with the same bits, and change no tokens."""

import jax
import numpy as np
import pytest
from cache_cases import make_config
from cores import Answer, alone, check_books, make_core, request, run
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from tiny import random_params

import llorch_jax as lj
from llorch_jax.engine import copies, device
from llorch_jax.engine import slots as programs
from llorch_jax.engine.host_pages import HostPages
from llorch_jax.errors import EngineError

CONFIG = make_config(layers=2, heads=2, head_dim=8)
PAGE_BYTES = 2 * 2 * 2 * 8 * 4 * 4  # layers, keys and values, heads, head_dim, page_size, bytes of a float32
TEXTS = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (3, 28))
LONG = (TEXTS[1].tolist() * 2)[:44]  # and two new tokens: as many pages as there are
SETTINGS = ({"temperature": 0.0}, {"temperature": 0.9}, {"temperature": 0.8, "repetition_penalty": 1.3})


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def small(params, config=CONFIG, **more):
    """A core with pages for a text and a bit, and a second pool for several texts."""
    return make_core(params, config, **{"slots": 2, "num_pages": 12, "offload": 40 * PAGE_BYTES, **more})


@pytest.fixture(scope="module")
def cores(params):
    """With pages in which the longest request fits, and second pools that hold everything or next to nothing."""
    return [small(params, offload=pages * PAGE_BYTES + 1) for pages in (60, 3)]


def ask(core, prompt, new=2, **more):
    answer = Answer()
    sequence = core.add(request(prompt, new, answer, **more))
    run(core)
    assert answer.error is None
    return answer.tokens, sequence


def contents_of(core, tokens):
    """What the pages of a text hold that are on the device."""
    pages = core.pages.match(np.asarray(tokens, np.int32))
    return jax.tree.map(lambda pool: np.asarray(pool)[pages], copies.pools_of(core._device.cache))


def counts(core):
    return core.offload.store.counts()


jobs = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.integers(0, 2),
            "shared": st.integers(0, 28),
            "own": st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=6),
            "new": st.integers(1, 12),
            "settings": st.sampled_from(SETTINGS),
            "salt": st.sampled_from([b"", b"", b"", b"mine"]),
            "priority": st.integers(0, 1),
            "after": st.integers(0, 5),
            "cancel": st.sampled_from([False, False, False, True]),
        }
    ),
    min_size=1,
    max_size=8,
)


@examples(8)
@given(jobs=jobs, which=st.integers(0, 1))
def test_tokens_are_those_of_each_request_alone(params, cores, jobs, which):
    """Greedy and drawn, with beginnings that are cached, offloaded, brought back or lost, preempted or cancelled."""
    core = cores[which]
    under_way = []
    for number, job in enumerate(jobs):
        answer = Answer()
        prompt = [*TEXTS[job["text"]][: job["shared"]].tolist(), *job["own"]]
        asked = request(
            prompt,
            job["new"],
            answer,
            seed=number,
            settings=job["settings"],
            salt=job["salt"],
            priority=job["priority"],
        )
        core.check(asked)
        sequence = core.add(asked)
        under_way.append((job, number, prompt, answer))
        for _ in range(job["after"]):
            core.step()
            check_books(core)
            assert counts(core).bytes <= core._plot.offload_bytes
        if job["cancel"]:
            core.withdraw(sequence)
            check_books(core)
    run(core)
    assert core.statistics.failures == 0
    assert core.pages.counts().held == 0
    for job, number, prompt, answer in under_way:
        expected = alone(params, CONFIG, prompt, job["new"], seed=number, settings=job["settings"])
        assert answer.tokens == expected[: len(answer.tokens)]
        assert len(answer.tokens) == job["new"] or (job["cancel"] and isinstance(answer.error, EngineError))


def test_what_a_preempted_request_has_computed_is_brought_back(params):
    core = small(params)
    answers = [Answer(), Answer()]
    both = [core.add(request([1 + number] * 18, 20, answer)) for number, answer in enumerate(answers)]
    run(core)
    assert core.statistics.preemptions > 0
    assert counts(core).restored > 0
    assert [sequence.cached for sequence in both] == [0, 0]  # its own pages are no hits of the prefix cache
    assert (core.statistics.prompt_tokens, core.statistics.cached_tokens) == (36, 0)
    for number, answer in enumerate(answers):
        assert answer.tokens == alone(params, CONFIG, [1 + number] * 18, 20)


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_text_that_was_evicted_is_brought_back_whole(params, codec):
    core = small(params, codec=codec)
    text = TEXTS[0].tolist()
    first, _ = ask(core, text)
    before = contents_of(core, text)
    ask(core, LONG)
    assert core.pages.match(np.asarray(text, np.int32)) == []
    again, sequence = ask(core, text)
    assert sequence.cached == 24
    assert counts(core).restored == 6
    assert again == first
    assert jax.tree.all(jax.tree.map(np.array_equal, before, contents_of(core, text)))


@pytest.mark.parametrize("codec", [None, "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("more", [{}, {"kv_heads": 1, "kv_sharing": (0, 0)}])
def test_pages_of_every_codec_come_back_with_the_same_bits(codec, more):
    """There and back in several calls, to other pages."""
    config = make_config(layers=2, heads=2, head_dim=8, **more)
    core = small(lj.init_params(config, jax.random.key(0)), config, num_pages=80, codec=codec)
    on_device, dice = core._device, np.random.default_rng(0)

    def drawn(pool):
        return np.frombuffer(dice.bytes(40 * pool.nbytes // 80), pool.dtype).reshape(40, *pool.shape[1:])

    contents = jax.tree.map(drawn, copies.pools_of(on_device.cache))
    pages = dice.permutation(80)
    on_device.put_pages(pages[:40].tolist(), contents, list(range(40)))
    store = HostPages.of(copies.pools_of(on_device.cache), core._plot.offload_bytes)
    entries = [(bytes([number]), b"") for number in range(40)]
    for part, taken in on_device.take_pages(pages[:40].tolist()):
        store.add(entries[part], jax.tree.map(np.asarray, taken))
    rows = store.restore([digest for digest, _ in entries])
    on_device.put_pages(pages[40:].tolist(), store.arrays, rows)
    assert store.counts().pages == 40
    found = jax.tree.map(lambda pool: np.asarray(pool)[pages[40:]], copies.pools_of(on_device.cache))
    assert jax.tree.all(jax.tree.map(lambda one, other: one.tobytes() == other.tobytes(), found, contents))


def test_pages_that_leave_a_second_time_are_not_copied_again(params):
    core = small(params)
    texts = [TEXTS[0].tolist(), LONG]
    for text in texts * 2:
        ask(core, text)
    saved = counts(core).saved
    for text in texts * 2:
        _, sequence = ask(core, text)
        assert sequence.cached == (len(text) - 1) // 4 * 4
    assert counts(core).saved <= saved + 4  # of new tokens


def test_a_text_can_be_in_both_pools(params):
    """Its end is evicted first; only that is brought back."""
    core = small(params)
    text = TEXTS[0].tolist()
    first, _ = ask(core, text)
    ask(core, TEXTS[1][:26].tolist())
    there = len(core.pages.match(np.asarray(text, np.int32)))
    assert 0 < there < 6
    again, sequence = ask(core, text)
    assert again == first
    assert sequence.cached == 24
    assert counts(core).restored == 6 - there


def test_requests_of_one_step_bring_a_page_back_once_and_share_it(params):
    core = small(params)
    text = TEXTS[0].tolist()
    first, _ = ask(core, text[:20])
    ask(core, LONG)
    assert core.pages.match(np.asarray(text, np.int32)) == []
    answers = [Answer(), Answer()]
    for answer in answers:
        core.add(request(text[:20], 2, answer))
    core.step()
    assert core.pages.counts().shared == 4
    assert counts(core).restored == 4
    run(core)
    assert [answer.tokens for answer in answers] == [first, first]


def test_another_salt_finds_nothing_in_either_pool(params):
    core = small(params)
    text = TEXTS[0].tolist()
    ask(core, text, salt=b"mine")
    ask(core, LONG)
    assert ask(core, text)[1].cached == 0
    ask(core, (TEXTS[2].tolist() * 2)[:40])
    assert ask(core, text, salt=b"mine")[1].cached == 24


def test_a_sliding_window(params):
    config = make_config(layers=2, heads=2, head_dim=8, sliding_window=8)
    core = small(params, config, slots=1)
    text = TEXTS[0].tolist()
    for prompt in [text, LONG, text, (TEXTS[2].tolist() * 2)[:44], text]:
        assert ask(core, prompt, 6)[0] == alone(params, config, prompt, 6)
    assert counts(core).restored > 0


def test_nothing_is_compiled_after_the_warm_up_and_pools_are_written_in_place(params):
    jax.clear_caches()  # programs of other tests
    core = small(params)
    core.warm_up()
    sizes = 5  # 1 .. 16
    assert (copies.take._cache_size(), copies.put._cache_size()) == (sizes, sizes)
    count = device.compile_count()
    pool = core._device.cache.keys[0].unsafe_buffer_pointer()
    for text in [*TEXTS.tolist(), LONG, *TEXTS.tolist(), TEXTS[0][:9].tolist()]:
        ask(core, text, 3)
    assert counts(core).restored > 0
    assert device.compile_count() == count
    assert core._device.cache.keys[0].unsafe_buffer_pointer() == pool


@pytest.mark.parametrize("fails", ["put", "take", "prefill"])
def test_the_second_pool_survives_a_step_that_fails(params, monkeypatch, fails):
    core = small(params)
    text = TEXTS[0].tolist()
    first, _ = ask(core, text)
    ask(core, LONG)
    before = counts(core)

    def fail(*args, **more):
        monkeypatch.undo()
        raise RuntimeError("no memory")

    monkeypatch.setattr(programs if fails == "prefill" else copies, fails, fail)
    doomed = Answer()
    core.add(request(text, 2, doomed))
    run(core)
    assert isinstance(doomed.error, EngineError)
    assert "no memory" in str(doomed.error)
    assert core.statistics.failures == 1
    assert counts(core).pages == before.pages
    again, sequence = ask(core, text)
    assert again == first
    assert sequence.cached == 24
    assert counts(core).restored >= before.restored + 6


def test_a_copy_that_fails_late_loses_its_pages_and_nothing_else(params, monkeypatch):
    """The device reports an error when the copy is read."""
    core = small(params)
    text = TEXTS[0].tolist()
    first, _ = ask(core, text)

    class Broken:
        def __array__(self, *args, **more):
            raise RuntimeError("no memory")

    def broken(cache, pages):
        monkeypatch.undo()
        return jax.tree.map(lambda pool: Broken(), copies.pools_of(cache))

    monkeypatch.setattr(copies, "take", broken)
    assert ask(core, LONG)[0] == alone(params, CONFIG, LONG, 2)
    assert core.statistics.failures == 1
    again, sequence = ask(core, text)
    assert again == first
    assert sequence.cached < 24


def test_files_of_prefixes_have_the_pages_of_both_pools(params, tmp_path):
    core = small(params)
    texts = [TEXTS[0].tolist(), LONG]
    answers = [ask(core, text)[0] for text in texts]
    both = len({digest for _, digest, _ in [*core.pages.entries(), *core.offload.store.entries()]})
    assert both > core.pages.counts().indexed
    path = tmp_path / "prefixes"
    assert core.save_prefixes(path) == both
    fresh = small(params)
    assert fresh.load_prefixes(path) == both
    check_books(fresh)
    assert counts(fresh).pages == both - 12
    assert fresh.load_prefixes(path) == 0
    for text, answer in zip(texts, answers, strict=True):
        found, sequence = ask(fresh, text)
        assert found == answer
        assert sequence.cached == (len(text) - 1) // 4 * 4
    none = small(params, offload=0)
    assert none.load_prefixes(path) == 12
    little = small(params, offload=PAGE_BYTES)
    assert little.load_prefixes(path) == min(13, both)


def test_sizes_that_are_refused():
    model = lj.load("demo")
    with pytest.raises(EngineError, match=r"offload_bytes: expected a whole number from 0 up, got 1\.5"):
        lj.Engine(model, offload_bytes=1.5)
    with pytest.raises(EngineError, match=r"offload_bytes: expected 0, or at least a page of [\d,]+ bytes, got 10"):
        lj.Engine(model, slots=1, offload_bytes=10)
