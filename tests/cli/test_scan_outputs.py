"""What pema-scan prints and writes, with memory, several tokenizers, unused tokens, plots and interrupts."""

import io
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import datasets
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertConfig, GPT2Config, PreTrainedTokenizerFast

from pema_adapters import PartialVocabulary, memory_report
from pema_adapters.analysis.heaps_law import fit_heaps_law
from pema_adapters.analysis.memory_report import OPTIMIZERS
from pema_adapters.cli.scan import main
from tests.paths import REPOSITORY

TRAINED_ON = ["the cat sat on the mat", "a naïve café, a 猫 and the cat"] * 3
TEXT = "the cat sat\non the cat\n"
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is the extra `plot`")
pytestmark = pytest.mark.usefixtures("settings_as_they_were")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the tokenizers and configs `small` (tied head) and `large`, and `x.txt`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shapes = {"num_attention_heads": 2, "num_hidden_layers": 1}
    rows = train("small", 270)
    GPT2Config(
        vocab_size=rows, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"], bos_token_id=0
    ).save_pretrained("small")
    train("large", 290)
    BertConfig(vocab_size=400, hidden_size=32, intermediate_size=64, pad_token_id=0, **shapes).save_pretrained("large")
    (tmp_path / "x.txt").write_text(TEXT)
    return tmp_path


def train(name, rows):
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TRAINED_ON, vocab_size=rows, min_frequency=1, special_tokens=["<pad>"], show_progress=False
    )
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>").save_pretrained(name)
    return trained.get_vocab_size()


def ids_by_hand(name):
    tokenizer = AutoTokenizer.from_pretrained(name)
    return [token_id for line in TEXT.splitlines() for token_id in tokenizer(line)["input_ids"]]


