"""scan_text gives the same ids, growth and errors with threads, processes and after interruptions."""

import re
from functools import partial

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pema_adapters.errors import FormatError, PemaError, VocabularyError
from pema_adapters.io.cache_folder import CacheFolder
from pema_adapters.scanning import progress, text_columns
from pema_adapters.scanning.bitmap import GrowingBitmap
from pema_adapters.scanning.cache.scan_store import ScanStore
from pema_adapters.scanning.text_columns import Encoder
from pema_adapters.scanning.text_scanner import scan_text
from tests.words import WORDS, Words

V = len(WORDS)
ROWS = [{"premise": "a b", "hypothesis": "c", "label": 0}, {"premise": "a zz", "hypothesis": None, "label": 1}]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(text_columns, "BATCH_ROWS", 2)


def make_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def describe(scan):
    return scan.token_ids.tolist(), scan.tokens, scan.columns, scan.growth


def test_data_sets_and_streams_give_the_same_ids():
    data = Dataset.from_list(ROWS)
    kinds = (data, data.with_format("torch"), data.to_iterable_dataset(), {"train": data, "empty": data.select([])})
    for kind in kinds:
        found = scan_text(kind, Encoder(make_tokenizer()), vocab_size=V)
        assert (found.token_ids.tolist(), found.tokens) == ([1, 2, 3, 4], 5)
        assert found.columns == ("premise", "hypothesis")


def test_growth_counts_row_by_row():
    found = scan_text(Dataset.from_list(ROWS), Encoder(make_tokenizer()), vocab_size=V)
    ids = [2, 3, 4, 2, 1]  # a b, c; a zz
    assert found.growth == tuple((n, len(set(ids[:n]))) for n in range(1, 6))


def test_all_batches_of_a_stream_are_read():
    stream = IterableDataset.from_generator(lambda: ({"text": text} for text in ["a", "b", "c d", "e", "f"]))
    assert scan_text(stream, Encoder(make_tokenizer()), vocab_size=V).tokens == 6


@pytest.mark.parametrize("make", [make_tokenizer, Words], ids=["in Rust", "in Python"])
def test_processes_give_the_same_ids_and_errors(make):
    data = {"x": Dataset.from_list(ROWS * 20), "y": IterableDataset.from_generator(lambda: iter(ROWS[:1] * 3))}
    one, two = (scan_text(data, Encoder(make()), vocab_size=V, num_proc=n) for n in (1, 2))
    assert describe(one) == describe(two)
    for num_proc in (1, 2):
        with pytest.raises(VocabularyError, match="x, column 'hypothesis', row 0: token id 4 is outside"):
            scan_text(data, Encoder(make()), vocab_size=4, num_proc=num_proc)


def test_a_killed_process_is_reported():
    texts = Dataset.from_dict({"text": ["a"] * 150 + ["die"]})
    with pytest.raises(PemaError, match="one of 2 worker processes died while tokenizing"):
        scan_text(texts, Encoder(Words()), vocab_size=V, num_proc=2)


def test_an_unpicklable_tokenizer_is_refused_with_processes():
    """Like RoFormer's in transformers, it splits words in Python."""

    class Split:
        def pre_tokenize(self, text):
            text.split(lambda _, part: part.split(" ", "removed"))

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Split())
    data = Dataset.from_list(ROWS)
    assert scan_text(data, Encoder(tokenizer), vocab_size=V).tokens == 5
    with pytest.raises(
        PemaError, match=r"cannot send this tokenizer to other processes .*; scan in one process, without --num-proc"
    ):
        scan_text(data, Encoder(tokenizer), vocab_size=V, num_proc=2)


# ---- refusals


def test_errors_count_rows_without_text():
    rows = [{"s": None}, {"s": "a"}, {"s": None}, {"s": "h"}]
    with pytest.raises(VocabularyError, match="text, column 's', row 3: token id 9 is outside"):
        scan_text(Dataset.from_list(rows), Encoder(make_tokenizer()), vocab_size=9)


def test_errors_name_the_columns_of_a_pair():
    rows = [{"s": "a", "t": "b", "u": "c"}, {"s": "c", "t": "h", "u": "d"}]
    with pytest.raises(VocabularyError, match="text, column 's,t', row 1: token id 9 is outside"):
        scan_text(Dataset.from_list(rows), Encoder(make_tokenizer(), ("u", "s,t")), vocab_size=9)


