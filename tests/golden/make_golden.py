"""Write one file of each format of pema_adapters into the current folder, from a tiny model.

    mkdir v2 && cd v2 && python ../make_golden.py

Run it with the version whose files are to be kept: what is here already is never written again.
"""

import shutil
from pathlib import Path

import adapters
import torch
from adapters import ConfigUnion, LoRAConfig
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import pema_adapters
from pema_adapters import PartialVocabulary, PEMAConfig, merge_checkpoint

V = 40
CONFIG = BertConfig(
    vocab_size=V, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=8,
)  # fmt: skip


def disturb(model):
    """Change what is trained, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 8)


def main():
    torch.manual_seed(0)
    BertForSequenceClassification(CONFIG).save_pretrained("base")
    vocabulary = PartialVocabulary([2, 3, 5, 8, 13, 21, 34], V)
    vocabulary.save("train.vocabulary")

    model = AutoModelForSequenceClassification.from_pretrained("base")
    adapters.init(model)
    model.add_adapter("task", config=ConfigUnion(PEMAConfig(), LoRAConfig(r=2, selfattn_lora=True)))
    pema_adapters.shrink_embeddings(model, "task", vocabulary)
    model.train_adapter("task")
    disturb(model)
    model.save_adapter("adapter", "task", use_safetensors=True)

    full = pema_adapters.load_model(AutoModelForSequenceClassification, "base", vocabulary)
    disturb(full)
    pema_adapters.save_delta(full, "full")

    merge_checkpoint("base", "adapter", "merged")
    for path in Path("merged").iterdir():
        if path.name != "pema_merge.json":
            path.unlink()
    shutil.copytree("base", "in_place")
    merge_checkpoint("in_place", "full", in_place=True)


if __name__ == "__main__":
    main()
