"""Trains the demo model that ships in llorch_jax/assets/demo, with the package's own forward pass.

    python tools/train_demo.py train TALES.txt[.xz] HELDOUT.txt WORK_DIR --steps 3600   # resumes where it left off
    python tools/train_demo.py export WORK_DIR HELDOUT.txt MODEL_DIR                    # float16, with a model card

Needs the `train` extra (optax, tqdm, matplotlib). A blank line in the corpus separates stories. Weights of the blocks
are trained by Muon (Jordan et al. 2024), embeddings, norms and biases by AdamW, with a warm-up, a constant and a
linearly falling learning rate, so that a run can be prolonged or cut short by naming another number of steps before
the rate starts to fall.
"""

import argparse
import json
import lzma
import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import serialization
from optax import contrib
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from llorch_jax.checkpoint import load, save_model
from llorch_jax.config import GPT2Config
from llorch_jax.model import hidden_states, output_logits
from llorch_jax.params import Params, count_params, init_params
from llorch_jax.scoring import score
from llorch_jax.tokenizer import Tokenizer

END = "<|endoftext|>"
LENGTH, BATCH = 512, 8
MUON_RATE, ADAM_RATE, DECAY = 4e-3, 2e-3, 0.1
WARMUP, FALL = 100, 0.35  # steps of warm-up; share of all steps in which the rate falls to 0
CONFIG = GPT2Config(
    vocab_size=4096, n_positions=LENGTH, n_embd=256, n_layer=6, n_head=4, bos_token_id=0, eos_token_id=0
)


def read(path: Path) -> list[str]:
    """The stories of a corpus file."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    return [story.strip() for story in text.split("\n\n") if story.strip()]


def train_tokenizer(stories: list[str], path: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE whose id 0 ends a story; kept in `path`."""
    if not path.exists():
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=CONFIG.vocab_size,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(stories, trainer)
        tokenizer.save(str(path))
    return tokenizers.Tokenizer.from_file(str(path))


def encode(tokenizer: tokenizers.Tokenizer, stories: list[str]) -> np.ndarray:
    """All stories as one row of ids, each behind the end-of-text id."""
    return np.concatenate([[0, *encoding.ids] for encoding in tokenizer.encode_batch(stories)]).astype(np.int32)


def batches(ids: np.ndarray, step: int) -> np.ndarray:
    """The ids [BATCH, LENGTH + 1] of a step: windows in an order and at an offset that differ from epoch to epoch."""
    per_epoch = (len(ids) - 2 * LENGTH) // (LENGTH * BATCH)
    epoch, index = divmod(step, per_epoch)
    random = np.random.default_rng(epoch)
    offset, order = random.integers(LENGTH), random.permutation(per_epoch * BATCH)
    starts = offset + LENGTH * order[index * BATCH : (index + 1) * BATCH]
    return ids[starts[:, None] + np.arange(LENGTH + 1)]


