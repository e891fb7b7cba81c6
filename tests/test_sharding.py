"""A model over many devices: the same logits and tokens, and nothing that devices tell each other but two sums."""

import json

import pytest
from devices import answer
from profiles import THOROUGH

from llorch_jax.cache.layouts import LAYOUTS

NUMBERS = {"rotating": "rotating:9+2", "paged": "paged:8", "recent": "recent:9", "sinks": "sinks:9", "h2o": "h2o:9"}
SPECS = [NUMBERS.get(name, "snapkv:9" if name == "snapkv" else name) for name in LAYOUTS]
MESHES = ["1x2", "2x2", "4x2"]  # data x model: 2, 4 and 8 devices
# In `make test` each layout is on one of them; pages, which are on all devices, also where rows are divided.
CASES = [(mesh, spec) for number, spec in enumerate(SPECS) for mesh in (MESHES if THOROUGH else [MESHES[number % 3]])]
CASES += [] if ("2x2", "paged:8") in CASES else [("2x2", "paged:8")]
ROWS_ALONE = [("2x1", spec) for spec in ("static", "rotating:9+2", *(["int8", "h2o:9"] if THOROUGH else []))]

STEPS = """
import collections, json, re, sys
import jax, numpy as np
import llorch_jax as lj
from llorch_jax.decoding import steps

COLLECTIVE = r" (all-\\w+|collective-\\w+|reduce-scatter)(?:-start)?\\("
config = lj.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
params = jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(config, jax.random.key(0)))
prompt = np.arange(20, dtype=np.int32).reshape(4, 5)
tokens = np.arange(64, dtype=np.int32).reshape(16, 4)

def run(params, config, spec):
    cache = lj.make_cache(config, spec, batch_size=4)
    logits, cache = lj.prefill(params, config, prompt, cache, np.array([5, 3, 5, 1], np.int32))
    out = [logits]
    for token in tokens:
        logits, cache = lj.decode_step(params, config, token, cache)
        out.append(logits)
    return np.stack(out), cache

expected, models, found = {}, {}, []
for sizes, spec in json.loads(sys.argv[1]):
    if spec not in expected:
        expected[spec] = run(params, config, spec)[0]
    if sizes not in models:
        data, model = map(int, sizes.split("x"))
        models[sizes] = lj.shard(lj.Model(config, params), lj.make_mesh(data=data, model=model))
    spread, before = models[sizes], lj.compile_count()
    logits, cache = run(spread.params, spread.config, spec)
    programs = lj.compile_count() - before
    text = steps.decode.lower(spread.params, spread.config, tokens[0], cache).compile().as_text()
    stored = jax.tree.leaves(cache.keys)[0]
    found.append({
        "mesh": sizes,
        "cache": spec,
        "error": float(np.abs(logits - expected[spec]).max()),
        "collectives": collections.Counter(re.findall(COLLECTIVE, text)),
        "slots_moved": len(re.findall(r" all-gather\\(f32\\[\\d+,\\d+,(?:[89]|\\d\\d+),", text)),
        "in_place": text.count("may-alias") + text.count("must-alias"),
        "arrays": len(jax.tree.leaves(cache)),
        "part": stored.addressable_shards[0].data.size / stored.size,
        "programs": programs,
    })
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def steps():
    return answer(STEPS, 8, json.dumps([*CASES, *ROWS_ALONE]))


def test_every_layout_on_2_4_and_8_devices_adds_up_twice_per_layer_and_does_nothing_else(steps):
    assert {case["cache"] for case in steps} == set(SPECS)
    assert len(steps) == len(CASES) + len(ROWS_ALONE)
    for case in steps[: len(CASES)]:
        assert case["error"] < 1e-5, case
        rows = int(case["mesh"][0])
        paged = case["cache"].startswith("paged")
        said = dict(case["collectives"])
        if paged and rows > 1:  # every page is on all devices, which tell each other what is new
            assert said.pop("all-gather") > 0
        assert said == {"all-reduce": 4}, case  # two layers
        assert case["slots_moved"] == 0, case
        assert case["part"] == 1 / 2 / (1 if paged else rows), case
        assert case["in_place"] >= case["arrays"], case
        assert case["programs"] <= 4, case  # a prefill, and a step for each size of a cache that grows


def test_rows_alone_need_nothing_from_each_other(steps):
    for case in steps[len(CASES) :]:
        assert case["error"] < 1e-5
        assert case["collectives"] == {}


FUNCTIONS = """
import json, sys
import jax, numpy as np
import llorch_jax as lj, tiny

mesh = lj.make_mesh(data=2, model=2)
model = tiny.random_model()
spread = lj.shard(model, mesh)
draft = tiny.random_model(n_layer=1)
PROMPT, ROWS = "The old woman said", ["The old woman", "a b", "hello", "x"]
prompt = np.arange(20, dtype=np.int32).reshape(4, 5) + 60

