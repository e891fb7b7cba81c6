"""CTranslate2, in float32 and with int8 weights and activations; the checkpoint is converted through transformers."""

import os

import ctranslate2
from ctranslate2.converters import TransformersConverter
from transformers.utils import logging
from worker import Generate, serve


def load(directory: str, work: str, threads: int) -> dict[str, Generate]:
    logging.disable_progress_bar()
    return {kind: _generator(directory, f"{work}/ct2-{kind}", kind, threads) for kind in ("float32", "int8")}


def _generator(directory: str, converted: str, kind: str, threads: int) -> Generate:
    if not os.path.isdir(converted):
        TransformersConverter(directory).convert(converted, quantization=kind)
    generator = ctranslate2.Generator(
        converted, device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
    )

    def generate(tokens: list[list[int]], new: int) -> list[list[int]]:
        rows = generator.generate_batch(
            [[f"t{token}" for token in row] for row in tokens],  # the words that the comparison's vocabulary has
            max_length=new,
            min_length=new,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return [row.sequences_ids[0] for row in rows]

    return generate


if __name__ == "__main__":
    serve(load, {"float32": "float32", "int8": "w8a8"}, ["ctranslate2"])
