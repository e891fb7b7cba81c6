"""The evaluation harness' adapter against `choices`, `score` and `generate`, and a stand-in of the harness."""

import abc
import sys
import types

import numpy as np
import pytest
import tiny

import llorch_jax as lj
from llorch_jax.evaluation import lm_eval
from llorch_jax.evaluation.lm_eval import HarnessModel, rolling_windows

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 1, "num_kv_heads": 1}  # compiles in no time


def request(*args):
    return types.SimpleNamespace(args=args)


@pytest.fixture(scope="module")
def model():
    return tiny.random_model(bos_token_id=tiny.END_OF_TEXT, **SMALL)


@pytest.fixture(scope="module")
def harness(model):
    return HarnessModel(model, batch_size=4, device="cpu")


def test_loglikelihood_is_that_of_choices(model, harness):
    pairs = [("Once", " a"), ("Other", " bc"), ("Once", " the"), ("Once ", "a"), ("", "abc")]
    results = harness.loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(pairs, results, strict=True):
        (choice,) = lj.choices(model, context, [continuation])
        assert total == pytest.approx(choice.total, rel=1e-4)
        assert greedy == choice.is_greedy


def test_long_contexts_lose_their_first_tokens(model, harness):
    size = model.config.n_positions
    context, continuation = "".join(chr(97 + i * i % 26) for i in range(90)), "xyz"
    ((total, _),) = harness.loglikelihood([request(context, continuation)])
    (choice,) = lj.choices(model, context[-(size + 1 - 3) :], [continuation])
    assert total == pytest.approx(choice.total, rel=1e-4)
    with pytest.raises(lj.TokenError, match=f"expected 1 .. {size} tokens, got 65"):
        harness.loglikelihood([request("a", "b" * 65)])


def test_rolling_windows_by_hand():
    """The example of the harness' own documentation, and the edges."""
    found = list(rolling_windows(list(range(10)), 99, 4))
    assert found == [([99], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert list(rolling_windows([1, 2], 99, 4)) == [([99], [1, 2])]
    assert list(rolling_windows(list(range(4)), 99, 4)) == [([99], [0, 1, 2, 3])]
    assert list(rolling_windows([], 99, 4)) == []


def test_rolling_loglikelihood_of_a_text_within_the_context_is_its_score(model, harness):
    texts = ["Once upon a time", "b"]
    results = harness.loglikelihood_rolling([request(text) for text in texts])
    np.testing.assert_allclose(results, [lj.score(model, text).total for text in texts], rtol=1e-4)


def test_rolling_loglikelihood_beyond_the_context(model, harness):
    """Where whole windows fit exactly, they are those of `score` with a stride of the context."""
    text = "".join(chr(97 + i * i % 26) for i in range(2 * model.config.n_positions))
    (total,) = harness.loglikelihood_rolling([request(text)])
    assert total == pytest.approx(lj.score(model, text, stride=model.config.n_positions).total, rel=1e-4)


def test_generation_is_greedy_and_stops_at_a_string(model, harness):
    plain = lj.generate(model, "Once", 12).text
    stop = plain[5:7]
    settings = [{"max_gen_toks": 12}, {"max_gen_toks": 12, "until": [stop, "never there"]}, {"max_gen_toks": 3}]
    results = harness.generate_until([request("Once", each) for each in settings])
    assert results == [plain, plain[: plain.index(stop)], lj.generate(model, "Once", 3).text]


def test_generation_draws_where_a_task_says_so(harness):
    settings = {"max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    first, second = harness.generate_until([request("Once", settings)] * 2)
    assert first != second
    assert harness.generate_until([request("Once", settings)]) == [first]


def test_generation_ends_with_the_text():
    harness = HarnessModel(tiny.reciting_model("abcdef"))
    requests = [request("ab", {"until": until, "max_gen_toks": 20}) for until in ("zz", "e")]
    assert harness.generate_until(requests) == ["cdef", "cd"]


@pytest.fixture
def stand_in(monkeypatch):
    """The parts of lm_eval that the adapter touches, as the harness has them."""

    class LM(abc.ABC):
        def __init__(self):
            self._rank, self._world_size, self.cache_hook = 0, 1, None

        @abc.abstractmethod
        def loglikelihood(self, requests): ...

        @abc.abstractmethod
        def loglikelihood_rolling(self, requests): ...

        @abc.abstractmethod
        def generate_until(self, requests): ...

        @classmethod
        def create_from_arg_obj(cls, arg_dict, additional_config):
            return cls(**arg_dict, **additional_config)

    names: dict = {}
    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    modules["lm_eval.api.registry"] = types.ModuleType("lm_eval.api.registry")
    modules["lm_eval.__main__"] = types.ModuleType("lm_eval.__main__")
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.api.registry"].register_model = lambda *keys: lambda cls: names.update({keys[0]: cls}) or cls
    modules["lm_eval.__main__"].cli_evaluate = lambda: names.update(ran=True)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return names


def test_registers_with_the_harness(model, stand_in):
    lm_eval.main()
    assert stand_in["ran"]
    made = stand_in["llorch-jax"].create_from_arg_obj({"pretrained": model}, {"batch_size": 1})
    assert made._world_size == 1
    kept = []
    made.cache_hook = types.SimpleNamespace(add_partial=lambda *args: kept.append(args))
    results = made.loglikelihood([request("Once", " a")])
    assert kept == [("loglikelihood", ("Once", " a"), results[0])]
    assert (made.max_length, made.tokenizer_name) == (64, "tiny")


def test_without_the_harness_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(lj.LlorchError, match="install the package lm-eval"):
        lm_eval.register()


def test_a_model_without_a_first_token_cannot_roll():
    with pytest.raises(lj.TokenError, match="begin-of-text or end-of-text"):
        HarnessModel(tiny.random_model(**SMALL)).loglikelihood_rolling([request("a")])
