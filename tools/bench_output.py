"""The output side of language models: loss, training step and generation with a head that streams, beside their peers.

    python tools/bench_output.py [--parts head step mlm generate] [--shapes qwen2.5-0.5b gemma-3-270m xlm-r]
                                 [--tokens 512 2048] [--layers 2] [--rounds 3] [--dir FOLDER] [--json FILE] [--save]

Models are built from configs of these shapes, with random weights, in float32, and K rows train. Every measurement is a
process of its own with one thread. Memory is the peak of its anonymous memory (RssAnon) less what its imports take;
seconds are CPU seconds of the same part. The order turns every round, and ratios are of the same round.

head      forward and backward of the head alone on N tokens: "logits" holds E [V, d], frozen, and makes logits [N, V],
          those of the K trained rows in their places; "linear_cross_entropy" is torch's chunked loss, E frozen;
          "streamed" is this project's head; "K rows" is a softmax over K rows, which does less work
step      a step of AdamW on 1 x 512 tokens, with LoRA and in full fine-tuning: the full model (with LoRA its matrix is
          frozen); PEMA that holds the matrix and makes logits; PEMA that holds it; PEMA that reads it from disk;
          and a model built with K rows, which train
mlm       the head of a masked language model with labels on 15 % of 512 tokens
generate  greedy, 64 tokens after 16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from harness.child import Child, anonymous_bytes, run_in_child
from harness.command_line import add_dir, make_parser
from harness.output_heads import HEAD_WAYS, open_matrix
from harness.results import write_results
from harness.tables import format_table
from harness.timing import format_ratio, rotate
from harness.xlmr import choose_token_ids

PARTS = ("head", "step", "mlm", "generate")
GROUPED = {"tie_word_embeddings": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b": ("Qwen2Config", {
        "vocab_size": 151_936, "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, **GROUPED,
    }),
    "gemma-3-270m": ("Gemma3TextConfig", {
        "vocab_size": 262_144, "hidden_size": 640, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "intermediate_size": 2048, **GROUPED,
    }),
    "xlm-r": ("XLMRobertaConfig", {
        "vocab_size": 250_002, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072,
        "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
    }),
}  # fmt: skip
CAUSAL = ("qwen2.5-0.5b", "gemma-3-270m")
LENGTH, PROMPT, GENERATED = 512, 16, 64
HEADS = {"head": ("logits", "linear_cross_entropy", "streamed", "K rows"), "mlm": ("logits", "streamed", "K rows")}
STEPS = ("full model", "PEMA, real logits", "PEMA, matrix held", "PEMA", "K-row model")
GENERATORS = ("full model", "PEMA, from disk", "PEMA, matrix held")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """The models in `folder`, "full" with V rows and "rows" with K, of a shape of SHAPES, and `rows`: K."""

    folder: Path
    shape: str
    rows: int

    @property
    def vocab_size(self) -> int:
        return int(SHAPES[self.shape][1]["vocab_size"])

    def choose_ids(self) -> torch.Tensor:
        return torch.from_numpy(choose_token_ids(self.vocab_size, self.rows)).long()


def make_config(shape: str, layers: int, vocab_size: int | None = None) -> Any:
    import transformers

    name, options = SHAPES[shape]
    sizes = {} if vocab_size is None else {"vocab_size": vocab_size}
    return getattr(transformers, name)(num_hidden_layers=layers, **{**options, **sizes})


def write_model(folder: Path, shape: str, layers: int, vocab_size: int | None = None) -> None:
    """Save a model with random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    torch.manual_seed(0)
    auto_class = AutoModelForCausalLM if shape in CAUSAL else AutoModelForMaskedLM
    auto_class.from_config(make_config(shape, layers, vocab_size)).save_pretrained(folder)


# -- the head alone


def run_head(way: str, setting: Setting, tokens: int, labelled: float) -> Generator[None, None, Any]:
    torch.set_num_threads(1)
    loss_of = HEAD_WAYS[way]
    base, ids, rows = open_matrix(setting.folder / "full"), setting.choose_ids(), setting.rows
    imports = anonymous_bytes()
    torch.manual_seed(1)
    hidden = torch.randn(tokens, base.dim, requires_grad=True)
    targets = ids[torch.randint(3, rows, (tokens,))]
    targets[torch.rand(tokens) >= labelled] = -100
    trained = torch.nn.Parameter(base.read_rows(ids))
    matrix = torch.cat(list(base.iterate_blocks())) if way in ("logits", "linear_cross_entropy") else None
    yield
    start = time.process_time()
    loss = loss_of(hidden, trained, ids, targets, base if matrix is None else matrix)
    loss.backward()
    return time.process_time() - start, imports, float(loss.detach())


# -- a training step


def run_steps(way: str, setting: Setting, with_lora: bool) -> Generator[None, None, Any]:
    torch.set_num_threads(1)
    import adapters  # noqa: F401 - imported before memory is measured

    import pema_adapters  # noqa: F401

    imports = anonymous_bytes()
    rows = setting.rows
    ids = torch.arange(rows) if way == "K-row model" else setting.choose_ids()
    model = _load(way, setting, with_lora).train()
    if way == "PEMA, real logits":
        model.lm_head.register_forward_hook(lambda module, args, logits: logits + 0)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        tokens = ids[torch.randint(3, rows, (1, LENGTH), generator=generator)]
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    step()
    yield
    start = time.process_time()
    losses = [step() for _ in range(2)]
    return (time.process_time() - start) / 2, imports, losses[-1]


