"""The paper's tables computed anew: arithmetic on a tokenizer and texts that can be counted by hand."""

import gzip
import json
import sys

import pytest
from transformers.utils import logging as transformers_logging

from tests.paths import TOOLS

sys.path.append(str(TOOLS))

import paper_tables
from paper.data import Usage, texts
from paper.figures import MEAN, SUBSETS, TABLE_5_ROWS, TABLE_6_SHAPES, TABLES, TASKS
from paper.models import CASED, MODELS, model_of
from paper_tables import GLUE, XNLI, Cell, Size, cause, causes, cells
from pema_adapters import PartialVocabulary

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = 4  # [PAD], [UNK], [CLS], [SEP]
V, D = 50_265, 768  # RoBERTa's
ROBERTA = 124_647_170
DISTILROBERTA = 82_119_938


@pytest.fixture
def tokenizers(tmp_path):
    """A folder with one tokenizer, trained on WORDS: RoBERTa's by its name alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trained.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=special))
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    folder = tmp_path / "tokenizers"
    PreTrainedTokenizerFast(tokenizer_object=trained, **names).save_pretrained(folder / "roberta-base")
    return folder


@pytest.fixture
def quiet():
    verbosity = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(verbosity)


def write(folder, train, validation="w0", test="w0"):
    """A task: a text a line, or two with a tab between; the test split without labels, and not compressed."""
    folder.mkdir(parents=True)
    header = "sentence1\tsentence2" if "\t" in train else "sentence"
    for name, rows in {"train": train, "validation_matched": validation}.items():
        lines = [f"{header}\tlabel", *(f"{row}\t1" for row in rows.splitlines())]
        (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    (folder / "test.tsv").write_text(f"{header}\n{test}\n")


@pytest.fixture
def glue(tmp_path):
    write(tmp_path / "glue" / "CoLA", 'w0 w1\nw1 "w2', "w3", "w4")
    write(tmp_path / "glue" / "rte", f"{'w5 ' * 100}w6\t{'w7 ' * 100}w8", "w9\tw9", "w9\tw10 w11")
    return tmp_path / "glue"


def used(usage, task, benchmark=GLUE):
    return len(usage.of("roberta-base", V, benchmark, (task,)))


def by_row(found, column, section=paper_tables.EMBEDDING):
    return {cell.row: cell for cell in found if cell.column == column and cell.section == section}


def table_lines(printed):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


def test_used_rows_are_those_of_all_splits_with_special_tokens_and_pad(tokenizers, glue):
    usage = Usage(tokenizers, {GLUE: glue})
    assert used(usage, "CoLA") == 4 + SPECIAL  # w0, w1, w3, w4; '"w2' is one word, and unknown
    assert usage.rows == {(GLUE, "CoLA"): 4}


def test_pairs_are_cut_at_128_and_never_used_unknown_is_not_counted(tokenizers, glue):
    assert used(Usage(tokenizers, {GLUE: glue}), "RTE") == 5 + SPECIAL - 1  # w5, w7, w9, w10, w11; not w6, w8


def test_reductions(tokenizers, glue):
    found = list(cells(2, Usage(tokenizers, {GLUE: glue})))
    assert by_row(found, "CoLA")["RoBERTa"].ours == pytest.approx(100 * (V - 8) / V)
    model = by_row(found, "CoLA", paper_tables.MODEL)
    assert model["RoBERTa"].ours == pytest.approx(100 * (V - 8) * D / ROBERTA)
    assert model["DistilRoBERTa"].ours == pytest.approx(100 * (V - 8) * D / DISTILROBERTA)


def test_reduction_in_millions():
    size, vocabulary = Size(rows=1_000, width=50, total=80_000), PartialVocabulary(range(200), 1_000)
    assert {name: formula(size, vocabulary) for name, formula in paper_tables.REDUCTIONS.items()} == {
        paper_tables.EMBEDDING: pytest.approx(80),
        paper_tables.MODEL: pytest.approx(50),
        paper_tables.MILLIONS: pytest.approx(0.04),
    }


def test_missing_tokenizers_tasks_and_splits_leave_dashes(tokenizers, glue):
    write(glue / "WNLI", "w1\tw2", "w1\tw2", "w1\tw2")
    (glue / "WNLI" / "test.tsv").unlink()
    usage = Usage(tokenizers, {GLUE: glue})
    found = list(cells(2, usage))
    computed = {(cell.row, cell.column) for cell in found if cell.ours is not None}
    assert computed == {(row, task) for row in ("RoBERTa", "DistilRoBERTa") for task in ("CoLA", "RTE")}
    assert len(found) == 2 * 9 * 10
    assert str(by_row(found, "MNLI")["BERT"]) == "14.8 -"
    assert {"tokenizer xlm-v-base", "GLUE WNLI", "GLUE QQP"} <= usage.missing.keys()


def test_the_mean_wants_all_tasks(tokenizers, tmp_path):
    for number, task in enumerate(TASKS):
        write(tmp_path / "all" / task, " ".join(WORDS[: number + 1]))
    mean = by_row(cells(2, Usage(tokenizers, {GLUE: tmp_path / "all"})), MEAN)
    assert mean["RoBERTa"].ours == pytest.approx(100 * (V - 5 - (SPECIAL - 1)) / V)
    assert mean["BERT"].ours is None


def test_subsets_of_xnli_are_unions(tokenizers, tmp_path, monkeypatch):
    for language, text in {"en": "w1\tw2", "de": "w2\tw3", "zh": "w2\tw1"}.items():
        write(tmp_path / "xnli" / language, text, text, text)
    monkeypatch.setitem(MODELS, "mBERT", MODELS["RoBERTa"])
    found = {cell.column: cell.ours for cell in cells(4, Usage(tokenizers, {XNLI: tmp_path / "xnli"})) if cell.ours}
    own = SPECIAL - 1
    assert found.keys() == SUBSETS.keys() - {"All"}  # twelve languages are not there
    assert found["en-de"] == pytest.approx(100 * (V - 3 - own) * D / ROBERTA)
    assert found["en"] == found["en-zh"] == pytest.approx(100 * (V - 2 - own) * D / ROBERTA)


@pytest.mark.parametrize("number", [5, 6])
def test_parameters_of_the_models_equal_the_papers(number):
    found = list(cells(number, Usage(None, {})))
    assert found
    assert all(cell.equal and cell.close for cell in found)


def test_shapes_that_are_given_are_those_of_the_models():
    assert {row: (model_of(5, row).rows,) for row in TABLE_5_ROWS} == TABLE_5_ROWS
    shapes = {row: model_of(6, row).config for row in TABLE_6_SHAPES}
    assert {
        row: (config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
        for row, config in shapes.items()
    } == TABLE_6_SHAPES
    assert CASED.keys() < MODELS.keys()


def test_every_row_of_the_paper_has_a_figure_a_column_and_a_model():
    for number, shown in TABLES.items():
        for rows in shown.sections.values():
            assert {len(figures) for figures in rows.values()} == {len(shown.columns)}
            assert all(model_of(number, row) for row in rows)


@pytest.mark.parametrize(
    ("ours", "shown", "close", "equal"),
    [
        (80.06, "80.1 80.06 -0.04", True, True),
        (80.1 - 1e-9, "80.1 80.10 +0.00", True, True),
        (80.2, "80.1 80.20 +0.10", True, False),
        (80.21, "80.1 80.21 +0.11 !", False, False),
        (None, "80.1 -", False, False),
    ],
)
def test_a_cell(ours, shown, close, equal):
    cell = Cell(2, paper_tables.EMBEDDING, "BERT", "CoLA", 80.1, ours)
    assert (str(cell), cell.close, cell.equal) == (shown, close, equal)


def test_causes():
    usage = Usage(None, {}, rows={(GLUE, "CoLA"): 12, (GLUE, "RTE"): 5_767})
    names = [("BERT", "CoLA"), ("XLM-RoBERTa", "RTE"), ("BERT", "RTE"), ("BERT", MEAN)]
    off = [Cell(2, paper_tables.MODEL, row, column, 50.0, 60.0) for row, column in names]
    assert [cause(cell, usage) for cell in off] == [
        "12 rows in the data, 10,657 in the paper's Table 7",
        paper_tables.CAUSES["xlm-roberta-base"],
        "no cause known",
        "the mean of the cells beside it",
    ]
    assert causes([off[2], off[2]], usage) == "! BERT RTE: no cause known"
    assert not causes([Cell(2, paper_tables.MODEL, "BERT", "RTE", 50.0, found) for found in (50.0, None)], usage)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label\tidx\n", "found the columns label, idx, expected one or two of text"),
        ("sentence\tlabel\nw1\n", "line 2: 1 columns, but 2 in the header"),
    ],
)
def test_files_that_are_not_tasks_are_refused(tmp_path, content, message):
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(SystemExit, match=message):
        list(texts(tmp_path / "train.tsv"))


def test_the_tool(tokenizers, glue, tmp_path, monkeypatch, capsys, quiet):
    options = ["--tokenizers", tokenizers, "--glue", glue, "--tables", "2", "6", "--json", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *map(str, options)])
    paper_tables.main()
    printed = capsys.readouterr().out
    lines = table_lines(printed)
    assert lines[0] == ["Model", *TASKS, MEAN]
    assert [len(line) for line in lines] == 2 * 11 * [11] + 6 * [7] + 5 * [5]
    assert ["RoBERTa", "86.1 99.98 +13.88 !", "14.8 -"] in [line[:3] for line in lines]
    assert "! DistilRoBERTa CoLA, RoBERTa CoLA: 4 rows in the data, 10,657 in the paper's Table 7" in printed
    assert lines[-1] == ["All", "12", "12", "20", "192"]
    written = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert paper_tables.render(written) in printed
    assert written["counts"] == {"close": 12, "equal": 12, "allowed": 20, "paper": 192}
    assert [scan["used"] for scan in written["scans"]] == [8, 8]


@pytest.mark.parametrize(
    ("options", "message"), [([], "Tables 2 and 3 want"), (["--glue", "nowhere"], "nowhere: no such folder")]
)
def test_wrong_usage(monkeypatch, capsys, options, message):
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *options])
    with pytest.raises(SystemExit, match="2"):
        paper_tables.main()
    assert message in capsys.readouterr().err
