"""Fine-tune a multilingual model on XNLI, a language at a time, with and without PEMA, as in the paper (its Table 8).

    python recipes/xnli.py --base FacebookAI/xlm-roberta-base --tasks sw,ur
    python recipes/xnli.py --base BASE --data-dir xnli --methods "Full fine-tuning,LoRA" --train-rows 20000

Every language is trained and scored by itself (on the test split, and validation). Results are kept in --output, and
the same command resumes there.
"""

import sys

from runs.experiments import main
from runs.tasks import Benchmark, Task

LANGUAGES = ["ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"]
XNLI = Benchmark(
    "XNLI",
    {name: Task(name, ("facebook/xnli", name), labels=3, scored=("test", "validation")) for name in LANGUAGES},
    epochs=2,
)

if __name__ == "__main__":
    sys.exit(main(XNLI, __doc__))