def damaged_after(texts):
    yield from ({"text": text} for text in texts)
    raise ValueError("the rest is damaged")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_errors_come_in_the_order_of_rows(num_proc):
    """Batches are read ahead; an error in reading is raised after the results before it."""
    for texts, kind, message in (
        (["a"] * 6, FormatError, "text: cannot be read as a data set: the rest is damaged"),
        (["a"] * 5 + ["h"], VocabularyError, "text, column 'text', row 5: token id 9"),
    ):
        stream = IterableDataset.from_generator(partial(damaged_after, texts))
        with pytest.raises(kind, match=re.escape(message)):
            scan_text(stream, Encoder(make_tokenizer()), vocab_size=9, num_proc=num_proc)


# ---- columns that differ from the first rows


def in_splits(rows):
    yield Dataset.from_list(rows)
    yield Dataset.from_list(rows).to_iterable_dataset()
    yield IterableDataset.from_generator(lambda: iter(rows))


def test_a_column_of_strings_may_start_late():
    rows = [{"u": "a", "v": None}] * 5 + [{"u": "b", "v": "h"}]
    for data in in_splits(rows):
        for columns in ((), ("u", "v")):
            found = scan_text(data, Encoder(make_tokenizer(), columns), vocab_size=V)
            assert (found.token_ids.tolist(), found.tokens, found.columns) == ([2, 3, 9], 7, ("u", "v"))


def test_a_key_may_be_missing_from_some_rows():
    rows = [{"u": "a"}] * 5 + [{"u": "b", "v": "h"}] * 2 + [{"u": "c"}] * 5
    found = scan_text(IterableDataset.from_generator(lambda: iter(rows)), Encoder(make_tokenizer()), vocab_size=V)
    assert (found.token_ids.tolist(), found.tokens, found.columns) == ([2, 3, 4, 9], 14, ("u", "v"))


def test_errors_name_the_row_of_a_column_that_starts_late():
    rows = [{"u": "a", "v": None}] * 5 + [{"u": "b", "v": "h"}]
    for data in in_splits(rows):
        with pytest.raises(VocabularyError, match="text, column 'v', row 5: token id 9 is outside"):
            scan_text(data, Encoder(make_tokenizer()), vocab_size=9)


def test_a_column_of_mixed_types_is_refused():
    stream = IterableDataset.from_generator(lambda: iter([{"u": "a", "v": 1}] * 4 + [{"u": "b", "v": "h"}]))
    message = (
        "text, column 'v': found str from row 4 on, but int before; to read both as text, name all columns of text"
    )
    with pytest.raises(VocabularyError, match=re.escape(message)):
        scan_text(stream, Encoder(make_tokenizer()), vocab_size=V)
    assert scan_text(stream, Encoder(make_tokenizer(), ("v",)), vocab_size=V).tokens == 5


@pytest.mark.parametrize(("value", "kind"), [({"en": "a"}, "dict"), (b"a", "bytes")])
def test_columns_without_text_are_refused(value, kind):
    data = Dataset.from_list([{"t": None}] * 3 + [{"t": value}])
    with pytest.raises(VocabularyError, match=f"text, column 't', row 3: found {kind}, expected text, a list of words"):
        scan_text(data, Encoder(make_tokenizer(), ("t",)), vocab_size=V)


class Shouting(PreTrainedTokenizerFast):
    """Changes the text, which the Rust backend does not."""

    __module__ = "transformers.models.shouting"

    def __call__(self, texts, **options):
        return super().__call__([f"{text} h" for text in texts], **options)


def test_the_sample_skips_missing_text(monkeypatch):
    monkeypatch.setattr(text_columns, "BATCH_ROWS", 200)
    tokenizer = Shouting(tokenizer_object=make_tokenizer().backend_tokenizer, unk_token="[UNK]")
    data = Dataset.from_list([{"t": None}] * 150 + [{"t": "a"}])
    assert scan_text(data, Encoder(tokenizer, ("t",)), vocab_size=V).token_ids.tolist() == [2, 9]


