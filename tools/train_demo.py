"""Trains the demo model that ships in llorch_jax/assets/demo, with the package's own forward pass.

    python tools/train_demo.py train TALES.txt[.xz] HELDOUT.txt FIRST --layers 6 --steps 6250
    python tools/train_demo.py export FIRST HELDOUT.txt FIRST_MODEL      # float16
    python tools/train_demo.py train TALES.txt[.xz] HELDOUT.txt SECOND \\
        --start FIRST_MODEL --plainest 0.2 --rate 0.6 --fall 1 --steps 3300
    python tools/train_demo.py export SECOND HELDOUT.txt MODEL_DIR \\
        --average FIRST_MODEL --card tools/demo_card.md

Needs the `train` extra (optax, tqdm, matplotlib). A blank line in the corpus separates stories. Weights of the blocks
are trained by Muon (Jordan et al. 2024), embeddings, norms and biases by AdamW, with a warm-up, a constant and a
linearly falling learning rate, so that a run can be prolonged or cut short by naming another number of steps before
the rate starts to fall. A run that was stopped goes on from its checkpoint when the same command is given again.

A model this small is grammatical where the language is simple, so a second run gives most of its windows to the
stories that the first model finds plainest; it may have more blocks than the first, which start as the identity. The
mean of both runs' parameters (Wortsman et al. 2022, "Robust fine-tuning") keeps what each is good at.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from demo_data import batches, encode, read, train_tokenizer
from optax import contrib
from tqdm import tqdm

from llorch_jax.config import GPT2Config
from llorch_jax.evaluation.perplexity import score
from llorch_jax.loading.checkpoint import load, save_model
from llorch_jax.model import run
from llorch_jax.params import Params, count_params, init_params
from llorch_jax.tokenizer import Tokenizer

LENGTH, BATCH = 512, 8
MUON_RATE, ADAM_RATE, DECAY = 4e-3, 2e-3, 0.1
WARMUP = 100  # steps
PLAIN_WINDOWS = 7  # of the BATCH windows of a step, where some stories are preferred
CONFIG = GPT2Config(
    vocab_size=4096, n_positions=LENGTH, n_embd=256, n_layer=8, n_head=4, bos_token_id=0, eos_token_id=0
)


def bits_per_byte(params: Params, tokenizer: tokenizers.Tokenizer, stories: list[str]) -> np.ndarray:
    """What the model needs for the beginning, up to LENGTH tokens, of each story."""
    encodings = tokenizer.encode_batch(stories)
    windows = np.full((-(-len(stories) // BATCH) * BATCH, LENGTH + 1), -1, np.int32)
    for window, encoding in zip(windows, encodings, strict=False):
        ids = [0, *encoding.ids][: LENGTH + 1]
        window[: len(ids)] = ids
    ends = [encoding.offsets[min(len(encoding.ids), LENGTH) - 1][1] for encoding in encodings]
    lengths = [len(story[:end].encode()) for story, end in zip(stories, ends, strict=True)]
    evaluate = jax.jit(token_losses)
    totals = [np.asarray(evaluate(params, w)).sum(1) for w in tqdm(windows.reshape(-1, BATCH, LENGTH + 1))]
    return np.concatenate(totals)[: len(stories)] / math.log(2) / np.array(lengths)


def plainest(params: Params, tokenizer: tokenizers.Tokenizer, stories: list[str], share: float) -> list[str]:
    """The stories that cost a model least, in their order, up to a share of all characters."""
    order = np.argsort(bits_per_byte(params, tokenizer, stories))
    sums = np.cumsum([len(stories[i]) for i in order])
    return [stories[i] for i in sorted(order[: np.searchsorted(sums, share * sums[-1])])]


def token_losses(params: Params, windows: jax.Array) -> jax.Array:
    """Cross-entropy of each token [B, T] after the first of windows [B, T + 1], in nats; 0 if the id is -1."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    config = dataclasses.replace(CONFIG, n_layer=len(params.blocks))
    logits = run(params, config, jnp.maximum(inputs, 0), None).logits
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(targets, 0))
    return jnp.where(targets < 0, 0, losses)


