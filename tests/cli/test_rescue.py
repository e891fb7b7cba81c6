"""Conversations that nobody saved are kept somewhere, whatever the environment lacks."""

import pytest
import tiny

from llorch_jax.cli import rescue
from llorch_jax.text.chat import RAW, Chat


def test_without_a_home_the_conversation_is_kept_with_the_temporary_files(tmp_path, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(rescue.Path, "home", no_home)
    monkeypatch.setattr(rescue, "gettempdir", lambda: str(tmp_path))
    conversation = Chat(tiny.reciting_model("Once upon"), RAW)
    "".join(conversation.reply("Once"))
    with pytest.raises(ZeroDivisionError), rescue.on_failure(lambda: {"main": conversation}):
        raise ZeroDivisionError
    (kept,) = tmp_path.iterdir()
    assert str(kept) in capsys.readouterr().err.replace("\n", "")
    again = Chat(conversation.model, RAW)
    again.load(kept)
    assert again.text == "Once upon"
