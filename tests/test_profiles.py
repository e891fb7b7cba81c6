"""The parts of a step sum to it, are never negative, and are right where they are known."""

import jax
import jax.numpy as jnp
import pytest
from twins import twins

import llorch_jax as lj
from benchmarks import profile_cache, suite
from benchmarks.decoder import Decoder
from benchmarks.hlo import Operation, module_name, operations
from benchmarks.measure import random_model
from benchmarks.signals import signals
from benchmarks.trace import Program, Span, exclusive, with_ends
from llorch_jax import kernels
from llorch_jax.decoding import steps

TEXT = """HloModule jit_example, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (param_0.1: f32[2,4], param_1.1: f32[8]) -> f32[8] {
  %param_0.1 = f32[2,4]{1,0} parameter(0)
  %param_1.1 = f32[8]{0} parameter(1)
  %bitcast.1 = f32[8]{0} bitcast(%param_0.1)
  %add.1 = f32[8]{0} add(%bitcast.1, %param_1.1), metadata={op_name="jit(example)/block_0/dense/add" stack_frame_id=1}
  %reduce.1 = f32[]{} reduce(%add.1), metadata={op_name="jit(example)/block_0/norm/reduce_sum" stack_frame_id=1}
  %broadcast.1 = f32[8]{0} broadcast(%reduce.1), metadata={op_name="jit(example)/block_0/norm/sub" stack_frame_id=1}
  ROOT %subtract.1 = f32[8]{0} subtract(%add.1, %broadcast.1), metadata={op_name="jit(example)/block_0/norm/sub"}
}

%body (carry: f32[8]) -> f32[8] {
  %carry = f32[8]{0} parameter(0)
  ROOT %add.2 = f32[8]{0} add(%carry, %carry), metadata={op_name="jit(example)/while/body/add"}
}

ENTRY %main (x.1: f32[8]) -> (f32[8], /*index=1*/f32[8]) {
  %x.1 = f32[8]{0} parameter(0), metadata={op_name="x"}
  %dot.1 = f32[2,4]{1,0} dot(%x.1, %x.1), lhs_contracting_dims={}, rhs_contracting_dims={}
  %fusion.1 = f32[8]{0} fusion(%dot.1, %x.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/norm/sub"}
  %copy.1 = f32[8]{0} copy(%fusion.1)
  %while.1 = (f32[8]{0}, /*index=1*/f32[8]{0}) while(%copy.1), condition=%cond, body=%body, metadata={op_name="a/while"}
  ROOT %inner.1 = f32[8]{0} exponential(%copy.1), metadata={op_name="jit(example)/cache_read/vmap()/attention/exp"}
}
"""


@pytest.fixture(scope="module", autouse=True)
def hasty_compiling():
    with suite.hasty_compiling():
        yield


@pytest.fixture(scope="module")
def found():
    return operations(TEXT, ("dense", "norm", "cache_read", "attention"))


def test_the_programs_name_is_read():
    assert module_name(TEXT) == "jit_example"


def test_an_operation_belongs_to_its_innermost_scope(found):
    assert found["inner.1"] == Operation({"attention": 1.0}, False)
    assert found["add.2"] == Operation({"": 1.0}, False)


def test_an_operation_without_a_name_belongs_to_what_reads_it_even_inside_a_fusion(found):
    assert found["dot.1"].shares == {"dense": 1.0}
    assert found["copy.1"].shares == {"": 1.0}  # the loop


def test_a_fusion_is_divided_by_the_elements_that_its_scopes_compute(found):
    # 8 sums of dense; 8 that the reduction goes through and 8 differences of norm; a broadcast costs nothing.
    assert found["fusion.1"].shares == pytest.approx({"dense": 1 / 3, "norm": 2 / 3})


def test_loops_contain_operations(found):
    assert found["while.1"].container
    assert not found["fusion.1"].container


def test_times_of_operations_are_exclusive_and_sum_to_the_whole():
    known = {name: Operation({"": 1.0}, name == "loop") for name in ("loop", "a", "b")}
    spans = [Span("a", 0, 10), Span("loop", 20, 70), Span("a", 30, 50), Span("b", 40, 60), Span("b", 80, 90)]
    times = exclusive(spans, known)
    # Between 40 and 50 both a and b run; the loop has 20 .. 30 and 60 .. 70, and nothing runs in 10 .. 20 and 70 .. 80.
    assert times == {"a": 10 + 10 + 5, "b": 5 + 10 + 10, "loop": 20, None: 20}
    assert sum(times.values()) == 90


