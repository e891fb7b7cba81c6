"""Which request holds which page: a snapshot of the engine for the map of the cache."""

from typing import Any

from llorch_jax.engine.core import Core
from llorch_jax.engine.sequences import Sequence


def snapshot(core: Core) -> dict[str, Any]:
    """Pages, slots and queue; must be called in the engine's thread."""
    found, offload = core.statistics, core.offload.store.counts()
    return {
        "page_size": core.pages.page_size,
        "slots": core.slots,
        "holders": core.pages.holders(),
        "running": [_running(sequence, core.pages.page_size) for sequence in core.active],
        "waiting": [{"id": each.rank.arrival, "tokens": each.length} for each in core.queue],
        "prompt_tokens": found.prompt_tokens,
        "cached_tokens": found.cached_tokens,
        "new_tokens": found.new_tokens,
        "preemptions": found.preemptions,
        "offload": {"total": offload.total, "pages": offload.pages, "restored": offload.restored},
    }


def _running(sequence: Sequence, page_size: int) -> dict[str, Any]:
    return {
        "id": sequence.rank.arrival,
        "slot": sequence.slot,
        "pages": [*sequence.pages],  # a copy, as the engine goes on
        "cached": (sequence.cached or 0) // page_size,
        "computed": sequence.computed,
        "prompt": len(sequence.request.tokens),
        "tokens": sequence.length,
        "limit": sequence.request.max_new_tokens,
        "decoding": sequence.decoding,
    }
