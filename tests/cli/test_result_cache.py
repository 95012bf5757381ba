"""Complete results of pema-scan: repeating a command loads nothing, unless an input has just been written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pema_adapters.cli.scan import main
from tests.cli.test_scan_cache import WORDS, entries, folder, save_tokenizer  # noqa: F401 - a fixture among them

pytestmark = pytest.mark.usefixtures("settings_as_they_were")


def ask(capsys, *arguments):
    code = main(["--tokenizer", "tok", "--data", "x.txt", *arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def old(folder):  # noqa: F811
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return folder


def test_a_repeated_command_loads_nothing(old, capsys):
    assert ask(capsys, "--json")[0] == 0
    call = "from pema_adapters.cli.scan import main; import sys; code = main(sys.argv[1:]); "
    check = "assert not {'transformers', 'datasets', 'torch'} & set(sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", call + check, "--tokenizer", "tok", "--data", "x.txt"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert "tokens seen                3\n" in again.stdout
    assert "\n\nnote: the figures are those of an earlier scan" in again.stdout


def test_requested_files_are_still_written(old, capsys):
    ask(capsys)
    code, shown, _ = ask(capsys, "--save", "x.vocabulary")
    assert (code, Path("x.vocabulary").exists()) == (0, True)
    assert "earlier scan" in shown


@pytest.mark.parametrize("arguments, key", [(["--unused"], "unused"), (["--max-length", "1"], "tokens")])
def test_other_options_miss_the_cache(old, capsys, arguments, key):
    first = json.loads(ask(capsys, "--json")[1])
    assert json.loads(ask(capsys, "--json", *arguments)[1])[key] != first.get(key)


def test_no_cache_scans_again(old, capsys):
    ask(capsys)
    assert not json.loads(ask(capsys, "--json", "--no-cache")[1])["from_cache"]


def test_another_tokenizer_of_the_same_name_misses_the_cache(old, capsys):
    first = json.loads(ask(capsys, "--json")[1])
    WORDS.append("more")
    try:
        save_tokenizer("tok")
    finally:
        WORDS.pop()
    assert json.loads(ask(capsys, "--json")[1])["vocab_size"] == first["vocab_size"] + 1


def test_a_recently_changed_tokenizer_is_not_cached(folder, capsys):  # noqa: F811
    ask(capsys)
    assert not entries(folder, "answer")
