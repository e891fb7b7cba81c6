"""Conversations: what is prefilled, undo, regenerated replies, branches and files."""

import dataclasses

import numpy as np
import pytest
import tiny
from profiles import some

import llorch_jax as lj
from llorch_jax.errors import ChatError
from llorch_jax.text import timing
from llorch_jax.text.chat import RAW, Chat, Template


@pytest.fixture(scope="module")
def model(short_demo):
    return lj.load(short_demo)


def say(chat, words, count=12):
    return "".join(chat.reply(words, count))


@pytest.mark.parametrize("cache", some(["static", "dynamic", "paged", "int8", "h2o:512", "rotating:512"], 3))
def test_only_new_text_is_prefilled_and_turns_are_one_text(model, cache):
    chat = Chat(model, RAW, cache=cache)
    first = say(chat, "Once upon a time")
    assert chat.turns[-1].prefilled == len(model.tokenizer.encode("Once upon a time"))
    second = say(chat, " But the king")
    assert chat.turns[-1].prefilled == len(model.tokenizer.encode(" But the king")) + 1  # and the token sampled last
    assert chat.text == f"Once upon a time{first} But the king{second}"
    if cache != "int8":
        whole = lj.generate(model, f"Once upon a time{first} But the king", 12)
        assert second == whole.text


def test_undo_is_as_if_the_turn_had_not_been(model):
    chat = Chat(model, RAW, temperature=0.9, seed=4, repetition_penalty=1.2)
    say(chat, "Once upon a time")
    before = [*chat.tokens]
    second = say(chat, " there")
    chat.undo()
    assert chat.tokens == before
    assert say(chat, " there") == second
    chat.undo()
    chat.undo()
    assert (chat.tokens, chat.turns) == ([], [])
    with pytest.raises(ChatError, match="turn to take back"):
        chat.undo()
    with pytest.raises(ChatError, match="some text"):
        chat.reply("")


def test_branches_do_not_touch_each_other(model):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time")
    twin = chat.fork()
    other = say(twin, " The fox")
    mine = say(chat, " The queen")
    assert (twin.text[-len(other) :], chat.text[-len(mine) :]) == (other, mine)
    chat.undo()
    assert say(chat, " The fox") == other


def test_replies_end_before_the_users_role(model):
    stop = " the"
    template = Template("\nKing: ", "\nFox:", (stop,))
    chat = Chat(model, template, temperature=0.8, seed=1, system="A talk.")
    reply = say(chat, "Where do you go?", 60)
    assert stop not in reply
    assert chat.text == f"A talk.\nKing: Where do you go?\nFox:{reply}"
    held = int(np.asarray(chat.cache.lengths)[0])
    assert held < len(chat.tokens)
    again = Chat(model, template, temperature=0.8, seed=1, system="A talk.")
    say(again, "Where do you go?", 60)
    again.cache = again.cache.clear()  # all of it is read anew
    assert say(again, "And then?", 8) == say(chat, "And then?", 8)


def test_a_reply_that_is_closed_stays_as_far_as_it_was_read(model):
    chat = Chat(model, RAW)
    pieces = chat.reply("Once upon a time", 50)
    taken = "".join(next(pieces) for _ in range(3))
    pieces.close()
    assert chat.text == f"Once upon a time{taken}"
    assert say(chat, " and") == lj.generate(model, f"Once upon a time{taken} and", 12).text


def test_nothing_withheld_is_lost_where_the_model_ends():
    reciting = tiny.reciting_model("one two three")
    for stop, shown in (("three!", "ne two three"), (" three", "ne two")):
        chat = Chat(reciting, Template("", "", (stop,)))
        assert say(chat, "o", 20) == shown
        assert (chat.text, chat.turns[-1].ended) == (f"o{shown}", "stop")
        chat = Chat(reciting, RAW, stop=stop)
        assert say(chat, "o", 20) == shown


def test_a_reply_under_way_has_the_conversation_for_itself(tmp_path):
    chat = Chat(tiny.random_model(), RAW)
    under_way, late = chat.reply("Once", 6), chat.reply("A", 2)
    text = next(under_way)
    others = [chat.undo, chat.new, chat.fork, chat.regenerate, lambda: chat.reply("A"), lambda: next(late)]
    for other in [*others, lambda: chat.save(tmp_path / "chat"), lambda: chat.load(tmp_path / "chat")]:
        with pytest.raises(ChatError, match="expected the reply before to be read to its end or closed"):
            other()
    chat.save(tmp_path / "text", with_cache=False)  # as after a fault in the middle of a reply
    assert text + "".join(under_way) == say(Chat(chat.model, RAW), "Once", 6)
    chat.undo()
    assert say(chat, "Once", 6).startswith(text)


def test_options_that_a_conversation_cannot_use_are_refused(model):
    for options, message in (
        ({"num_beams": 2}, "num_beams: expected none with chat"),
        ({"max_tokens": 2}, "max_tokens: .*expected max_new_tokens"),
        ({"seed": [1]}, "seed: expected one"),
    ):
        with pytest.raises(lj.OptionError, match=message):
            Chat(model, RAW, **options)


@pytest.mark.parametrize("words", [None, 5, b"Once", ["Once"]])
def test_words_that_are_no_text_are_refused(model, words):
    chat = Chat(model)
    with pytest.raises(ChatError, match="words: expected a text, got "):
        chat.reply(words)
    assert not chat.turns


def test_ids_that_the_tokenizer_lacks_are_never_said():
    wide = tiny.random_model(n_layer=1, n_embd=16, n_head=1, num_kv_heads=1, vocab_size=320)
    weights = wide.params.wte
    wide = dataclasses.replace(wide, params=wide.params.replace(wte=weights.at[257:].set(50 * weights[:63])))
    chat = Chat(wide, RAW)
    say(chat, "Once", 8)
    assert max(chat.tokens) < 257


