"""The evaluation harness' adapter against `choices`, `score` and `generate`, and a stand-in of the harness."""

import abc
import json
import sys
import types

import jax
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


def test_one_request_that_is_too_long_ends_nothing(model, harness, caplog):
    size = model.config.n_positions
    short, long, empty = harness.loglikelihood([request("a", "b"), request("a", "b" * (size + 6)), request("a", "")])
    assert short == harness.loglikelihood([request("a", "b")])[0]
    assert "request 1: 70 tokens to score, more than the context" in caplog.text
    expected = 0.0
    windows = rolling_windows(model.tokenizer.encode("b" * (size + 6)), model.tokenizer.encode("a")[0], size)
    for context, continuation in windows:
        logits = lj.forward(model.params, model.config, [[*context, *continuation][:-1]])[0]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[len(context) - 1 :]
        expected += sum(row[id] for row, id in zip(logprobs, continuation, strict=True))
    assert long[0] == pytest.approx(expected, rel=1e-4)
    assert empty == (0.0, True)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_change_nothing(model, batch_size):
    pairs = [(f"{chr(97 + i)} text" * (i % 3 + 1), " abc"[: i % 4 + 1]) for i in range(11)]
    found = HarnessModel(model, batch_size=batch_size).loglikelihood([request(*pair) for pair in pairs])
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        (choice,) = lj.choices(model, context, [continuation])
        assert (total, greedy) == (pytest.approx(choice.total, rel=1e-4), choice.is_greedy)


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


def test_a_long_generation_does_not_cut_the_context(model, harness, caplog):
    context = "0123456789" * 5
    for wanted in (63, 64, 500):
        (text,) = harness.generate_until([request(context, {"max_gen_toks": wanted})])
        assert text == lj.generate(model, context, 15).text
    assert "request 0: at most 15 new tokens, as the context has no room for 500" in caplog.text
    caplog.clear()
    (text,) = harness.generate_until([request(context, {"max_gen_toks": 30})])
    assert text == lj.generate(model, context[-35:], 30).text
    assert "request 0: the first 15 tokens of the context left out" in caplog.text


def test_a_batch_of_generations_has_the_texts_of_each_alone(harness):
    settings = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.5, "top_k": -1, "until": ["zq", ""]}
    requests = [request("Once"[: i % 4 + 1], settings if i % 3 else {"max_gen_toks": 5}) for i in range(9)]
    together = harness.generate_until(requests)
    for number in (0, 1, 4):
        padded = [request("x", {"max_gen_toks": 1})] * number + [requests[number]]
        assert harness.generate_until(padded)[number] == together[number]


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"top_k": -1, "top_p": 3}, {"temperature": 0.7}])
def test_settings_of_the_sampler_do_not_matter_where_nothing_is_drawn(model, harness, settings):
    (text,) = harness.generate_until([request("Once", {"max_gen_toks": 6, **settings, "do_sample": False})])
    assert text == lj.generate(model, "Once", 6).text


def test_unknown_settings_are_named_before_anything_runs(harness, monkeypatch):
    monkeypatch.setattr(lm_eval, "continue_texts", lambda *_: pytest.fail("ran"))
    with pytest.raises(lj.OptionError, match="repeat_penalty: got an unknown option; expected repetition_penalty"):
        harness.generate_until([request("a", {}), request("a", {"repeat_penalty": 2.0})])
    for name, value in (("temperature", "warm"), ("top_k", "some"), ("until", 5), ("max_gen_toks", [])):
        with pytest.raises(lj.LlorchError, match=f"{name}: expected"):
            harness.generate_until([request("a", {}), request("a", {"do_sample": True, name: value})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrain": "demo"}, "model_args: expected pretrained, .*; got pretrain"),
        ({"batch_size": "many"}, "batch_size: expected a whole number from 1 up, got 'many'"),
        ({"max_gen_toks": 0}, "max_gen_toks: expected"),
        ({"device": "cuda"}, "device: expected cpu, got 'cuda'"),
    ],
)
def test_wrong_model_arguments_are_named(model, arguments, message):
    with pytest.raises(lj.OptionError, match=message):
        HarnessModel(model if "pretrain" not in arguments else "demo", **arguments)
    assert HarnessModel(model, batch_size="auto:4", max_batch_size="2", max_gen_toks="12").batch_size == 2


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


def test_the_harness_itself_runs_local_tasks(model, tmp_path, monkeypatch):
    """Needs the extra `eval`. Both kinds of requests, through the harness' own loading of tasks and metrics."""
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="needs the extra `eval`")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    documents = [{"text": "Once", "choices": [" a", " bc"], "label": i % 2} for i in range(4)]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "documents.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
target_delimiter: ""
"""
    choosing = """
task: local_choices
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
    writing = """
task: local_writing
output_type: generate_until
doc_to_target: none
generation_kwargs: {until: [never there], max_gen_toks: 6, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
"""
    for name, task in (("choices", choosing), ("writing", writing)):
        (tmp_path / f"{name}.yaml").write_text(common + task)
    made = lm_eval.register()(pretrained=model)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = evaluator.simple_evaluate(
        made, tasks=["local_choices", "local_writing"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    expected = [choice.total for choice in lj.choices(model, "Once", [" a", " bc"])]
    assert found["results"]["local_choices"]["acc,none"] == 0.5
    for sample in found["samples"]["local_choices"]:
        np.testing.assert_allclose([total for total, _ in sample["filtered_resps"]], expected, rtol=1e-4)
    written = [sample["resps"][0][0] for sample in found["samples"]["local_writing"]]
    assert written == [lj.generate(model, "Once", 6).text] * 4