def _load(way: str, setting: Setting, with_lora: bool) -> Any:
    import adapters
    from transformers import AutoModelForCausalLM

    from pema_adapters import PartialVocabulary, PEMAConfig, load_model, shrink_embeddings

    is_partial = way.startswith("PEMA")
    options: dict[str, Any] = {"output_storage": "device" if "," in way and "disk" not in way else "disk"}
    base = setting.folder / ("rows" if way == "K-row model" else "full")
    vocabulary = PartialVocabulary(setting.choose_ids().numpy(), setting.vocab_size)
    if is_partial:
        model = load_model(AutoModelForCausalLM, base, vocabulary, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # loading leaves them as pages of the file
    if not with_lora:
        return model
    adapters.init(model)
    lora = adapters.LoRAConfig(r=8, alpha=16)
    config = adapters.ConfigUnion(PEMAConfig(**options), lora) if is_partial else lora
    model.add_adapter("task", config=config)
    if is_partial:
        shrink_embeddings(model, "task", vocabulary)
    model.train_adapter("task")
    for name, parameter in model.named_parameters():
        if "lora" not in name and "pema" not in name:
            parameter.requires_grad_(False)  # adapters freezes the base model alone
    model.get_input_embeddings().weight.requires_grad_(way == "K-row model")
    return model


# -- generation


def run_generation(way: str, setting: Setting) -> Generator[None, None, Any]:
    torch.set_num_threads(1)
    import adapters  # noqa: F401 - imported before memory is measured

    imports, ids = anonymous_bytes(), setting.choose_ids()
    model = _load(way, setting, with_lora=False).eval()
    prompt = ids[3 : 3 + PROMPT].unsqueeze(0)
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False}
    model.generate(prompt, **{**options, "max_new_tokens": 2, "min_new_tokens": 2})
    yield
    start = time.process_time()
    made = model.generate(prompt, **options)
    return time.process_time() - start, imports, made[0, PROMPT:].tolist()


# -- measuring


def measure_paired(ways: Sequence[str], rounds: int, run: Callable[[str], Child]) -> Figures:
    """Return CPU seconds, peak bytes and results of every way and round."""
    found: Figures = {way: {"seconds": [], "bytes": [], "results": []} for way in ways}
    for order in rotate(ways, rounds):
        for way in order:
            child = run(way)
            seconds, imports, result = child.result
            found[way]["seconds"].append(seconds)
            found[way]["bytes"].append(child.peak - imports)
            found[way]["results"].append(result)
    if isinstance(result, list) and any(each["results"][0] != result for each in found.values()):
        raise SystemExit(f"generated tokens differ: {found}")
    return found


def measure(options: argparse.Namespace) -> Figures:
    figures: Figures = {"rows": options.rows, "layers": options.layers, "parts": {}}
    for shape in options.shapes:
        with TemporaryDirectory(dir=options.dir) as name:
            setting = Setting(Path(name), shape, options.rows)
            write_model(setting.folder / "full", shape, options.layers)
            if shape in CAUSAL and "step" in options.parts:
                write_model(setting.folder / "rows", shape, options.layers, options.rows)
            for label, ways, run in _list_runs(options, setting):
                figures["parts"][label] = measure_paired(ways, options.rounds, run)
                print(render_part(label, figures["parts"][label]), flush=True)
    return figures


def _list_runs(options: argparse.Namespace, setting: Setting) -> list[tuple[str, Sequence[str], Any]]:
    runs: list[tuple[str, Sequence[str], Any]] = []
    shape = setting.shape
    if "head" in options.parts:
        runs += [
            (f"head, {shape}, N = {tokens:,}", HEADS["head"],
             lambda way, tokens=tokens: run_in_child(run_head, way, setting, tokens, 1.0))
            for tokens in options.tokens
        ]  # fmt: skip
    if "mlm" in options.parts and shape not in CAUSAL:
        runs.append((f"mlm, {shape}, labels on 15 % of {LENGTH}", HEADS["mlm"],
                     lambda way: run_in_child(run_head, way, setting, LENGTH, 0.15)))  # fmt: skip
    if "step" in options.parts and shape in CAUSAL:
        runs += [
            (f"step, {shape}, {options.layers} layers, {'LoRA' if lora else 'full fine-tuning'}", STEPS,
             lambda way, lora=lora: run_in_child(run_steps, way, setting, lora))
            for lora in (True, False)
        ]  # fmt: skip
    if "generate" in options.parts and shape in CAUSAL:
        runs.append((f"generate, {shape}, {options.layers} layers", GENERATORS,
                     lambda way: run_in_child(run_generation, way, setting)))  # fmt: skip
    return runs


def render_part(label: str, found: Figures) -> str:
    """Format one comparison; the first way is the reference."""
    reference = next(iter(found))

    def ratio(way: str, kind: str) -> str:
        return format_ratio([a / b for a, b in zip(found[way][kind], found[reference][kind], strict=True)])

    rows = [
        (way, f"{statistics.median(each['bytes']) / 1e6:,.0f}", ratio(way, "bytes"),
         f"{statistics.median(each['seconds']):.1f}", ratio(way, "seconds"))
        for way, each in found.items()
    ]  # fmt: skip
    header = [label, "MB", f"/ {reference}", "CPU s", f"/ {reference}"]
    return format_table(header, rows)


def render(figures: Figures) -> str:
    caption = f"K = {figures['rows']:,}, float32, one thread. Ratios are medians of paired rounds, with their range."
    return "\n\n".join([caption, *(render_part(label, found) for label, found in figures["parts"].items())])


def main() -> None:
    options = parse()
    write_results(options, measure(options))


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=3)
    add_dir(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048], metavar="N")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000, metavar="K")
    return parser.parse_args()


if __name__ == "__main__":
    main()