def test_a_full_context_is_told_and_changes_nothing(model):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time", 600)  # as many as there is room for
    assert len(chat.tokens) == model.config.n_positions
    assert chat.turns[-1].ended == "context"
    before = [*chat.tokens]
    with pytest.raises(lj.CapacityError, match=r"a turn of 0 tokens or fewer.*take back a turn"):
        chat.reply(" more")
    assert chat.tokens == before


def test_a_cache_may_hold_less_than_the_context(model):
    chat = Chat(model, RAW, cache="static:32")
    say(chat, "Once upon a time", 100)
    assert (len(chat.tokens), chat.turns[-1].ended) == (32, "context")
    with pytest.raises(lj.CapacityError, match="context of 32"):
        chat.reply(" more")


def test_turns_tell_why_the_reply_ended_and_where_the_time_went(model):
    chat = Chat(model, RAW)
    assert chat.turns == []
    say(chat, "Once upon a time", 8)
    turn = chat.turns[0]
    assert (turn.start, turn.generated, turn.ended, turn.timings.new_tokens) == (0, 8, "length", 8)
    assert turn.reply == len(model.tokenizer.encode("Once upon a time"))
    fresh = Chat(model, Template("", "", (" the",)))
    say(fresh, "Once upon a time", 60)
    assert fresh.turns[0].ended == "stop"
    pieces = fresh.reply(" A", 60)
    next(pieces)
    pieces.close()
    assert (fresh.turns[1].ended, fresh.turns[1].generated) == ("closed", 1)
    fresh.undo()
    assert fresh.turns[-1].ended == "stop"  # the turn before, not the one taken back


def test_compiling_is_not_counted_as_prefill(model, monkeypatch):
    seconds = iter([0.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(timing, "compile_seconds", lambda: next(seconds, 5.0))
    chat = Chat(model, RAW)
    say(chat, "Once upon a time", 4)
    assert chat.turns[0].timings.compile == 5.0
    assert chat.turns[0].timings.prefill < 5.0


def test_another_reply_to_the_same_words(model):
    chat = Chat(model, RAW, temperature=1.0, seed=4)
    first = say(chat, "Once upon a time")
    replies = {first, "".join(chat.regenerate(12)), "".join(chat.regenerate(12))}
    assert len(replies) == 3
    assert len(chat.turns) == 1
    assert "".join(chat.regenerate(12, seed=4)) == first
    chat.new()
    assert (chat.tokens, chat.turns) == ([], [])
    with pytest.raises(ChatError, match="a turn with a reply"):
        chat.regenerate()


def test_a_conversation_that_outgrows_the_context_keeps_its_first_and_newest_tokens(model):
    chat = Chat(model, RAW, overflow=lj.Reencode(sinks=4, window=100))
    say(chat, " upon" * 484, 1)
    before = [*chat.tokens]
    assert 470 < len(before) < 495
    say(chat, " The fox", 8)  # still fits
    assert chat.tokens[: len(before)] == before
    second = len(chat.tokens) - len(before)
    before = [*chat.tokens]
    reply = say(chat, " The queen said", 40)
    new = model.tokenizer.encode(" The queen said")
    kept = before[:4] + before[-100:]
    assert chat.tokens[: len(kept) + len(new)] == kept + new
    expected = lj.generate_tokens(model.params, model.config, [kept + new], max_new_tokens=40)[0]
    assert reply == model.tokenizer.decode(expected[0])
    assert [turn.start for turn in chat.turns] == [104 - second, 104]  # the first has lost tokens
    chat.undo()
    assert chat.tokens == kept
    with pytest.raises(lj.CapacityError, match="expected a turn of"):
        chat.reply(" word" * 500)
    assert chat.tokens == kept


def test_files(model, tmp_path):
    chat, path = Chat(model, RAW), tmp_path / "talk"
    say(chat, "Once upon a time")
    chat.save(path)
    other = Chat(model, RAW)
    say(other, "No")
    other.load(path)
    assert other.tokens == chat.tokens
    assert [(turn.start, turn.reply) for turn in other.turns] == [(turn.start, turn.reply) for turn in chat.turns]
    assert say(other, " The fox") == say(chat, " The fox")
    assert other.turns[-1].prefilled == len(model.tokenizer.encode(" The fox")) + 1
    path.write_bytes(path.read_bytes()[:-100])
    before = [*other.tokens]
    with pytest.raises(ChatError):
        other.load(path)
    assert other.tokens == before


def test_a_file_without_the_cache_is_small_and_goes_on_the_same(model, tmp_path):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time")
    chat.save(tmp_path / "talk", with_cache=False)
    assert (tmp_path / "talk").stat().st_size < 10_000
    other = Chat(model, RAW)
    other.load(tmp_path / "talk")
    assert say(other, " The fox") == say(chat, " The fox")


def test_a_file_with_impossible_numbers_is_refused(model, tmp_path):
    chat = Chat(model, RAW)
    say(chat, "Once upon a time", 4)
    right = [*chat.tokens]
    chat.tokens[0] = model.config.vocab_size
    chat.save(tmp_path / "tokens")
    chat.tokens = right
    chat.turns[0].reply = 100
    chat.save(tmp_path / "turns")
    chat.turns[0].reply = 4
    chat.tokens = right[:5]
    chat.save(tmp_path / "cache")
    for name, message in (("tokens", "token ids"), ("turns", "turns: expected ascending"), ("cache", "one row of no")):
        with pytest.raises(ChatError, match=message):
            Chat(model, RAW).load(tmp_path / name)
