"""The asynchronous stream: the same pieces, an event loop that keeps running, and nothing left over."""

import asyncio
import gc
import threading
import time

import jax
import pytest

import llorch_jax as lj


@pytest.fixture(scope="module")
def model(short_demo):
    return lj.load(short_demo)


def cache_arrays(model) -> int:
    gc.collect()
    sizes = model.config.kv_heads, model.config.head_dim
    return sum(array.shape[1::2] == sizes for array in jax.live_arrays() if array.ndim == 4)


def test_the_pieces_of_stream_while_the_event_loop_goes_on(model):
    async def run():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        pieces = [piece async for piece in lj.astream(model, "Once upon", 40, temperature=0.8, seed=3)]
        ticker.cancel()
        return pieces, ticks

    pieces, ticks = asyncio.run(run())
    expected = list(lj.stream(model, "Once upon", 40, temperature=0.8, seed=3))
    assert [(p.text, p.token_id, p.finish_reason) for p in pieces] == [
        (p.text, p.token_id, p.finish_reason) for p in expected
    ]
    assert ticks > 10


def test_cancelling_frees_the_cache_and_the_thread(model):
    before = cache_arrays(model)

    async def run():
        async def read():
            async for _ in lj.astream(model, "Once upon", 400):
                read_one.set()

        read_one = asyncio.Event()
        reader = asyncio.create_task(read())
        await read_one.wait()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader

    asyncio.run(run())
    deadline = time.monotonic() + 20
    while any(thread.name.startswith("llorch_jax") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert cache_arrays(model) == before


def test_errors_come_with_the_first_piece(model):
    async def run():
        await anext(lj.astream(model, "Once", 0))

    with pytest.raises(lj.CapacityError, match="max_new_tokens"):
        asyncio.run(run())
