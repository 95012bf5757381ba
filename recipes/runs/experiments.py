"""Many training runs, one process each: planned, resumed, and reported as a table.

Every finished run is a file in OUTPUT/runs, so that an interrupted command resumes, and several commands with other
seeds or tasks may share a folder. OUTPUT/results.json has the results of the last command.
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

from tqdm import tqdm
from transformers import AutoConfig

from harness.child import end_with_parent
from harness.results import replace_file, write_results
from runs.options import FULL, combinations, parse
from runs.table import report
from runs.tasks import Benchmark, Task, TaskError, plain
from runs.training import Place, Setting, run

GIVEN = (
    "base", "batch_size", "max_length", "warmup_ratio", "weight_decay", "max_grad_norm", "bf16", "group_by_length",
)  # fmt: skip
"""Fields of a setting that the command line gives."""
NEEDED = {"task", "setting", "scores", "trained_parameters", "peak_bytes", "seconds_per_step"}
"""Keys of a result that tables and figures need."""
RESUMED = "what is done is kept, and the same command goes on from there"

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run, and the folder of its result."""

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
        """Return the result, None if there is none.

        Raises:
            TaskError: the result is of another setting, or the file is damaged.
        """
        if not self.file.exists():
            return None
        result = read(self.file)
        self.setting.refuse_other(result["setting"], self.file)
        return result

    def save(self, found: Result) -> None:
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
    runs = plan_runs(benchmark, options)
    results = finish_runs(runs, options)
    write(options.output / "results.json", results)
    print(report(results))
    write_results(options, {"runs": results}, benchmark.name.lower())
    if options.plot:
        from runs.figure import draw

        draw(results, options.plot)


def plan_runs(benchmark: Benchmark, options: argparse.Namespace) -> list[Run]:
    """Return all runs, seeds outermost: an interrupted command has complete tables of fewer seeds."""
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
    """Return the fields of a setting that all runs share."""
    epochs = benchmark.epochs if options.epochs is None else options.epochs
    return {"epochs": epochs, **{name: getattr(options, name) for name in GIVEN}}


def learning_rate(options: argparse.Namespace, method: str) -> float:
    """Return the given rate, else that of Table 8: 2e-5, and 7.5e-6 for XLM models."""
    if method != FULL:
        return options.peft_learning_rate
    if options.learning_rate is not None:
        return options.learning_rate
    return 7.5e-6 if AutoConfig.from_pretrained(options.base).model_type == "xlm-roberta" else 2e-5


def finish_runs(runs: Sequence[Run], options: argparse.Namespace) -> list[Result]:
    """Do the runs that are not done already. Returns the results of all."""
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
        one.save(run_in_process(one, place))
        shutil.rmtree(checkpoints, ignore_errors=True)
    return [result for run in runs if (result := run.done()) is not None]


def run_in_process(one: Run, place: Place) -> Result:
    """Run in a fresh process, so that its memory is measured alone, and a crash ends no other run.

    It is forked from a server that has imported all modules and done nothing else.
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
    end_with_parent()  # else it would go on training in the folder of the next command
    try:
        pipe.send((None, run(task, setting, place)))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # whatever a model, a method or the data say
        pipe.send((f"{type(error).__name__}: {error}".split("\n")[0], None))


def read(path: Path) -> Result:
    """Read a result.

    Raises:
        TaskError: the file is damaged.
    """
    try:
        result = json.loads(path.read_bytes())
    except ValueError as error:  # no JSON, or no text
        raise TaskError(describe_damage(path, str(error))) from error
    missing = NEEDED - result.keys() if isinstance(result, dict) else NEEDED
    if missing:
        raise TaskError(describe_damage(path, f"found no {', '.join(sorted(missing))}"))
    return result


def describe_damage(path: Path, evidence: str) -> str:
    return f"{path}: damaged, no result of a run ({evidence}): delete the file, and the run is done again"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