def loss_of(params: Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy, in nats per token."""
    return token_losses(params, windows).mean()


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


def schedule(step: int, steps: int, fall: float) -> float:
    """The factor of the learning rates: warm-up, constant, linear to 0 over a share `fall` of all steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (fall * steps))


def heldout_loss(params: Params, ids: np.ndarray, evaluate: Any) -> float:
    """Mean loss over the held-out text in separate windows, in nats per token."""
    windows = np.stack([ids[i : i + LENGTH + 1] for i in range(0, len(ids) - LENGTH - 1, LENGTH)])
    windows = windows[: len(windows) // BATCH * BATCH].reshape(-1, BATCH, LENGTH + 1)
    return float(np.mean([evaluate(params, w) for w in windows]))


def save(folder: Path, content: dict[str, Any]) -> None:
    """The checkpoint, replaced atomically."""
    partial_file = folder / "checkpoint.partial"
    with partial_file.open("wb") as file:
        np.savez(file, *jax.tree.leaves(content), layers=len(content["params"].blocks))
    os.replace(partial_file, folder / "checkpoint.npz")


def restore(folder: Path) -> dict[str, Any]:
    """The checkpoint in a folder."""
    with np.load(folder / "checkpoint.npz") as arrays:
        layers = int(arrays["layers"])
        leaves = [jnp.asarray(arrays[f"arr_{place}"]) for place in range(len(arrays.files) - 1)]
    content = jax.tree.structure(fresh(new_params(layers))).unflatten(leaves)
    return {**content, "step": int(content["step"])}


def new_params(layers: int) -> Params:
    return init_params(dataclasses.replace(CONFIG, n_layer=layers), jax.random.key(0))


def fresh(params: Params) -> dict[str, Any]:
    """What a run begins with."""
    return {"params": params, "state": make_optimizer().init(params), "step": 0}


def grow(params: Params, layers: int) -> Params:
    """The same function in more blocks: copies that add nothing yet, spread over the depth (Chen et al. 2015)."""
    if layers < len(params.blocks):
        raise SystemExit(f"--layers: expected at least the model's {len(params.blocks)} blocks, got {layers}")
    sources = [int((i + 0.5) * len(params.blocks) / layers) for i in range(layers)]
    blocks = []
    for source, before in zip(sources, [None, *sources], strict=False):
        block = params.blocks[source]
        if source == before:
            silent = {name: jax.tree.map(jnp.zeros_like, getattr(block, name)) for name in ("attn_proj", "mlp_proj")}
            block = block.replace(**silent)
        blocks.append(block)
    return jax.tree.map(jnp.copy, params.replace(blocks=tuple(blocks)))  # for their buffers are donated


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """The run's checkpoint; if there is none, the grown parameters of another model, or new ones."""
    if (arguments.work / "checkpoint.npz").exists():
        return restore(arguments.work)
    if arguments.start is None:
        return fresh(new_params(arguments.layers))
    return fresh(grow(load(arguments.start).params, arguments.layers))


def preferred(arguments: argparse.Namespace, stories: list[str], tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The plainest stories for the model that the run starts from; kept in plainest.json."""
    path = arguments.work / "plainest.json"
    if not path.exists():
        chosen = plainest(load(arguments.start).params, tokenizer, stories, arguments.plainest)
        path.write_text(json.dumps(chosen))
    return json.loads(path.read_text())


def prepare(arguments: argparse.Namespace) -> tuple[list[tuple[np.ndarray, int]], np.ndarray]:
    """The texts to train on, each with its number of windows in a step, and the held-out text, as ids."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    path, stories = arguments.work / "tokenizer.json", read(arguments.corpus)
    if arguments.start and not path.exists():
        shutil.copy(arguments.start / "tokenizer.json", path)
    tokenizer = train_tokenizer(stories, path, CONFIG.vocab_size)
    ids, heldout = encode(tokenizer, stories), encode(tokenizer, read(arguments.heldout))
    if not arguments.plainest:
        return [(ids, BATCH)], heldout
    plain = encode(tokenizer, preferred(arguments, stories, tokenizer))
    return [(plain, PLAIN_WINDOWS), (ids, BATCH - PLAIN_WINDOWS)], heldout


def train(arguments: argparse.Namespace) -> None:
    texts, heldout = prepare(arguments)
    content = begin(arguments)
    params, state, first = content["params"], content["state"], content["step"]
    print(f"{count_params(params):,} parameters, {len(texts[-1][0]):,} training tokens, {len(heldout):,} held out")
    evaluate, started, running = jax.jit(loss_of), time.time(), None
    bar = tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, mininterval=5)
    for step in bar:
        rate = jnp.float32(arguments.rate * schedule(step, arguments.steps, arguments.fall))
        windows = np.concatenate([batches(ids, step, count, LENGTH) for ids, count in texts])
        params, state, loss = train_step(params, state, windows, rate)
        running = float(loss) if running is None else 0.98 * running + 0.02 * float(loss)
        bar.set_postfix(loss=f"{running:.3f}")
        if (step + 1) % arguments.every == 0 or step + 1 == arguments.steps:
            record = {"step": step + 1, "train": running, "heldout": heldout_loss(params, heldout, evaluate)}
            save(arguments.work, {"params": params, "state": state, "step": step + 1})
            log(arguments.work, {**record, "seconds": time.time() - started})


def log(folder: Path, record: dict[str, float]) -> None:
    """Adds a line to log.jsonl and plots all of them."""
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")
    plot(folder)


def export(arguments: argparse.Namespace) -> None:
    """Writes the model in float16, scores the held-out stories with what was written, and fills in the model card."""
    content, folder = restore(arguments.work), arguments.model
    params = content["params"]
    config = dataclasses.replace(CONFIG, n_layer=len(params.blocks))
    if arguments.average is not None:
        other = grow(load(arguments.average).params, config.n_layer)
        params = jax.tree.map(lambda a, b: (a + b) / 2, params, other)
    save_model(folder, config, params, Tokenizer.from_directory(arguments.work), dtype="float16", overwrite=True)
    model = load(folder)
    scores = [score(model, story) for story in read(arguments.heldout)]
    bits = -sum(s.total for s in scores) / math.log(2) / sum(s.num_bytes for s in scores)
    print(f"{bits:.4f} bits per byte on the held-out text")
    if arguments.card is None:
        return
    facts = {
        "parameters": f"{count_params(params):,}",
        "layers": config.n_layer,
        "steps": f"{content['step']:,}",
        "tokens": f"{content['step'] * BATCH * LENGTH:,}",
        "bits_per_byte": f"{bits:.3f}",
        "heldout_bytes": f"{sum(s.num_bytes for s in scores):,}",
    }
    (folder / "README.md").write_text(arguments.card.read_text("utf-8").format(**facts), encoding="utf-8")


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
    run.add_argument("--layers", type=int, default=CONFIG.n_layer)
    run.add_argument("--rate", type=float, default=1.0, help="factor of the learning rates")
    run.add_argument("--fall", type=float, default=0.35, help="share of the steps in which the rate falls to 0")
    run.add_argument("--start", type=Path, help="directory of the model from which to start")
    run.add_argument("--plainest", type=float, help="share of the text to prefer: the plainest for --start's model")
    run.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    run.set_defaults(call=train)
    write = commands.add_parser("export")
    write.add_argument("work", type=Path)
    write.add_argument("heldout", type=Path)
    write.add_argument("model", type=Path)
    write.add_argument("--average", type=Path, help="directory of a model with which to average parameters")
    write.add_argument("--card", type=Path, help="template of the model card")
    write.set_defaults(call=export)
    arguments = parser.parse_args()
    share = getattr(arguments, "plainest", None)
    if share is not None and not (arguments.start and 0 < share <= 1):
        parser.error(f"--plainest: expected a share above 0 and up to 1, and --start, got {share}")
    arguments.call(arguments)


if __name__ == "__main__":
    main()
