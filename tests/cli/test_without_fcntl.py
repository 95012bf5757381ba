"""Without fcntl and resource, as on Windows, everything works but merging, which refuses in one line."""

import subprocess
import sys

import pytest

PREAMBLE = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


for name in ("fcntl", "resource"):
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Missing())
"""


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + program, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("command", ["merge", "scan"])
@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_work(command, option):
    done = run(f"from pema_adapters.cli.{command} import main; main()", option)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"pema-{command}" in done.stdout


@pytest.mark.parametrize("arguments", [["--delta", "run"], ["--base", "base", "--undo"]])
def test_merging_is_refused_in_one_line(arguments):
    done = run("from pema_adapters.cli.merge import main; sys.exit(main())", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "pema-merge: error: merging needs file locks and positional reads, which this system lacks (no fcntl module); "
        "merge on Linux or macOS, or on Windows in WSL\n"
    )


@pytest.mark.slow
def test_training_and_scanning_work(case, tmp_path):
    program = """
        from transformers import AutoModelForSequenceClassification
        from pema_adapters import PartialVocabulary, load_model, save_delta
        vocabulary = PartialVocabulary.from_dataset([{"input_ids": [[3, 5, 8]]}], vocab_size=120)
        vocabulary.save(sys.argv[2] + ".vocabulary")
        model = load_model(AutoModelForSequenceClassification, sys.argv[1], PartialVocabulary.load(sys.argv[2] + ".vocabulary"))
        save_delta(model, sys.argv[2])
    """
    done = run("if True:" + program, case.folder, str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