def test_an_operation_ends_where_its_end_is_recorded():
    spans = [Span("a", 5, 6), Span("a", 20, 29), Span("b", 7, 8)]
    assert with_ends(spans, {"a": [1, 12, 25]}) == [Span("a", 5, 12), Span("b", 7, 8), Span("a", 20, 29)]


@jax.jit
def _known(matrices, x):
    """In every turn two products in one scope, and eight of the same size in another."""

    def turn(_, x):
        for number, matrix in enumerate(matrices):
            with jax.named_scope("few" if number < 2 else "many"):
                x = jnp.tanh(matrix @ x)
        return x

    return jax.lax.fori_loop(0, 400, turn, x)


def test_a_program_with_known_parts_is_divided_as_it_must_be():
    matrices = [jnp.full((256, 256), 1e-3) for _ in range(10)]
    x = jnp.ones(256)
    program = Program(_known, matrices, x, scopes=("few", "many"))
    sums = dict.fromkeys(("few", "many", ""), 0.0)
    for _ in range(3):
        parts = program.parts(lambda: program.compiled(matrices, x))
        assert set(parts) == set(sums)
        assert min(parts.values()) >= 0
        sums = {scope: time + parts[scope] for scope, time in sums.items()}
    assert 2 < sums["many"] / sums["few"] < 8  # four times as many products, whatever else the machine does


def test_a_program_from_the_compilation_cache_has_the_scopes_of_today():
    def named(scope):
        def doubled(x):
            with jax.named_scope(scope):
                return x * 2 + 41

        return jax.jit(doubled)

    x = jnp.ones(7)
    named("before").lower(x).compile()  # may be kept in a cache on disk
    program = Program(named("today"), x, scopes=("before", "today"))
    owners = {scope for each in program.operations.values() for scope in each.shares}
    assert owners >= {"today"}
    assert "before" not in owners


def test_a_profile_without_the_program_is_refused():
    program = Program(_known, [jnp.ones((8, 8))], jnp.ones(8), scopes=("few",))
    with pytest.raises(RuntimeError, match="expected operations of jit__known, got none"):
        program.parts(lambda: jnp.ones(3) + 1)


@pytest.fixture(scope="module")
def rows():
    """With the twins, whose steps have a part for every scope."""
    with twins():
        return profile_cache.measure("tiny", 1, [16], ["static", "paged"], 3)["rows"]


def test_parts_of_a_step_are_not_negative_and_sum_to_the_step_of_one_round(rows):
    for line in rows:
        parts = {name: part["median"] for name, part in line["parts"].items()}
        assert set(parts) == {*profile_cache.PARTS.values(), profile_cache.REST}
        assert min(part["low"] for part in line["parts"].values()) >= 0
        assert line["share"] == pytest.approx((parts["cache update"] + parts["cache read"]) / sum(parts.values()))


def test_a_static_cache_reads_nothing_and_a_paged_one_gathers(rows):
    static, paged = (line["parts"] for line in rows)
    assert static["cache read"]["high"] < 0.1 * static["attention"]["median"]
    assert paged["cache read"]["low"] > 0
    assert static["cache update"]["low"] > 0


def test_the_typical_round_is_the_one_with_the_median_step():
    rounds = [{"a": 1.0, "b": 9.0}, {"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 3.0}]
    parts = profile_cache.typical(rounds)
    assert {name: part.median for name, part in parts.items()} == {"a": 4.0, "b": 3.0}
    assert (parts["a"].low, parts["a"].high) == (1.0, 4.0)


def scopes_of_a_step():
    """The named scopes to which operations of a paged cache's compiled loop belong."""
    config, params = random_model("tiny")
    decoder = Decoder(params, config, lj.make_cache(config, "paged", batch_size=1), 16, 16)
    state = decoder.rewind()
    given = params, config, decoder.request.decoding, decoder.out, state, decoder.span
    program = Program(steps.loop, *given, scopes=tuple(profile_cache.PARTS))
    return {scope for each in program.operations.values() for scope in each.shares}


def test_every_scope_that_is_summed_is_in_the_compiled_step():
    with twins():
        assert scopes_of_a_step() >= set(profile_cache.PARTS)


@pytest.mark.skipif(kernels.describe().isa is None, reason="the kernels were not built")
def test_native_attention_gathers_no_pages():
    assert set(profile_cache.PARTS) - scopes_of_a_step() == {"cache_read"}


@pytest.mark.parametrize(("share", "on"), [(0.19, False), (0.21, True)])
def test_the_performance_signal_starts_at_a_fifth_of_the_step(share, on):
    assert signals([{"layout": "paged", "length": 64, "share": share}])["performance"]["on"] is on
