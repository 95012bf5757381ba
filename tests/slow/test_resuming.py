"""A run of a recipe, ended anywhere and gone on with, gives what it would have given."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from runs.tasks import TaskError
from runs.training import run
from tests.recipes.conftest import RECIPES
from tests.recipes.tiny import BY_NAME, SETTING


class TestRun:
    @pytest.mark.parametrize("method, pema", [("Full fine-tuning", "on"), ("Compacter", "on")])
    def test_goes_on_from_a_checkpoint(self, base, place, method, pema, monkeypatch):
        """Interrupted after step 6 of 10, with a checkpoint of step 4, it ends where it would have ended."""
        setting = replace(SETTING, base=base, method=method, pema=pema)
        whole = run(BY_NAME["CoLA"], setting, place)
        assert whole["steps"] == 10
        step, steps = Trainer.training_step, []

        def interrupted(*args, **kwargs):
            steps.append(1)
            if len(steps) == 7:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))
        again = run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))
        assert len(steps) == 7 + 6
        assert found_alike(again) == found_alike(whole)

    @pytest.mark.parametrize(
        "cut, steps",
        [("checkpoint-4/optimizer.pt", 10), ("checkpoint-8/optimizer.pt", 6), ("checkpoint-8/rng_state.pth", 6)],
    )
    def test_goes_on_from_the_newest_whole_checkpoint(self, base, place, cut, steps, monkeypatch):
        """Interrupted in the middle of a file of a checkpoint: that one does not count."""
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        whole = run(BY_NAME["CoLA"], setting, replace(place, save_steps=0))
        save = torch.save

        def interrupted(content, path, *args, **kwargs):
            save(content, path, *args, **kwargs)
            if str(path).endswith(cut):
                os.truncate(path, Path(path).stat().st_size // 2)
                raise KeyboardInterrupt

        with monkeypatch.context() as patches:
            patches.setattr(torch, "save", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(BY_NAME["CoLA"], setting, place)
        assert (place.checkpoints / cut).exists()
        taken = counted_steps(monkeypatch)
        assert found_alike(run(BY_NAME["CoLA"], setting, place)) == found_alike(whole)
        assert len(taken) == steps
        assert [path.name for path in place.checkpoints.iterdir()] == ["checkpoint-10"]

    def test_a_checkpoint_of_another_setting_is_refused(self, base, place, monkeypatch):
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(Trainer, "evaluate", interrupt)
            run(BY_NAME["CoLA"], setting, place)
        with pytest.raises(TaskError, match=r"checkpoint-10: made with seed 0, now asked for with 1: .* or delete it"):
            run(BY_NAME["CoLA"], replace(setting, seed=1), place)

    def test_a_checkpoint_of_nothing_but_half_a_model_does_not_count(self, base, place):
        setting = replace(SETTING, base=base)
        whole = run(BY_NAME["CoLA"], setting, place)
        half = place.checkpoints / "checkpoint-4"
        half.mkdir(parents=True)
        (half / "config.json").write_text("{}")
        (half / "pytorch_model.bin").write_bytes(b"PK\x03\x04\x00\x00")
        assert found_alike(run(BY_NAME["CoLA"], setting, replace(place, save_steps=4))) == found_alike(whole)

    def test_goes_on_after_the_last_step(self, base, place, monkeypatch):
        """Interrupted while it was scored, with nothing left to train."""
        setting, place = replace(SETTING, base=base), replace(place, save_steps=4)
        whole = run(BY_NAME["CoLA"], setting, replace(place, save_steps=0))

        with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
            patches.setattr(Trainer, "evaluate", interrupt)
            run(BY_NAME["CoLA"], setting, place)
        taken = counted_steps(monkeypatch)
        assert found_alike(run(BY_NAME["CoLA"], setting, place)) == found_alike(whole)
        assert taken == []

    @pytest.mark.parametrize("learning_rate, finite", [(1e-2, True), (1e30, False)])
    def test_the_training_loss_is_trainers_own(self, base, place, learning_rate, finite, monkeypatch):
        """Also where losses are not numbers, which Trainer leaves out of the mean."""
        train, step, own, losses = Trainer.train, Trainer.training_step, [], []

        def trained(*args, **kwargs):
            own.append(train(*args, **kwargs))
            return own[-1]

        def stepped(*args, **kwargs):
            losses.append(step(*args, **kwargs))
            return losses[-1]

        monkeypatch.setattr(Trainer, "train", trained)
        monkeypatch.setattr(Trainer, "training_step", stepped)
        found = run(BY_NAME["RTE"], replace(SETTING, base=base, learning_rate=learning_rate), place)
        assert all(math.isfinite(loss) for loss in losses) == finite
        assert found["training_loss"] == own[0].training_loss > 0


def found_alike(result):
    """Of a run's result, what does not depend on time and memory."""
    return {name: result[name] for name in ("scores", "steps", "training_loss")}


def counted_steps(monkeypatch):
    """A list that grows with each step of training from now on."""
    step, taken = Trainer.training_step, []

    def counted(*args, **kwargs):
        taken.append(1)
        return step(*args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counted)
    return taken


def test_a_command_that_is_killed_goes_on(base, data_dir, tmp_path, glue):
    """And its run dies with it, which would write where the next command works. The figure is in a folder to come."""
    options = [
        "--base", base, "--data-dir", data_dir, "--tasks", "CoLA", "--methods", "LoRA", "--pema", "on", "--seeds", 0,
        "--batch-size", 1, "--epochs", 10, "--threads", 1, "--save-steps", 10,
    ]  # fmt: skip
    out, checkpoints = tmp_path / "killed", tmp_path / "killed" / "checkpoints" / "cola-lora-on-seed0"
    command = subprocess.Popen([sys.executable, str(RECIPES / "glue.py"), *map(str, options), "--output", str(out)])
    wait_for(lambda: any(checkpoints.glob("checkpoint-*/recipe.json")))
    os.kill(command.pid, signal.SIGKILL)
    command.wait()
    time.sleep(2)
    left = sorted(path.name for path in checkpoints.iterdir())
    assert not (out / "runs").exists()
    time.sleep(1)
    assert sorted(path.name for path in checkpoints.iterdir()) == left
    assert glue(*options, "--output", out, "--plot", out / "figure.png")[0] == 0
    assert glue(*options, "--output", tmp_path / "whole", "--plot", tmp_path / "whole" / "figure.png")[0] == 0
    killed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    assert found_alike(killed[0]) == found_alike(whole[0])
    assert not checkpoints.exists()


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def wait_for(happened, seconds=120):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
