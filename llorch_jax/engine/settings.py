"""The settings of all slots: kept on the host, and sent to the device when a request gets a slot."""

from typing import Any

import jax
import numpy as np

from llorch_jax.buckets import power_of_two
from llorch_jax.engine.sequences import Request
from llorch_jax.engine.slots import Settings
from llorch_jax.sampling import Sampling

_EOS_IDS = 4  # ids per slot that fit before another size is compiled


class SlotSettings:
    """How tokens are chosen in every slot."""

    def __init__(self, slots: int, known: jax.Array | None) -> None:
        self._settings: list[dict[str, Any]] = [{"temperature": 0.0}] * slots
        self._sampler = Sampling.superset(self._settings)
        words = jax.random.key_data(jax.random.key(0)).shape[0]
        self._keys = np.zeros((slots, words), np.uint32)
        self._eos_ids = np.full((slots, _EOS_IDS), -1, np.int32)
        self._known = known
        self._sent: Settings | None = None

    def set(self, slot: int, request: Request) -> None:
        """Applies a request's settings to a slot."""
        self._settings[slot] = dict(request.settings)
        self._keys[slot] = request.key
        missing = power_of_two(len(request.eos_ids)) - self._eos_ids.shape[1]
        self._eos_ids = np.pad(self._eos_ids, ((0, 0), (0, max(missing, 0))), constant_values=-1)
        self._eos_ids[slot] = -1
        self._eos_ids[slot, : len(request.eos_ids)] = request.eos_ids
        self._sent = None

    def on_device(self) -> Settings:
        """The settings in the form that the programs take."""
        if self._sent is None:
            self._sampler = Sampling.superset(self._settings, like=self._sampler)
            # Copies: the host's arrays may change before a program that reads them has run.
            keys, eos_ids = jax.device_put((self._keys.copy(), self._eos_ids.copy()))
            self._sent = Settings(self._sampler, keys, eos_ids, self._known)
        return self._sent
