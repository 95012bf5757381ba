"""A step of full fine-tuning: PEMA beside its peers, in one run.

    python tools/bench_step.py [--layers 4] [--rounds 9] [--json FILE] [--save]         XLM-R-base's shape, CPU
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
from typing import Any

import torch

from harness.child import run_in_child
from harness.command_line import make_parser
from harness.results import write_results
from harness.tables import format_table
from harness.timing import format_ratio, round_ratios, time_paired
from harness.xlmr import choose_token_ids, make_model
from pema_adapters import PartialVocabulary, shrink_embeddings

BATCH, LENGTH = 8, 64
FLOOR = "K-row model"


def floor(options: argparse.Namespace) -> Any:
    return make_model(options.rows, options.layers)


def pema(options: argparse.Namespace) -> Any:
    model = make_model(options.vocabulary, options.layers)
    token_ids = choose_token_ids(options.vocabulary, options.rows)
    shrink_embeddings(model, None, PartialVocabulary(token_ids, options.vocabulary))
    return model


def trainable_tokens(options: argparse.Namespace) -> Any:
    from peft import TrainableTokensConfig, get_peft_model

    ids = choose_token_ids(options.vocabulary, options.rows).tolist()
    config = TrainableTokensConfig(token_indices=ids, target_modules=["word_embeddings"])
    model = get_peft_model(make_model(options.vocabulary, options.layers), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("word_embeddings" not in name or "trainable_tokens_delta" in name)
    return model


def full(options: argparse.Namespace) -> Any:
    return make_model(options.vocabulary, options.layers)


WAYS: dict[str, Callable[[argparse.Namespace], Any]] = {
    FLOOR: floor, "PEMA": pema, "TrainableTokens (PEFT)": trainable_tokens, "full model": full,
}  # fmt: skip


def make_step(way: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return a function that makes one training step on fresh tokens of the vocabulary."""
    model = WAYS[way](options).to(options.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    generator = torch.Generator().manual_seed(1)
    ids = torch.arange(options.rows)
    if way != FLOOR:
        ids = torch.from_numpy(choose_token_ids(options.vocabulary, options.rows))

    def step() -> None:
        tokens = ids[torch.randint(3, options.rows, (BATCH, LENGTH), generator=generator)].to(options.device)
        labels = torch.randint(2, (BATCH,), generator=generator).to(options.device)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if options.device == "cuda":
            torch.cuda.synchronize()

    return step


def take_steps(way: str, options: argparse.Namespace) -> Generator[None, None, int]:
    step = make_step(way, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    gc.collect()
    yield
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else 0


def measure_peak(way: str, options: argparse.Namespace) -> int:
    child = run_in_child(take_steps, way, options)
    return int(child.result or child.peak)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    memory = {way: measure_peak(way, options) for way in WAYS}
    times = time_paired({way: make_step(way, options) for way in WAYS}, rounds=options.rounds)
    setting = {name: getattr(options, name) for name in ("layers", "vocabulary", "rows", "device")}
    return {"setting": setting, "seconds": times, "peak_bytes": memory}


def render(figures: dict[str, Any]) -> str:
    setting, times, memory = figures["setting"], figures["seconds"], figures["peak_bytes"]
    rows = [
        (
            way, f"{statistics.median(times[way]):.2f}", format_ratio(round_ratios(times, way, FLOOR), floor=True),
            f"{memory[way] / 2**30:.2f}", f"{memory[way] / memory[FLOOR]:.2f}",
        )
        for way in times
    ]  # fmt: skip
    caption = (
        f"XLM-RoBERTa, {setting['layers']} layers, V = {setting['vocabulary']:,}, K = {setting['rows']:,}, "
        f"{BATCH} x {LENGTH} tokens, AdamW fp32, {setting['device']}, {len(times[FLOOR])} rounds. "
        "Memory is that of one process each."
    )
    header = ["way", "median s/step", "/ K-row model, median (range)", "peak GiB", "/ K-row model"]
    return f"{caption}\n\n{format_table(header, rows)}"


def main() -> None:
    options = parse()
    figures = measure(options)
    print(render(figures))
    write_results(options, figures)


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=250_002, metavar="V")
    parser.add_argument("--rows", type=int, default=20_000, metavar="K")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
