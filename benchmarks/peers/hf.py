"""transformers on torch, with its default cache and with `StaticCache`, both without compiling."""

import torch
from transformers import GPT2LMHeadModel, StaticCache
from transformers.utils import logging
from worker import Generate, serve


def load(directory: str, work: str, threads: int) -> dict[str, Generate]:
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    caches: dict[tuple[int, int], StaticCache] = {}  # by rows and slots

    def eager(tokens: list[list[int]], new: int) -> list[list[int]]:
        return run(tokens, new)

    def static(tokens: list[list[int]], new: int) -> list[list[int]]:
        shape = len(tokens), len(tokens[0]) + new
        if shape not in caches:
            caches[shape] = StaticCache(config=model.config, max_cache_len=shape[1])
        with torch.inference_mode():
            caches[shape].reset()
        return run(tokens, new, past_key_values=caches[shape])

    def run(tokens: list[list[int]], new: int, **settings: object) -> list[list[int]]:
        ids = torch.tensor(tokens)
        settings |= {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return out[:, ids.shape[1] :].tolist()

    return {"eager": eager, "static": static}


if __name__ == "__main__":
    serve(load, {"eager": "float32", "static": "float32"}, ["transformers", "torch"])
