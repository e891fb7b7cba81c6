"""The engine's benchmark: its trace is always the same, its figures are those of known times."""

import sys

import jax
import jax.numpy as jnp
import pytest
from profiles import THOROUGH

import llorch_jax as lj
from benchmarks import arrivals, engine, engine_peer
from benchmarks.agreement import judged, tell_agreement
from benchmarks.measure import random_model
from benchmarks.peer_process import PeerError

FAKE = '''
"""A server that counts up from a prompt's first token, and only takes greedy requests that nothing is cached for."""
import json, os, socketserver, threading, time
from http.server import BaseHTTPRequestHandler
from worker import answer_requests

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        settings = asked["top_k"], asked["samplers"], asked["ignore_eos"], asked["cache_prompt"], asked["stream"]
        right = self.path == "/completion" and settings == (1, ["top_k"], True, False, True)
        self.send_response(200 if right else 400)
        self.end_headers()
        for number in range({new}):
            time.sleep(0.002)
            event = {{"content": "", "tokens": [asked["prompt"][0] + number]}}
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b'data: {{"content": "", "stop": true}}\\n\\n')

    def log_message(self, *_):
        pass

def start(directory, work, threads, slots, context, unified):
    address = f"{{work}}/{{os.getpid()}}.sock"
    server = socketserver.ThreadingUnixStreamServer(address, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    build = f"{{sorted(os.listdir(directory))[0]}}, {{slots}} slots, {{context}} tokens, {{unified}}"
    return {{"socket": address, "versions": {{"fake": "1"}}, "build": build}}

answer_requests({{"start": start}})
'''
CONFIG = lj.GPT2Config(vocab_size=97, n_positions=64, n_embd=8, n_layer=1, n_head=1)


def test_a_trace_depends_on_its_seed_only_and_fits_the_context():
    first, second, other = (arrivals.trace(CONFIG, 30, 5.0, seed) for seed in (1, 1, 2))
    assert first == second != other
    assert all(len(each.prompt) + each.new - 1 <= CONFIG.n_positions for each in first)
    assert [each.at for each in first] == sorted(each.at for each in first)
    assert 30 / first[-1].at == pytest.approx(5.0, rel=0.5)


def test_figures_of_known_times():
    times = [
        arrivals.Times(arrivals.Arrival(1.0, [1], 3), [1.5, 1.75, 2.0]),
        arrivals.Times(arrivals.Arrival(2.0, [1], 2), [2.25, 3.0]),
    ]
    found = arrivals.summary(times)
    assert found["tokens_per_second"] == pytest.approx(5 / 2.0)
    assert found["first_token_ms"]["p50"] == pytest.approx(375.0)
    assert found["between_tokens_ms"]["p50"] == pytest.approx(250.0)
    assert found["between_tokens_ms"]["p99"] == pytest.approx(740.0)


def run_fake(folder, new):
    """A trace of two requests for three tokens, run by a server that gives so many; what is expected of the second."""
    script = folder / "fake.py"
    script.write_text(FAKE.format(new=new))
    asked = [arrivals.Arrival(0.0, [5, 6], 3), arrivals.Arrival(0.05, [8], 3)]
    expected = [arrivals.Times(asked[0], ids=[5, 6, 7]), arrivals.Times(asked[1], ids=[8, 9, 0])]
    config, params = random_model("tiny")
    return engine_peer.run_servers({"fake": (sys.executable, script)}, config, params, 2, asked, 1, expected)


def test_a_peers_server_runs_the_same_trace(tmp_path):
    runs, about = run_fake(tmp_path, 3)
    assert list(runs) == ["fake, a cache per slot", "fake, one cache"]
    for (times,) in runs.values():
        assert [each.ids for each in times] == [[5, 6, 7], [8, 9, 10]]
        for each in times:
            assert each.arrival.at < each.tokens[0] < each.tokens[1] < each.tokens[2]
    assert [line["same"] for line in about["agreement"]] == [5, 5]
    context = random_model("tiny")[0].n_positions
    assert about["builds"]["fake, one cache"] == f"config.json, 2 slots, {context} tokens, True"
    assert tell_agreement(about) == 1
    assert about["agreement"][0]["wrong"].startswith("our row 1, token 2: expected a logit at most 2e-05 below")


