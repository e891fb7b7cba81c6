"""The simulation of replicas behind a router: always the same, with the times of its calls; what routers do."""

import numpy as np
import pytest

from benchmarks import routers, simulation
from benchmarks.scaling_model import device_seconds, fit, prefill_seconds

TIMES = simulation.StepTimes(fit(), simulation.CONFIG)


def prompt(start: int, length: int) -> np.ndarray:
    return np.arange(start, start + length, dtype=np.int32)


def test_a_request_alone_takes_the_time_of_its_calls():
    host, config = fit(), simulation.CONFIG
    (served,) = simulation.simulate([simulation.Arrival(2.0, prompt(0, 100), 3)], 1, lambda *_: 0, TIMES)
    first = simulation.HOST_WORK + prefill_seconds(host, config, 128, 0)
    assert served.first == pytest.approx(first)
    assert served.total == pytest.approx(first + 2 * device_seconds(host, config, 1, 256), abs=3 * simulation.HOST_WORK)
    assert (served.prompt, served.cached) == (100, 0)


def test_a_prompt_that_is_cached_starts_sooner():
    arrivals = [simulation.Arrival(at, prompt(0, 300), 4) for at in (0.0, 10.0)]
    cold, warm = simulation.simulate(arrivals, 1, lambda *_: 0, TIMES)
    assert (cold.cached, warm.cached) == (0, 288)
    assert warm.first < cold.first / 4


def test_a_small_run_is_the_same_every_time_and_beginnings_find_their_pages():
    found = [simulation.measure(20, 240, 0.6, 20, list(simulation.ROUTERS), 0)["rows"] for _ in range(2)]
    for first, second in zip(*found, strict=True):
        assert {**first, "run_s": 0} == {**second, "run_s": 0}
    rates = {line["name"]: line["hit_rate"] for line in found[0]}
    assert rates["prefix-aware"] > max(rate for name, rate in rates.items() if name != "prefix-aware") + 0.1


def test_every_request_ends_under_any_load():
    arrivals = simulation.workload(60, 100.0, 3, 1)
    served = simulation.simulate(arrivals, 2, routers.round_robin(2, 0), TIMES)
    assert sorted(each.at for each in served) == [each.at for each in arrivals]


def test_routers():
    load = np.array([3, 1, 2, 1])
    some = prompt(0, 200)
    turn = routers.round_robin(4, 0)
    assert [turn(some, load) for _ in range(5)] == [0, 1, 2, 3, 0]
    least = routers.least_loaded(4, 0)
    assert {least(some, load) for _ in range(50)} == {1, 3}
    anywhere = routers.at_random(4, 0)
    assert {anywhere(some, load) for _ in range(100)} == {0, 1, 2, 3}


def test_equal_beginnings_meet_until_their_replica_is_full():
    route = routers.prefix_aware(8, 0, 32)
    load = np.zeros(8, np.int64)
    system = prompt(0, 128)
    homes = [route(np.concatenate([system, prompt(900 + n, 20)]), load) for n in range(5)]
    assert len(set(homes)) == 1
    load[homes[0]] = 2  # of a mean of 1.125 with the new request: the bound is 2
    load[:] = np.where(np.arange(8) == homes[0], 2, 1)
    assert route(system, load) != homes[0]
    others = {route(prompt(1000 * n, 128), np.zeros(8, np.int64)) for n in range(40)}
    assert len(others) > 4
    assert load[route(prompt(0, 5), load)] == 1  # less than a page: any replica with the fewest