def test_missing_words_are_refused():
    rows = [{"t": ["a", "b"]}] * 150 + [{"t": ["a", None]}]
    with pytest.raises(VocabularyError, match="the tokenizer refuses the text"):
        scan_text(Dataset.from_list(rows), Encoder(make_tokenizer(), ("t",)), vocab_size=V)


def test_max_length_is_refused_for_ids():
    with pytest.raises(VocabularyError, match="text: holds token ids already, which max_length 1 does not truncate"):
        scan_text(Dataset.from_list(IDS), Encoder(make_tokenizer(), max_length=1), vocab_size=V)


# ---- interrupted and resumed


class InterruptingStore(ScanStore):
    """Raises KeyboardInterrupt after `left` states."""

    left = 0

    def save_state(self, state):
        super().save_state(state)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def scan_until_interrupt(store, data, after, num_proc=1):
    resume_store = InterruptingStore(store, "key")
    resume_store.left = after
    return scan_text(data, Encoder(make_tokenizer()), vocab_size=V, resume_store=resume_store, num_proc=num_proc)


LATE = [{"u": "a", "v": None}] * 3 + [{"u": None, "v": "h"}] + [{"u": "b", "v": None}] * 4
IDS = [{"input_ids": [2, 3]}, {"input_ids": [4]}, {"input_ids": [4, 9]}]
SPLITS = {
    "text": Dataset.from_list(ROWS * 4),
    "ids": Dataset.from_list(IDS * 2),
    "stream": Dataset.from_dict({"text": ["e f", "g", "a", "b", "c"]}).to_iterable_dataset(),
    "late": IterableDataset.from_generator(lambda: iter(LATE)),
    "stream of ids": Dataset.from_list(IDS * 2).to_iterable_dataset(),
    "untyped stream of ids": IterableDataset.from_generator(lambda: iter(IDS)),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=5), st.permutations(sorted(SPLITS)))
def test_scans_interrupted_anywhere_equal_one_scan(tmp_path_factory, after, order):
    store, data = CacheFolder(tmp_path_factory.mktemp("store")), {name: SPLITS[name] for name in order}
    whole = scan_text(data, Encoder(make_tokenizer()), vocab_size=V)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "SECONDS_BETWEEN_STATES", 0)
        for count in [*after, 0]:
            try:
                found = scan_until_interrupt(store, data, count)
                break
            except KeyboardInterrupt as stop:
                assert re.fullmatch(r"run the same command again to resume at row \d+", str(stop))
    assert describe(found) == describe(whole)


def test_ids_after_the_last_state_are_counted_once(tmp_path, monkeypatch):
    """Ids marked after the last state are marked again, but counted once."""
    data, store = Dataset.from_list(ROWS * 50), CacheFolder(tmp_path)
    whole = scan_text(data, Encoder(make_tokenizer()), vocab_size=V)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_STATES", 0)
    with pytest.raises(KeyboardInterrupt, match="at row 4"):
        scan_until_interrupt(store, data, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="at row 4"):
        patch.setattr(GrowingBitmap, "count_distinct", interrupt)  # in the middle of a batch
        scan_until_interrupt(store, data, 0)
    found = scan_until_interrupt(store, data, 0)
    assert describe(found) == describe(whole)
    assert found.notes == ("resumed an interrupted scan at row 4",)


def interrupt(_):
    raise KeyboardInterrupt


def test_a_damaged_state_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_STATES", 0)
    with pytest.raises(KeyboardInterrupt, match="at row 4"):
        scan_until_interrupt(CacheFolder(tmp_path), Dataset.from_list(ROWS * 50), 2)
    entry = tmp_path / "partial-key"
    entry.write_bytes(entry.read_bytes()[:-9])
    assert scan_until_interrupt(CacheFolder(tmp_path), Dataset.from_list(ROWS * 50), 0).notes == ()


def test_an_interrupt_without_a_state_promises_nothing(tmp_path):
    """Without a state, or if it cannot be written, Ctrl-C does not promise to resume."""
    (tmp_path / "file").touch()
    resume_store = InterruptingStore(CacheFolder(tmp_path / "file" / "store"), "key")
    resume_store.left = 1
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        scan_text(Dataset.from_list(ROWS), Encoder(make_tokenizer()), vocab_size=V, resume_store=resume_store)