def session(m):
    made = lj.Session.start(m.params, m.config, prompt)
    first, made = made.generate(m.params, m.config, 4)
    lj.save_session(sys.argv[1], made, fingerprint=lj.fingerprint(m.params, m.config))
    made = lj.load_session(sys.argv[1], fingerprint=lj.fingerprint(m.params, m.config))
    return [first.tolist(), made.generate(m.params, m.config, 8)[0].tolist()]

def engine(m):
    forms = [{}, {"regex": "[a-f]{8,12}"}, {}]
    settings = [{"temperature": 0.8, "seed": i, **form} for i, form in enumerate(forms)]
    requests = [*zip(ROWS, settings), ("y" * 16, {"temperature": 0}), (ROWS[0], {"temperature": 0})]
    if m is model:  # what an engine must give
        return [lj.generate(m, text, 6, **each).text for text, each in requests]
    with lj.Engine(m, slots=2, page_size=8, num_pages=3, offload_bytes=2**20) as running:
        handles = [running.submit(text, 6, **each) for text, each in requests[:3]]
        found = [handle.result().text for handle in handles]
        for text, each in requests[3:]:  # the first evicts all pages, then one comes back
            found.append(running.submit(text, 6, **each).result().text)
        assert running.stats().offload.restored == 1
        return found

def pooled(m):
    pool = lj.CachePool()
    for _ in range(2):
        cache = pool.acquire(lj.StaticCache, m.config, mesh=m.params.mesh, batch_size=4, capacity=16)
        tokens, cache = lj.generate_tokens(m.params, m.config, prompt, 6, cache=cache)
        pool.release(cache)
    return [tokens.tolist(), pool.memory_usage()]

CALLS = {
    "forward": lambda m: np.asarray(lj.forward(m.params, m.config, prompt)).argmax(-1).tolist(),
    "generate": lambda m: lj.generate(m, PROMPT, 12).text,
    "batch": lambda m: [out.text for out in lj.generate(m, ROWS, 12, temperature=0.9, top_k=20, seed=3)],
    "penalties": lambda m: lj.generate(m, PROMPT, 12, temperature=0.9, repetition_penalty=1.3).text,
    "stream": lambda m: "".join(piece.text for piece in lj.stream(m, PROMPT, 12)),
    "stream_tokens": lambda m: np.array(list(lj.stream_tokens(m.params, m.config, prompt, 6))).tolist(),
    "generate_n": lambda m: [out.text for out in lj.generate_n(m, PROMPT, 4, max_new_tokens=8, cache="paged:8")],
    "beams": lambda m: lj.generate(m, PROMPT, 8, num_beams=4).text,
    "contrastive": lambda m: lj.generate(m, PROMPT, 8, penalty_alpha=0.6).text,
    "score": lambda m: round(lj.score(m, PROMPT).bits_per_byte, 4),
    "choices": lambda m: [round(float(np.sum(each.logprobs)), 3) for each in lj.choices(m, PROMPT, ["a", "bb"])],
    "lookup": lambda m: lj.generate_speculative(m, PROMPT, 12)[0].text,
    "draft": lambda m: lj.generate_speculative(m, PROMPT, 12, draft=draft)[0].text,
    "regex": lambda m: lj.generate(m, PROMPT, 12, regex="[a-f]{8,12}").text,
    "evicting": lambda m: [out.text for out in lj.generate(m, ROWS, 44, cache="h2o:9")],
    "session": session,
    "engine": engine,
    "pool": pooled,
}
print(json.dumps({name: [call(model), call(spread)] for name, call in CALLS.items() if name in sys.argv[2:]}))
"""


NAMES = [
    ("forward", "generate", "batch", "penalties", "stream", "stream_tokens", "score", "choices"),
    ("generate_n", "beams", "contrastive", "lookup", "draft", "regex", "evicting", "session", "engine", "pool"),
]


@pytest.mark.parametrize("names", NAMES if THOROUGH else [sum(NAMES, ())], ids=len)
def test_every_function_gives_what_it_gives_on_one_device(names, tmp_path):
    found = answer(FUNCTIONS, 4, str(tmp_path / "session.safetensors"), *names)
    assert set(found) == set(names)
    for name, (one, many) in found.items():
        assert one == many, name


MODELS = """
import json, warnings
import jax, numpy as np
import llorch_jax as lj

FIELDS = {"vocab_size": 64, "n_positions": 32, "n_embd": 128, "n_layer": 1, "n_head": 8}
tokens = np.arange(20, dtype=np.int32).reshape(4, 5)
mesh = lj.make_mesh(data=2, model=4)

def made(weights=None, group_size=None, **changes):
    config = lj.GPT2Config(**{**FIELDS, **changes})
    params = jax.tree.map(lambda x: x * 10 if x.ndim == 2 else x, lj.init_params(config, jax.random.key(0)))
    return lj.Model(config, lj.quantize(params, weights, group_size) if weights else params)

