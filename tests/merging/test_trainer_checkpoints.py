"""Merging one checkpoint of a Trainer's output folder: the latest, the best, or that of a step."""

import json
import shlex
import shutil

import pytest
from adapters import AdapterTrainer
from transformers import Trainer, TrainingArguments, default_data_collator

from pema_adapters import PartialVocabulary, PEMAConfig, load_model, merge_checkpoint, shrink_embeddings
from pema_adapters.cli.merge import main
from pema_adapters.errors import FormatError
from pema_adapters.formats.trainer_checkpoints import pick_checkpoint
from tests.merging.conftest import read
from tests.models import USED, V

STEPS = (4, 8, 12)


def adapter_model(case, names=("task",)):
    model = case.with_adapters()
    for name in names:
        model.add_adapter(name, config=PEMAConfig())
        shrink_embeddings(model, name, PartialVocabulary(USED, V))
    model.train_adapter(names[0])
    return model


def full_model(case):
    return load_model(case.auto_class, case.folder, PartialVocabulary(USED, V))


@pytest.fixture(params=["adapter", "full"])
def run(request, case, data, tmp_path, monkeypatch):
    """The output folder of a training run, which evaluated and saved at three steps."""
    monkeypatch.chdir(tmp_path)
    arguments = TrainingArguments(
        "run", max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=4, save_steps=4, metric_for_best_model="loss",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    kind, model = (AdapterTrainer, adapter_model(case)) if request.param == "adapter" else (Trainer, full_model(case))
    kind(model, arguments, train_dataset=data, eval_dataset=data, data_collator=default_data_collator).train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoint-12",
        "checkpoint-4",
        "checkpoint-8",
    ]
    return tmp_path / "run"


def best_of(run):
    state = json.loads((run / "checkpoint-12" / "trainer_state.json").read_text())
    return int(state["best_model_checkpoint"].rsplit("-", 1)[1])


def set_best(run, name):
    path = run / "checkpoint-12" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best_model_checkpoint": name}))


def merged(run, step, case):
    """What merging the folder of one checkpoint gives."""
    merge_checkpoint(case.folder, run / f"checkpoint-{step}", "expected", overwrite=True)
    return read("expected")


@pytest.mark.parametrize("choice", ["latest", "best", "4", "8"])
def test_one_of_several(run, case, choice):
    set_best(run, "somewhere/else/run/checkpoint-8")
    step = {"latest": 12, "best": 8}.get(choice, choice)
    assert main(["--base", case.folder, "--delta", "run", "--checkpoint", choice, "--output", "out"]) == 0
    assert read("out") == merged(run, step, case)
    others = [merged(run, other, case) for other in STEPS if other != int(step)]
    assert read("out") not in others


def test_the_best_is_the_trainer_s(run, case):
    merge_checkpoint(case.folder, "run", "out", checkpoint="best")
    assert read("out") == merged(run, best_of(run), case)


def test_a_step_as_a_number(run, case):
    merge_checkpoint(None, "run", "out", checkpoint=8)
    assert read("out") == merged(run, 8, case)


def test_the_command_that_the_error_shows_works(run, case, capsys):
    assert main(["--base", case.folder, "--delta", "run"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "holds 3 deltas (checkpoint-4" in err
    command = shlex.split(err.split("; the newest is: ")[1])
    assert command == ["pema-merge", "--delta", "run", "--checkpoint", "latest"]
    assert main(command[1:]) == 0
    assert read("run/merged") == merged(run, 12, case)


def test_together_with_the_name_of_an_adapter(case, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = adapter_model(case, ("task", "other"))
    arguments = TrainingArguments(
        "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    AdapterTrainer(model, arguments, train_dataset=data, data_collator=default_data_collator).train()
    assert main(["--delta", "run", "--adapter", "task"]) == 1
    command = shlex.split(capsys.readouterr().err.split("; the newest is: ")[1])
    assert command[1:] == ["--delta", "run", "--checkpoint", "latest", "--adapter", "task"]
    assert main(command[1:]) == 0
    merge_checkpoint(case.folder, "run/checkpoint-2/task", "out")
    assert read("run/merged") == read("out")
    assert main(["--delta", "run"]) == 1  # neither adapter nor checkpoint: the command names both
    command = shlex.split(capsys.readouterr().err.split("; the newest is: ")[1])
    assert main([*command[1:], "--overwrite"]) == 0


@pytest.fixture
def steps(tmp_path):
    """A run of three checkpoints without contents."""
    for step in STEPS:
        (tmp_path / "run" / f"checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-best").mkdir()
    (tmp_path / "run" / "checkpoint-99").write_text("a file")
    (tmp_path / "run" / "checkpoint-12" / "trainer_state.json").write_text("{}")
    return tmp_path / "run"


def refused(run, choice):
    with pytest.raises(FormatError) as error:
        pick_checkpoint(run, choice)
    return str(error.value)


@pytest.mark.parametrize("choice", ["newest", "-4", "", "4.0", "checkpoint-4", "../4"])
def test_what_is_no_choice(steps, choice, capsys):
    assert refused(steps, choice) == f"checkpoint {choice!r}: expected latest, best, or the number of a step"
    with pytest.raises(SystemExit) as stop:
        main(["--delta", str(steps), f"--checkpoint={choice}"])
    assert stop.value.code == 2
    assert f"expected latest, best or the number of a step, found {choice!r}" in capsys.readouterr().err


def test_what_is_not_there(steps, tmp_path):
    assert refused(steps, 5) == f"{steps}: no checkpoint-5 here; found the steps 4, 8, 12"
    assert refused(steps / "checkpoint-4", "latest") == (
        f"{steps}/checkpoint-4: no checkpoint-STEP folder here; --checkpoint needs a Trainer's output folder"
    )
    assert refused(tmp_path / "nowhere", "latest").startswith(f"{tmp_path}/nowhere: no such folder; expected a Trainer")


def test_no_state_to_name_the_best(steps):
    state = steps / "checkpoint-12" / "trainer_state.json"
    state.unlink(missing_ok=True)
    assert (
        refused(steps, "best")
        == f"{state}: no such file, which names the best checkpoint; choose a step with --checkpoint"
    )


@pytest.mark.parametrize("named", [None, "run/final", 3, ["checkpoint-4"]])
def test_no_best(steps, named):
    set_best(steps, named)
    state = steps / "checkpoint-12" / "trainer_state.json"
    assert refused(steps, "best") == (
        f"{state}: names no best checkpoint (found {str(named)!r}); train with metric_for_best_model, or choose a step "
        "with --checkpoint"
    )


def test_the_best_is_gone(steps):
    set_best(steps, r"C:\run\checkpoint-8")
    assert pick_checkpoint(steps, "best").name == "checkpoint-8"
    shutil.rmtree(steps / "checkpoint-8")
    assert refused(steps, "best") == (
        f"{steps}: no checkpoint-8 here (trainer_state.json of checkpoint-12 names it as the best); found the steps 4, 12"
    )