def printed(capsys, *arguments):
    assert main(["--data", "x.txt", "--no-cache", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def figures_of(capsys, *arguments):
    return json.loads(printed(capsys, "--json", *arguments))


# ---- memory


def test_json_has_the_memory(folder, capsys):
    """The figures are those of memory_report; what they are is tested there."""
    figures = figures_of(capsys, "--tokenizer", "large", "--model", "large")
    vocabulary = PartialVocabulary(ids_by_hand("large"), 400)
    assert figures["memory"] == [memory_report("large", vocabulary, optimizer).to_dict() for optimizer in OPTIMIZERS]


def test_the_table_has_the_memory(folder, capsys):
    out = printed(capsys, "--tokenizer", "large", "--model", "large")
    kept, dim = len({*ids_by_hand("large"), 0}), 32
    saved, params = (400 - kept) * dim, memory_report("large", PartialVocabulary([], 400)).parameters
    assert f"rows in training           {kept} (K, and ids that the model inserts itself)\n" in out
    assert f"embedding rows saved       {400 - kept} ({(400 - kept) / 400:.1%})\n" in out
    assert (
        f"model parameters           {params:,} (BertModel)\n  saved                    {saved:,} ({saved / params:.1%})\n"
        in out
    )
    rows = [line.split() for line in out.splitlines() if line.startswith("AdamW")]
    assert [row[:2] for row in rows] == [["AdamW", "fp32"], ["AdamW", "bf16"], ["AdamW", "8-bit"]]
    assert rows[0][2:6] == [f"{4 * saved / 1e3:.1f}", "kB"] * 2
    assert rows[1][6:8] == [f"{4 * saved / 1e3:.1f}", "kB"]
    assert rows[2][6:8] == [f"{2 * saved / 1e3:.1f}", "kB"]


def test_a_tied_head_is_noted(folder, capsys):
    out = printed(capsys, "--tokenizer", "small", "--model", "small")
    assert "(GPT2LMHeadModel)" in out
    assert out.endswith(
        "note: the output of small is tied to its embedding and streams it from disk: without PEMA, logits take 0.0 MB "
        "more for each token with a label\n"
    )


# ---- several tokenizers


def test_several_tokenizers_make_a_table(folder, capsys):
    both = ["--tokenizer", "small", "--tokenizer", "large"]
    small, large = figures_of(capsys, *both)
    assert (small, large) == (figures_of(capsys, *both[:2]), figures_of(capsys, *both[2:]))
    assert printed(capsys, *both).splitlines() == [
        "tokenizer    V  tokens seen  K  reduction",
        f"small      {small['vocab_size']}  {small['tokens']:>11}  {small['partial_vocab_size']}  {small['reduction']:>9.1%}",
        f"large      {large['vocab_size']}  {large['tokens']:>11}  {large['partial_vocab_size']}  {large['reduction']:>9.1%}",
    ]


def test_several_models_make_a_memory_table(folder, capsys):
    both = ["--tokenizer", "small", "--tokenizer", "large", "--model", "small", "--model", "large"]
    small, large = figures_of(capsys, *both)
    assert [figures["memory"][0]["model"] for figures in (small, large)] == ["small", "large"]
    table, memory, note = printed(capsys, *both).split("\n\n")
    assert table.splitlines()[0].split("  ")[-1] == "model parameters saved"
    assert [line.split("  ")[0] for line in memory.splitlines()] == ["model", *["small"] * 3, *["large"] * 3]
    assert note.startswith("note: the output of small is tied")


WRONG_USAGE = {
    "one model too few": ["--tokenizer", "a", "--tokenizer", "b", "--model", "a"],
    "save of two": ["--tokenizer", "a", "--tokenizer", "b", "--save", "x"],
    "no number": ["--tokenizer", "a", "--unused", "few"],
}


@pytest.mark.parametrize("case", WRONG_USAGE)
def test_wrong_usage_exits_with_2(case, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--data", "x", *WRONG_USAGE[case]])
    assert caught.value.code == 2
    assert "pema-scan: error: " in capsys.readouterr().err


# ---- the vocabulary as a file; what is not in it


def test_save_writes_the_vocabulary(folder, capsys):
    figures = figures_of(capsys, "--tokenizer", "large", "--model", "large", "--save", "x.vocabulary")
    vocabulary = PartialVocabulary.load("x.vocabulary")
    assert vocabulary == PartialVocabulary(ids_by_hand("large"), 400)
    assert (len(vocabulary), vocabulary.vocab_size) == (figures["partial_vocab_size"], figures["vocab_size"])


def test_unused_lists_tokens_in_json(folder, capsys):
    used, tokenizer = {*ids_by_hand("large"), 0}, AutoTokenizer.from_pretrained("large")
    unused = [token_id for token_id in range(400) if token_id not in used]
    figures = figures_of(capsys, "--tokenizer", "large", "--model", "large", "--unused", "999")
    assert figures["unused"] == len(unused) == 400 - figures["partial_vocab_size"] - 1  # but for <pad>
    assert figures["unused_tokens"] == [[i, tokenizer.convert_ids_to_tokens(i)] for i in unused]
    assert figures["unused_tokens"][-1] == [399, None]
    assert "unused" not in figures_of(capsys, "--tokenizer", "large")


def test_unused_lists_tokens_as_text(folder, capsys):
    alone = printed(capsys, "--tokenizer", "large", "--unused")
    assert (
        f"tokens never used          {len(AutoTokenizer.from_pretrained('large')) - len({0, *ids_by_hand('large')})}\n"
        in alone
    )
    assert "the first" not in alone
    assert printed(capsys, "--tokenizer", "large", "--unused", "2").endswith(
        "\nnever used, the first 2:\n  1  '!'\n  2  '\"'\n"
    )
    assert "\n  399  no token\n" in printed(capsys, "--tokenizer", "large", "--model", "large", "--unused", "999")


def test_an_ascii_terminal_gets_escapes(folder, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["--data", "x.txt", "--tokenizer", "large", "--unused", "200"]) == 0
    assert b"'\\xa1'" in terminal.buffer.getvalue()


# ---- growth


def test_json_has_the_growth(folder, capsys):
    (folder / "x.txt").write_text(TEXT * 40)
    figures = figures_of(capsys, "--tokenizer", "large")
    ids = ids_by_hand("large") * 40
    assert figures["growth"] == [[n, len(set(ids[:n]))] for n, _ in figures["growth"]]
    assert figures["growth"][-1] == [len(ids), figures["partial_vocab_size"]]
    assert figures["heaps_law"] == vars(fit_heaps_law(figures["growth"]))


@needs_matplotlib
def test_plot_writes_a_figure(folder, capsys):
    printed(capsys, "--tokenizer", "small", "--tokenizer", "large", "--plot", "growth.png")
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")


REFUSED = {
    "suffix": (["--plot", "x.bmp2"], "x.bmp2: found .bmp2, expected one of "),
    "folder of the plot": (["--plot", "none/x.png"], "none/x.png: no such folder: none"),
    "folder of the vocabulary": (["--save", "none/x"], "none/x: no such folder: none"),
    "a folder for the plot": (["--plot", "folder.png"], "folder.png: is a folder, expected the name of a file"),
    "a folder for the vocabulary": (["--save", "folder.png"], "folder.png: is a folder"),
}


@needs_matplotlib
@pytest.mark.parametrize("case", REFUSED)
def test_outputs_are_refused_before_the_scan(case, folder, capsys, monkeypatch):
    monkeypatch.setattr("pema_adapters.scanning.scanner.Scanner.scan_any", lambda *_: pytest.fail("it was scanned"))
    (folder / "folder.png").mkdir()
    arguments, message = REFUSED[case]
    assert main(["--data", "x.txt", "--tokenizer", "large", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"pema-scan: error: {message}")


def test_plot_without_matplotlib_is_refused(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--data", "x.txt", "--tokenizer", "large", "--plot", "x.png"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install 'pema-adapters[plot]'" in err


# ---- manners


def run_in_child(folder, *arguments, before="", **environment):
    """pema-scan in a process of its own, after the line of Python `before`."""
    code = f"import sys; from pema_adapters.cli.scan import main; {before}\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "--tokenizer", "large", "--data", "x.txt", *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(folder / "cache"), **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_but_the_result_without_a_terminal(folder, capsys):
    """Even a long scan, and even what datasets does before it."""
    before = "import pema_adapters.scanning.progress as p; p.SECONDS_BEFORE_BAR = 0"
    done = run_in_child(folder, "--model", "large", before=before)
    assert (done.returncode, done.stderr) == (0, "")
    printed(capsys, "--tokenizer", "large")
    assert datasets.are_progress_bars_disabled()


@needs_matplotlib
@pytest.mark.parametrize(
    "where",
    ["scanning.cache.cached_scan.scan_text", "cli._scan_metrics.memory_report", "analysis.heaps_law.render_figure"],
)
def test_an_interrupted_scan_is_one_line(where, folder, capsys, monkeypatch):
    """Ctrl-C amid the scan, the report, or the output: one line, and no files."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    monkeypatch.setattr(f"pema_adapters.{where}", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    arguments = ["--data", "x.txt", "--tokenizer", "large", "--model", "large", "--plot", "x.png", "--save", "x.voc"]
    assert main(arguments) == 1
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "pema-scan: interrupted\n")
    assert [path.name for path in folder.glob("x.*")] == ["x.txt"]


@pytest.mark.slow
def test_an_interrupted_stream_is_one_line(folder):
    """The generators that are left half-way have nothing to say either."""
    (folder / "x.txt").write_text(TEXT * 5_000)
    before = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pema_adapters.scanning.bitmap import GrowingBitmap as B; mark, seen = B.mark, []\n"
        "B.mark = lambda *a, **b: (seen.append(1), signal.raise_signal(signal.SIGINT) if len(seen) > 3 else 0, mark(*a, **b))[2]"
    )
    done = run_in_child(folder, before=before)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pema-scan: interrupted; run the same command again to resume at row 1,000\n"
