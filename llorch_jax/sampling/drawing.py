"""Random draws: those of `jax.random.categorical`, in a fraction of its time for many logits."""

import jax
import jax.numpy as jnp

CHUNK = 8192
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def draw(logits: jax.Array, keys: jax.Array) -> jax.Array:
    """One index per row, int32 [B], in proportion to exp(logits) [B, C]: the argmax after adding Gumbel noise.

    The same keys give the same indices as `jax.random.categorical`.
    """
    if logits.shape[-1] <= CHUNK or not _is_counted(keys):
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    count = logits.shape[-1]
    noisy = logits + _gumbel(random_bits(keys, count))
    # Not argmax: XLA would compute the noise inside its scalar loop, several times slower.
    best = jnp.max(noisy, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(noisy == best, jnp.arange(count, dtype=jnp.int32)[None], count), axis=-1)
    return jnp.minimum(first, count - 1)  # NaN equals nothing


def random_bits(keys: jax.Array, count: int) -> jax.Array:
    """uint32 [B, count], for each of the keys [B] the bits of `jax.random.bits(key, (count,))`.

    A loop over chunks keeps XLA from fusing Threefry (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
    3") with the logarithms that follow, which it would not vectorise then.
    """
    words = jax.random.key_data(keys)
    chunks = -(-count // CHUNK)
    counters = jnp.arange(chunks * CHUNK, dtype=jnp.uint32).reshape(chunks, CHUNK)
    bits = jax.lax.map(lambda counter: jax.vmap(lambda word: _hash(word, counter))(words), counters)
    return jnp.moveaxis(bits, 0, 1).reshape(words.shape[0], chunks * CHUNK)[:, :count]


def _hash(words: jax.Array, counters: jax.Array) -> jax.Array:
    """Threefry-2x32 with 20 rounds of (0, counter), its two words joined by exclusive or.

    `jax.extend.random.threefry_2x32` runs its rounds in a loop over memory on a CPU, which takes twice the time.
    """
    schedule = (words[0], words[1], words[0] ^ words[1] ^ jnp.uint32(_PARITY))
    left, right = jnp.full_like(counters, schedule[0]), counters + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            left = left + right
            right = left ^ ((right << rotation) | (right >> (32 - rotation)))
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return left ^ right


def _gumbel(bits: jax.Array) -> jax.Array:
    """float32, as `jax.random.gumbel` makes it of the same bits."""
    tiny = jnp.finfo(jnp.float32).tiny
    uniform = jax.lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1
    return -jnp.log(-jnp.log(jnp.maximum(tiny, uniform * (1 - tiny) + tiny)))


def _is_counted(keys: jax.Array) -> bool:
    """Whether the i-th number that a key yields is a hash of i, as with JAX's defaults."""
    counted = getattr(jax.config, "jax_threefry_partitionable", False)
    finer = getattr(jax.config, "jax_high_dynamic_range_gumbel", False)
    return counted and not finer and str(jax.random.key_impl(keys)) == "threefry2x32"
