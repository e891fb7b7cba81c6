"""The nearest known option to a name that is unknown."""

import difflib
from collections.abc import Sequence

# Names that other libraries give to options.
_ELSEWHERE = {
    "alpha": "penalty_alpha",
    "bad_words_ids": "bad_words",
    "beam_width": "num_beams",
    "best_of": "best_of of generate_n",
    "do_sample": "temperature, where 0 takes the most likely token",
    "draft": "draft of generate_speculative",
    "dry_sequence_breakers": "dry_breakers",
    "eos_id": "stop_ids",
    "eos_token_id": "stop_ids",
    "gbnf": "grammar",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "json": "json_schema",
    "logprobs": "top_logprobs",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "mirostat": "mirostat_tau",
    "n": "n of generate_n",
    "n_predict": "max_new_tokens",
    "num_groups": "num_beam_groups",
    "num_return_sequences": "n of generate_n",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "response_format": "json_schema",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_token_ids": "stop_ids",
    "temp": "temperature",
    "top_n_tokens": "top_logprobs",
    "typical": "typical_p",
}


def nearest(name: str, known: Sequence[str]) -> str:
    """What to write in place of an unknown name, in words."""
    if name in _ELSEWHERE:
        return f"expected {_ELSEWHERE[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