def greedy(config, params, tokens, new, banned=None):
    """Greedy tokens by `forward`, of which one id is never chosen."""
    out = []
    for _ in range(new):
        logits = lj.forward(params, config, [[*tokens, *out, *[0] * (new - len(out))]])[0, len(tokens) + len(out) - 1]
        logits = logits if banned is None else logits.at[banned].set(-jnp.inf)
        out.append(int(logits.argmax()))
    return out


def verdict(line, capsys):
    code = tell_agreement({"agreement": [{"case": "trace", "contender": "peer", "exact": True} | line]})
    return code, capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def texts():
    """The tiny model, two prompts and the greedy tokens after them."""
    config, params = random_model("tiny")
    prompts = [[5, 6, 7], [8, 9]]
    return config, params, prompts, [greedy(config, params, prompt, 6) for prompt in prompts]


def test_near_ties_of_two_logits_are_accepted_and_others_are_not(texts, capsys):
    config, params, prompts, ours = texts
    logits = lj.forward(params, config, [prompts[1] + ours[1][:2]])[0, -1]
    values, ids = jax.lax.top_k(logits, 2)
    gap = float(values[0] - values[1])
    start = [*ours[1][:2], int(ids[1])]
    theirs = [ours[0], start + greedy(config, params, prompts[1] + start, 3)]
    accepted = judged(params, config, prompts, ours, theirs, 1.01 * gap)
    assert (accepted["equal"], accepted["rows"], accepted["same"], accepted["wrong"]) == (1, 2, 8, None)
    assert accepted["gap"] == pytest.approx(gap)
    code, said = verdict(accepted, capsys)
    assert code == 0
    assert said.startswith(
        f"trace peer: 1 of 2 rows agree; the others differ by near ties, logits at most {gap:.2g} below"
    )
    code, said = verdict(judged(params, config, prompts, ours, theirs, 0.99 * gap), capsys)
    assert code == 1
    assert "row 1, token 2: expected a logit at most" in said
    worse = [ours[0], [*start, *[int(logits.argmin())] * 3]]  # a near tie first, and then something else
    assert judged(params, config, prompts, ours, worse, 1.01 * gap)["wrong"].startswith("row 1, token 3: expected")


def test_a_token_that_a_peer_bans_is_accepted_in_our_text_only(texts, capsys):
    config, params, prompts, ours = texts
    banned = ours[1][0]
    theirs = [ours[0], greedy(config, params, prompts[1], 6, banned)]
    found = judged(params, config, prompts, ours, theirs, 1e-4, banned)
    assert (found["wrong"], found["banned"]) == (None, True)
    code, said = verdict(found, capsys)
    assert code == 0
    assert said.endswith("(without the end-of-text token, which it bans)")
    assert judged(params, config, prompts, ours, theirs, 1e-4)["wrong"].startswith("row 1, token 0: expected")


def test_a_peer_that_is_right_where_we_are_not_is_a_failure(texts):
    config, params, prompts, ours = texts
    other = [[*ours[0][:3], ours[0][3] + 1, *ours[0][4:]], ours[1]]
    assert judged(params, config, prompts, other, ours, 1e-4)["wrong"].startswith("our row 0, token 3: expected")


def test_a_server_that_gives_fewer_tokens_is_an_error(tmp_path):
    with pytest.raises(PeerError, match="fake: expected 3 tokens, got 2"):
        run_fake(tmp_path, 2)


def test_a_peer_without_a_server_is_refused(capsys):
    with pytest.raises(SystemExit):
        engine.main(["--peer", "transformers=python"])
    assert "expected NAME=PYTHON with one of llama.cpp; got transformers=python" in capsys.readouterr().err


def test_the_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks.engine_plot import plot

    latencies = {"p50": 1.0, "p95": 20.0, "p99": 300.0}
    rows = [{"name": name, "first_token_ms": latencies, "between_tokens_ms": latencies} for name in "abcde"]
    prefix = {"tokens": 512, "computed": 300.0, "cached": 9.0, "restored": 30.0}
    setting = {"preset": "tiny", "requests": 3, "rate": 1.5, "slots": 2}
    plot({"setting": setting, "rows": rows, "prefix_hit_ms": prefix}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(not THOROUGH, reason="compiles for a minute; LLORCH_TESTS=thorough runs it")
def test_it_runs_on_a_tiny_model(capsys):
    figures = engine.measure("tiny", 6, 30.0, 2, 1, {})
    assert [row["name"] for row in figures["rows"]] == ["engine", "one at a time", "static batches"]
    engine.show(figures)
    said = capsys.readouterr().out
    assert "if it is in the second pool" in said
    assert "x generate_tokens" in said
