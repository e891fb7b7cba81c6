"""What a device holds and exchanges in a decode step: the formula gives what is counted in the compiled programs."""

import llorch_jax as lj
from benchmarks.scaling_counts import Case, by_formula, compiled, degrees

SMALL = {"vocab_size": 48, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
CASES = [
    Case(lj.GPT2Config(**SMALL), 1, 1, 16),
    Case(lj.GPT2Config(**SMALL), 2, 3, 16),
    Case(lj.GPT2Config(**SMALL, num_kv_heads=2, tie_word_embeddings=False), 2, 1, 32, "bfloat16"),
    Case(lj.GPT2Config(**SMALL, num_kv_heads=2, n_inner=96), 4, 2, 16),  # each key/value head on two devices
    Case(lj.GPT2Config(**{**SMALL, "n_layer": 3}, kv_sharing=(0, 0, 2)), 4, 1, 16),
]


def test_the_formula_agrees_with_the_compiled_programs():
    assert compiled(CASES) == [by_formula(case) for case in CASES]


def test_the_devices_that_can_share_the_heads():
    xl = lj.GPT2Config.from_preset("gpt2-xl")
    assert degrees(xl, 64) == [1, 5, 25]
    grouped = lj.GPT2Config(n_embd=96, n_head=12, num_kv_heads=4, n_inner=384)
    assert degrees(grouped, 64) == [1, 2, 4, 12]
