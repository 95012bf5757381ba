"""A step of full fine-tuning: PEMA beside its peers, in one run.

    python tools/bench_step.py [--layers 4] [--rounds 9] [--json FILE]                  XLM-R-base's shape, CPU
    python tools/bench_step.py --device cuda --vocabulary 901629 --layers 12            XLM-V-base's shape, GPU

Contestants: a model built with a K-row vocabulary (the floor), PEMA, PEFT's TrainableTokens on the same K rows with the
rest of the model trained as well, and the full model. AdamW in float32, 8 x 64 tokens of the vocabulary. Time is paired
in one process. Memory is that of some steps in a process of its own: the peak of RssAnon, or of what the GPU's
allocator gave out. Fewer layers leave out what all contestants share.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import numpy as np
import torch
from _bench import in_child, median_ratio, paired, parser, table, write_json
from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

from pema_adapters import PartialVocabulary, shrink_embeddings

BATCH, LENGTH = 8, 64
FLOOR = "K-row model"


def token_ids(vocab_size: int, rows: int) -> np.ndarray[Any, Any]:
    """K of V token ids, the inserted ones (0, 1, 2) among them."""
    drawn = np.random.default_rng(0).choice(np.arange(3, vocab_size), rows - 3, replace=False)
    return np.sort(np.concatenate([[0, 1, 2], drawn]))


def model_of(rows: int, layers: int) -> Any:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=rows, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1,
        pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return XLMRobertaForSequenceClassification(config).train()


def floor(options: argparse.Namespace) -> Any:
    return model_of(options.rows, options.layers)


def pema(options: argparse.Namespace) -> Any:
    model = model_of(options.vocabulary, options.layers)
    shrink_embeddings(model, None, PartialVocabulary(token_ids(options.vocabulary, options.rows), options.vocabulary))
    return model


def trainable_tokens(options: argparse.Namespace) -> Any:
    from peft import TrainableTokensConfig, get_peft_model

    ids = token_ids(options.vocabulary, options.rows).tolist()
    config = TrainableTokensConfig(token_indices=ids, target_modules=["word_embeddings"])
    model = get_peft_model(model_of(options.vocabulary, options.layers), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embeddings" not in name or "trainable_tokens_delta" in name)
    return model


def full(options: argparse.Namespace) -> Any:
    return model_of(options.vocabulary, options.layers)


WAYS: dict[str, Callable[[argparse.Namespace], Any]] = {
    FLOOR: floor, "PEMA": pema, "TrainableTokens (PEFT)": trainable_tokens, "full model": full,
}  # fmt: skip


def stepper(way: str, options: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one step on fresh tokens of the vocabulary."""
    model = WAYS[way](options).to(options.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(options.rows)
    if way != FLOOR:
        ids = torch.from_numpy(token_ids(options.vocabulary, options.rows))

    def step() -> None:
        tokens = ids[torch.randint(3, options.rows, (BATCH, LENGTH), generator=generator)].to(options.device)
        labels = torch.randint(2, (BATCH,), generator=generator).to(options.device)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def some_steps(way: str, options: argparse.Namespace) -> Generator[None, None, int]:
    step = stepper(way, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    gc.collect()
    yield
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else 0


def peak(way: str, options: argparse.Namespace) -> int:
    child = in_child(some_steps, way, options)
    return int(child.result or child.peak)


def main() -> None:
    options = parse()
    memory = {way: peak(way, options) for way in WAYS}
    times = paired({way: partial(stepper(way, options)) for way in WAYS}, rounds=options.rounds)
    rows = [
        (
            way, f"{statistics.median(times[way]):.3f}", f"{median_ratio(times, way, FLOOR):.3f}",
            f"{memory[way] / 2**30:.2f}", f"{memory[way] / memory[FLOOR]:.3f}",
        )
        for way in WAYS
    ]  # fmt: skip
    print(
        f"XLM-RoBERTa, {options.layers} layers, V = {options.vocabulary:,}, K = {options.rows:,}, "
        f"{BATCH} x {LENGTH} tokens, AdamW fp32, {options.device}"
    )
    print(table(["way", "median s/step", "x K-row", "peak GiB", "x K-row"], rows))
    write_json(options.json, {"options": vars(options) | {"json": None}, "seconds": times, "peak_bytes": memory})


def parse() -> argparse.Namespace:
    options = parser(__doc__, rounds=9)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--vocabulary", type=int, default=250_002, metavar="V")
    options.add_argument("--rows", type=int, default=20_000, metavar="K")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return options.parse_args()


if __name__ == "__main__":
    main()
