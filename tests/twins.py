"""The jnp twins in place of native kernels, for tests in a process that has both."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax

from llorch_jax.kernels import attention, matmul, norms, writes


@contextlib.contextmanager
def twins() -> Iterator[None]:
    """Programs traced inside consist of twins only; none that was traced outside is used, nor the other way round."""
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        for module in (attention, matmul, norms, writes):
            stack.enter_context(mock.patch.object(module, "available", return_value=False))
        yield
    jax.clear_caches()
