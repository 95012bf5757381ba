"""Many training runs, one process each: what there is to do, what is done already, and the table of it.

Every finished run is a file in OUTPUT/runs, so that what was interrupted goes on where it was, and several commands
with other seeds or tasks may share a folder. OUTPUT/results.json has what the last command was about.
"""

import argparse
import json
import multiprocessing
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _options import FULL, combinations, parse
from _table import report
from _tasks import Benchmark, Task, TaskError, plain
from _training import Place, Setting, run
from tqdm import tqdm
from transformers import AutoConfig

from pema_adapters.io.atomic_write import replace_file
from pema_adapters.scanning.worker_pool import end_with_parent

GIVEN = (
    "base", "batch_size", "max_length", "warmup_ratio", "weight_decay", "max_grad_norm", "bf16", "group_by_length",
)  # fmt: skip
"""Of a setting: what the command line says, as it is."""
NEEDED = {"task", "setting", "scores", "trained_parameters", "peak_bytes", "seconds_per_step"}
"""Of a result: what tables and figures are made of."""
RESUMED = "what is done is kept, and the same command goes on from there"

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run, and where its result is kept."""

    task: Task
    setting: Setting
    output: Path

    @property
    def name(self) -> str:
        parts = (self.task.name, self.setting.method, self.setting.pema, f"seed{self.setting.seed}")
        return "-".join(plain(part) for part in parts)

    @property
    def file(self) -> Path:
        return self.output / "runs" / f"{self.name}.json"

    def done(self) -> Result | None:
        """The result, if there is one.

        Raises:
            TaskError: of another setting, or a damaged file.
        """
        if not self.file.exists():
            return None
        result = read(self.file)
        self.setting.refuse_other(result["setting"], self.file)
        return result

    def keep(self, found: Result) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        result = {"task": self.task.name, "setting": asdict(self.setting), **found}
        write(self.file, result)


def main(benchmark: Benchmark, doc: str) -> int:
    """The command of a recipe. Returns its exit code: 0 done, 1 failed."""
    options = parse(benchmark, doc)
    try:
        experiment(benchmark, options)
    except (TaskError, OSError) as error:
        print(f"{benchmark.name.lower()}.py: error: {' '.join(str(error).split())}; {RESUMED}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{benchmark.name.lower()}.py: interrupted; {RESUMED}", file=sys.stderr)
        return 1
    return 0


def experiment(benchmark: Benchmark, options: argparse.Namespace) -> None:
    runs = planned(benchmark, options)
    results = finished(runs, options)
    write(options.output / "results.json", results)
    print(report(results, list({run.task.name: run.task for run in runs}.values())))
    if options.plot:
        from _figure import draw

        draw(results, options.plot)


def planned(benchmark: Benchmark, options: argparse.Namespace) -> list[Run]:
    """All runs, the seeds outermost: what is interrupted has whole tables of fewer seeds."""
    learning_rates = {method: learning_rate(options, method) for method in options.methods}
    shared = shared_setting(benchmark, options)
    limits = options.train_rows * (len(options.tasks) if len(options.train_rows) == 1 else 1)
    return [
        Run(benchmark.tasks[task], Setting(method, pema, seed, learning_rates[method], rows, **shared), options.output)
        for seed in options.seeds
        for task, rows in zip(options.tasks, limits, strict=True)
        for method, pema in combinations(options)
    ]


def shared_setting(benchmark: Benchmark, options: argparse.Namespace) -> dict[str, Any]:
    """What all runs have in common."""
    epochs = benchmark.epochs if options.epochs is None else options.epochs
    return {"epochs": epochs, **{name: getattr(options, name) for name in GIVEN}}


def learning_rate(options: argparse.Namespace, method: str) -> float:
    """As given; else Table 8's: 2e-5, and 7.5e-6 for XLM models."""
    if method != FULL:
        return options.peft_learning_rate
    if options.learning_rate is not None:
        return options.learning_rate
    return 7.5e-6 if AutoConfig.from_pretrained(options.base).model_type == "xlm-roberta" else 2e-5


def finished(runs: Sequence[Run], options: argparse.Namespace) -> list[Result]:
    """The results of all runs: of those that are done already, and of those that this does now."""
    todo = [run for run in runs if run.done() is None]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are done already", file=sys.stderr)
    for one in tqdm(todo, unit=" runs", disable=None):
        if one.done() is not None:  # by another command meanwhile
            continue
        tqdm.write(one.name, file=sys.stderr)
        checkpoints = options.output / "checkpoints" / one.name
        bar = sys.stderr.isatty()
        place = Place(options.data_dir, checkpoints, options.save_steps, options.threads, bar)
        one.keep(in_a_process(one, place))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return [result for run in runs if (result := run.done()) is not None]


def in_a_process(one: Run, place: Place) -> Result:
    """A run in a fresh process, so that memory is its own, and what kills it kills nothing else.

    It is forked from a server that has imported all modules, and done nothing with them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adapters", "datasets", "sklearn.metrics", "transformers"])
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs, one.task, one.setting, place))
    process.start()
    theirs.close()
    try:
        error, found = ours.recv()
    except EOFError:
        process.join()
        error, found = f"its process ended with code {process.exitcode} (out of memory?)", None
    except KeyboardInterrupt:
        process.terminate()
        raise
    finally:
        process.join()
    if error:
        raise TaskError(f"{one.name}: {error}")
    return found


def child(pipe: Connection, task: Task, setting: Setting, place: Place) -> None:
    end_with_parent()  # it would train on in the folder where the next command works
    try:
        pipe.send((None, run(task, setting, place)))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # whatever a model, a method or the data say
        pipe.send((f"{type(error).__name__}: {error}".split("\n")[0], None))


def read(path: Path) -> Result:
    """A result.

    Raises:
        TaskError: the file is damaged.
    """
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no text
        raise TaskError(damaged(path, str(error))) from error
    missing = NEEDED - result.keys() if isinstance(result, dict) else NEEDED
    if missing:
        raise TaskError(damaged(path, f"found no {', '.join(sorted(missing))}"))
    return result


def damaged(path: Path, evidence: str) -> str:
    return f"{path}: damaged, no result of a run ({evidence}): delete the file, and the run is done again"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