def loss_of(params: Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats per token."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    logits = output_logits(params, hidden_states(params, CONFIG, inputs, None)[0], inputs.shape)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_optimizer() -> optax.GradientTransformation:
    """Muon for the blocks' matrices, AdamW for the rest; `train_step` multiplies their updates by the schedule."""

    def dimensions(params: Params) -> Any:
        kinds = jax.tree.map(lambda array: None, params)
        matrices = jax.tree.map(
            lambda array: contrib.MuonDimensionNumbers(1, 0) if array.ndim == 2 else None, params.blocks
        )
        return kinds.replace(blocks=matrices)

    muon = contrib.muon(
        MUON_RATE,
        weight_decay=DECAY,
        consistent_rms=0.2,
        adam_learning_rate=ADAM_RATE,
        adam_b2=0.99,
        muon_weight_dimension_numbers=dimensions,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params: Params, state: Any, windows: jax.Array, rate: jax.Array) -> tuple[Params, Any, jax.Array]:
    loss, gradient = jax.value_and_grad(loss_of)(params, windows)
    updates, state = make_optimizer().update(gradient, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, loss


def schedule(step: int, steps: int) -> float:
    """The factor of the learning rates: warm-up, constant, linear to 0."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (FALL * steps))


def heldout_loss(params: Params, ids: np.ndarray, evaluate: Any) -> float:
    """Mean loss over the held-out text in separate windows, in nats per token."""
    windows = np.stack([ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH - 1, LENGTH)])
    windows = windows[: len(windows) // BATCH * BATCH].reshape(-1, BATCH, LENGTH + 1)
    return float(np.mean([evaluate(params, w) for w in windows]))


def save(folder: Path, content: dict[str, Any]) -> None:
    """The checkpoint, replaced atomically."""
    partial_file = folder / "checkpoint.partial"
    partial_file.write_bytes(serialization.to_bytes(content))
    os.replace(partial_file, folder / "checkpoint.msgpack")


def restore(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder, or a fresh start."""
    params = init_params(CONFIG, jax.random.key(0))
    content = {"params": params, "state": make_optimizer().init(params), "step": 0}
    if (folder / "checkpoint.msgpack").exists():
        content = serialization.from_bytes(content, (folder / "checkpoint.msgpack").read_bytes())
    return {**content, **jax.tree.map(jnp.asarray, {name: content[name] for name in ("params", "state")})}


def train(arguments: argparse.Namespace) -> None:
    folder = arguments.work
    folder.mkdir(parents=True, exist_ok=True)
    stories, heldout = read(arguments.corpus), read(arguments.heldout)
    tokenizer = train_tokenizer(stories, folder / "tokenizer.json")
    ids, heldout_ids = encode(tokenizer, stories), encode(tokenizer, heldout)
    content = restore(folder)
    params, state = content["params"], content["state"]
    print(f"{count_params(params):,} parameters, {len(ids):,} training tokens, {len(heldout_ids):,} held out")
    evaluate, started, running = jax.jit(loss_of), time.time(), None
    bar = tqdm(range(content["step"], arguments.steps), initial=content["step"], total=arguments.steps, mininterval=5)
    for step in bar:
        rate = jnp.float32(schedule(step, arguments.steps))
        params, state, loss = train_step(params, state, batches(ids, step), rate)
        running = float(loss) if running is None else 0.98 * running + 0.02 * float(loss)
        bar.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            record = {"step": step + 1, "train": running, "heldout": heldout_loss(params, heldout_ids, evaluate)}
            record["seconds"] = time.time() - started
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            save(folder, {"params": params, "state": state, "step": step + 1})
            plot(folder)


def export(arguments: argparse.Namespace) -> None:
    """Writes the model in float16, scores the held-out stories with what was written, and adds the model card."""
    content, folder = restore(arguments.work), arguments.model
    tokenizer = Tokenizer.from_directory(arguments.work)
    save_model(folder, CONFIG, content["params"], tokenizer, dtype="float16")
    model = load(folder)
    scores = [score(model, story) for story in read(arguments.heldout)]
    bits = -sum(s.total for s in scores) / math.log(2) / sum(s.num_bytes for s in scores)
    card = (Path(__file__).parent / "demo_card.md").read_text("utf-8")
    facts = {
        "parameters": f"{count_params(content['params']):,}",
        "steps": f"{content['step']:,}",
        "tokens": f"{content['step'] * BATCH * LENGTH:,}",
        "bits_per_byte": f"{bits:.3f}",
        "heldout_bytes": f"{sum(s.num_bytes for s in scores):,}",
    }
    (folder / "README.md").write_text(card.format(**facts), encoding="utf-8")
    print(f"{bits:.4f} bits per byte on the held-out text")


def plot(folder: Path) -> None:
    """Losses over steps, as loss.png."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name in ("train", "heldout"):
        axes.plot([r["step"] for r in records], [r[name] for r in records], label=name)
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("train")
    run.add_argument("corpus", type=Path)
    run.add_argument("heldout", type=Path)
    run.add_argument("work", type=Path)
    run.add_argument("--steps", type=int, default=6000)
    run.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    run.set_defaults(call=train)
    write = commands.add_parser("export")
    write.add_argument("work", type=Path)
    write.add_argument("heldout", type=Path)
    write.add_argument("model", type=Path)
    write.set_defaults(call=export)
    arguments = parser.parse_args()
    arguments.call(arguments)


if __name__ == "__main__":
    main()
