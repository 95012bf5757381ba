"""Fine-tune a model on the tasks of GLUE, with and without PEMA, as in the paper (Table 10; its Table 8 by default).

    python recipes/glue.py --base FacebookAI/roberta-base
    python recipes/glue.py --base FacebookAI/xlm-roberta-base --tasks RTE,MRPC --methods LoRA,Compacter
    python recipes/glue.py --base BASE --data-dir glue --tasks CoLA --pema off,on,frozen --seeds 0,1,2,3,4

Scores are those of the validation split; the vocabulary is that of all splits, the paper's convention. Results are
kept in --output, and the same command resumes there.
"""

import sys

from runs.experiments import main
from runs.tasks import Benchmark, Task

HUB = "nyu-mll/glue"
TASKS = [
    Task("CoLA", (HUB, "cola"), metrics=("Matthews", "accuracy")),
    Task("MNLI", (HUB, "mnli"), labels=3),
    Task("MRPC", (HUB, "mrpc"), metrics=("F1", "accuracy")),
    Task("QNLI", (HUB, "qnli")),
    Task("QQP", (HUB, "qqp"), metrics=("F1", "accuracy")),
    Task("RTE", (HUB, "rte")),
    Task("SST-2", (HUB, "sst2")),
    Task("STS-B", (HUB, "stsb"), labels=1, metrics=("Spearman", "Pearson")),
    Task("WNLI", (HUB, "wnli")),
]
GLUE = Benchmark("GLUE", {task.name: task for task in TASKS}, epochs=3)

if __name__ == "__main__":
    sys.exit(main(GLUE, __doc__))