def compared(model, mesh=mesh):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        spread = lj.shard(model, mesh)
    one, many = (np.asarray(lj.forward(m.params, m.config, tokens)) for m in (model, spread))
    held = lj.make_cache(spread.config, "static", batch_size=4).dims[1]
    return [float(np.abs(one - many).max() / np.abs(one).max()), held, [str(each.message) for each in told]]

def refused(call):
    try:
        call()
    except lj.MeshError as error:
        return str(error)

sharded = lj.shard(made(), mesh)
print(json.dumps({
    "weights": [compared(made(*form)) for form in (("bfloat16",), ("int8",), ("int8", 32), ("int4", 32))],
    "rounded": compared(made("w8a8"), lj.make_mesh(data=2, model=1)),
    "grouped": compared(made(num_kv_heads=4)),
    "shared": compared(made(num_kv_heads=2)),
    "single": compared(made(num_kv_heads=1)),
    "refused": {
        "devices": refused(lambda: lj.make_mesh(data=4, model=4)),
        "number": refused(lambda: lj.make_mesh(data=0)),
        "heads": refused(lambda: lj.shard(made(n_embd=60, n_head=6), mesh)),
        "inner": refused(lambda: lj.shard(made(n_inner=30), mesh)),
        "key/value heads": refused(lambda: lj.shard(made(n_embd=96, n_head=12, num_kv_heads=3), lj.make_mesh(1, 2))),
        "groups": refused(lambda: lj.shard(made("int4", 64), mesh)),
        "rounded": refused(lambda: lj.shard(made("w8a8"), mesh)),
        "axes": refused(lambda: lj.shard(made(), jax.sharding.Mesh(np.array(jax.devices()), ("x",)))),
        "twice": refused(lambda: lj.shard(sharded, mesh)),
        "config": refused(lambda: lj.forward(sharded.params, made(num_kv_heads=1).config, tokens)),
        "probes": refused(lambda: lj.intermediates(sharded.params, sharded.config, tokens)),
    },
}))
"""


@pytest.fixture(scope="module")
def models():
    return answer(MODELS)


def test_quantized_weights_are_cut_by_rows_and_by_whole_groups(models):
    floats, *codes = (error for error, _, _ in models["weights"])
    assert floats < 1e-5
    assert max(codes) < 5e-4  # native kernels, which serve on the mesh only, round activations to 16 bits
    assert models["rounded"][0] < 2e-3  # to 8 bits, everywhere: a code is rounded otherwise here or there


def test_heads_that_are_too_few_are_repeated_with_a_warning(models):
    assert models["grouped"][1:] == [4, []]
    for name, said in (
        ("shared", "2 key/value heads are repeated 2 times"),
        ("single", "1 key/value head is repeated"),
    ):
        error, held, (warning,) = models[name]
        assert error < 1e-6
        assert held == 4
        assert said in warning


def test_refusals_say_what_was_expected_and_what_was_given(models):
    said = models["refused"]
    for name, (expected, got) in {
        "devices": ("16 devices for data=4 and model=4", "--xla_force_host_platform_device_count=16"),
        "number": ("data", "0"),
        "heads": ("n_head=6", "model=4"),
        "inner": ("inner width 30", "model=4"),
        "key/value heads": ("3", "model=2"),
        "groups": ("block 0, attn_proj", "2 groups"),
        "rounded": ("block 0, attn_proj: expected weights whose activations are not rounded", "w8a8"),
        "axes": ("data and model", "Mesh"),
        "twice": ("single device", "already"),
        "config": ("the model that shard returned", "1 key/value heads"),
        "probes": ("one device", "mesh"),
    }.items():
        assert expected in said[name], name
        assert got in said[name], name


PARTS = """
import json, sys
import jax, numpy as np
import llorch_jax as lj
import tiny

directory, made = sys.argv[1], tiny.random_model(num_kv_heads=4)
lj.save_model(directory + "/float", made.config, made.params)
lj.quantize_model(directory + "/float", directory + "/int8", "int8")
for mesh in (lj.make_mesh(2, 2), lj.make_mesh(1, 4), lj.make_mesh(2, 1)):
    for name, weights in (("float", None), ("float", "bfloat16"), ("float", "int8"), ("int8", None)):
        source = f"{directory}/{name}"
        expected, got = lj.shard(lj.load(source, weights=weights), mesh), lj.load(source, weights=weights, mesh=mesh)
        assert jax.tree.structure(got.params) == jax.tree.structure(expected.params), (name, weights)
        for one, other in zip(jax.tree.leaves(got.params), jax.tree.leaves(expected.params), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim), (name, weights)
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
few = tiny.random_model(num_kv_heads=1)
lj.save_model(directory + "/few", few.config, few.params)
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert lj.load(directory + "/few", mesh=lj.make_mesh(1, 2)).config.kv_heads == 2
assert "repeated" in str(said[0].message)
print(json.dumps("done"))
"""


def test_a_model_loaded_onto_a_mesh_is_the_one_that_is_spread_later(tmp_path):
    assert answer(PARTS, 4, str(tmp_path)) == "done"
