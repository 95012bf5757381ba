"""The fast way to tokenize equals `tokenizer(...)["input_ids"]` for every kind of tokenizer."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    SentencePieceUnigramTokenizer,
    Tokenizer,
    models,
    pre_tokenizers,
)
from tokenizers.implementations import BertWordPieceTokenizer
from tokenizers.processors import BertProcessing, RobertaProcessing, TemplateProcessing
from transformers import (
    BertTokenizer,
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
    XLMRobertaTokenizerFast,
)

from pema_adapters.errors import VocabularyError
from pema_adapters.scanning.tokenization import choose_tokenizer, preserve_settings
from tests.words import Words

TRAINED_ON = ["the cat sat on the mat", "a naïve café, a 猫 and the cat", "Two  spaces\tand a tab"] * 3
TEXTS = ["the cat sat on a mat", "", " naïve  café", "猫 [MASK] <mask> x\ny", "unseen ζ words", "the " * 40]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QUIET = {"show_progress": False, "min_frequency": 1}


def word_piece():
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(TRAINED_ON, vocab_size=120, special_tokens=SPECIALS, **QUIET)
    trained.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return BertTokenizerFast(tokenizer_object=trained._tokenizer)


def byte_level(**options):
    trained = ByteLevelBPETokenizer(**options)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(TRAINED_ON, vocab_size=300, special_tokens=special, **QUIET)
    trained.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return RobertaTokenizerFast(tokenizer_object=trained._tokenizer, **options)


def unigram():
    trained = SentencePieceUnigramTokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        TRAINED_ON, vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return XLMRobertaTokenizerFast(tokenizer_object=trained._tokenizer)


def with_added_tokens():
    tokenizer = word_piece()
    tokenizer.add_tokens([AddedToken("café,", single_word=True), AddedToken("sat on", lstrip=True)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    return tokenizer


def left_and_busy():
    """Return a tokenizer with padding and truncation in its Rust backend, which a scan must ignore and keep."""
    tokenizer = byte_level(add_prefix_space=True)
    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(4)
    return tokenizer


def split_specials():
    tokenizer = word_piece()
    tokenizer.split_special_tokens = True
    return tokenizer


KINDS = {
    "WordPiece": word_piece,
    "byte-level BPE": lambda: byte_level(add_prefix_space=True),
    "Unigram": unigram,
    "added tokens": with_added_tokens,
    "left, with settings": left_and_busy,
    "split specials": split_specials,
}
TOKENIZERS = {name: make() for name, make in KINDS.items()}
BATCHES = {
    "texts": [[*TEXTS, None]],
    "pairs": [[(a, b) for a in TEXTS for b in TEXTS[:3]]],
    "words": [[text.split() for text in TEXTS]],
    "pairs of words": [[(text.split(), ["the", "cat"]) for text in TEXTS]],
    "halves of pairs": [["the cat", ("a", "mat"), None, "sat", ("the", "mat")]],
    "two columns": [TEXTS, TEXTS[::-1]],
    "nothing": [[None, None]],
}


def by_hand(tokenizer, value, max_length):
    """Tokenize one value in a batch of its own, as training would."""
    if value is None:
        return []
    texts = value if isinstance(value, tuple) else (value,)
    words = isinstance(texts[0], list)
    options = {"is_split_into_words": words, "truncation": max_length is not None, "max_length": max_length}
    return tokenizer(*([text] for text in texts), **options)["input_ids"][0]


def rows_of(encoded):
    return [ids.tolist() for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])]


@pytest.mark.parametrize("max_length", [None, 7])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_ids_equal_those_of_the_tokenizer_call(kind, batch, max_length):
    tokenizer, columns = TOKENIZERS[kind], BATCHES[batch]
    work = choose_tokenizer(tokenizer, max_length, columns)
    assert work.in_rust
    expected = [by_hand(tokenizer, value, max_length) for row in zip(*columns, strict=True) for value in row]
    assert rows_of(work(columns)) == expected
    assert rows_of(pickle.loads(pickle.dumps(work))(columns)) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncated_text_equals_the_tokenizer_call(data):
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(sorted(TOKENIZERS)))]
    text = st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(TEXTS)
    values = data.draw(st.lists(text | st.tuples(text, text) | st.none(), min_size=1, max_size=5))
    max_length = data.draw(st.none() | st.integers(5, 12))
    work = choose_tokenizer(tokenizer, max_length, [["the cat"]])
    assert work.in_rust
    assert rows_of(work([values])) == [by_hand(tokenizer, value, max_length) for value in values]


def test_the_settings_of_the_tokenizer_are_restored():
    tokenizer = left_and_busy()
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    before = backend.to_str(), backend.padding, backend.truncation
    with preserve_settings(tokenizer):
        choose_tokenizer(tokenizer, 9, [["the cat"]])
        assert backend.to_str() != before[0]
    assert (backend.to_str(), backend.padding, backend.truncation) == before
    assert backend.encode_special_tokens
    with preserve_settings(Words()):  # a tokenizer in Python has no Rust backend
        pass


def test_locate_returns_row_and_column():
    encoded = choose_tokenizer(word_piece(), None, [["the"]])([["the cat", None], [None, "mat"]])
    assert encoded.rows == 2
    places = [encoded.locate(position) for position in range(len(encoded.ids))]
    assert places == [(0, 0)] * int(encoded.lengths[0]) + [(1, 1)] * int(encoded.lengths[3])


# ---- tokenizers that are called


class Doubling(PreTrainedTokenizerFast):
    """A class outside of transformers whose call differs from the Rust backend."""

    def __call__(self, *args, **options):
        encoded = super().__call__(*args, **options)
        encoded["input_ids"] = [ids * 2 for ids in encoded["input_ids"]]
        return encoded


def test_classes_outside_transformers_are_called():
    tokenizer = Doubling(tokenizer_object=word_piece()._tokenizer)
    work = choose_tokenizer(tokenizer, None, [["the cat"]])
    assert not work.in_rust
    assert rows_of(work([["a cat"]])) == [tokenizer(["a cat"])["input_ids"][0]]


def test_a_tokenizer_that_disagrees_on_the_sample_is_called():
    """Even a class of transformers is called, if it differs from the Rust backend."""
    kind = type("Doubling", (Doubling,), {"__module__": "transformers.models.doubling"})
    work = choose_tokenizer(kind(tokenizer_object=word_piece()._tokenizer), None, [["the cat"]])
    assert not work.in_rust


class Letters:
    """A pre-tokenizer in Python, which Rust calls."""

    def pre_tokenize(self, text):
        text.split(lambda _, part: [part[at : at + 1] for at in range(len(str(part)))])


def test_rust_calls_parts_written_in_python():
    letters = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="?")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Letters())
    work = choose_tokenizer(tokenizer, None, [["ab"]])
    assert rows_of(work([["abc"]])) == [[0, 1, 2]]


@pytest.fixture
def slow(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "the", "cat", "##s"]))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.parametrize("batch", BATCHES)
def test_python_tokenizers_are_called(batch, slow):
    columns = [[value for value in values if value not in ([], ([], ["the", "cat"]))] for values in BATCHES[batch]]
    work = choose_tokenizer(slow, 6, columns)
    assert not work.in_rust
    expected = [by_hand(slow, value, 6) for row in zip(*columns, strict=True) for value in row]
    assert rows_of(work(columns)) == expected


def test_errors_of_python_tokenizers_are_translated(slow):
    with pytest.raises(VocabularyError, match="BertTokenizer refuses the text: list index out of range"):
        choose_tokenizer(slow, None, [[[]]])


def test_errors_of_rust_tokenizers_are_translated():
    with pytest.raises(VocabularyError, match=r"RobertaTokenizerFast refuses the text: .*add_prefix_space=True"):
        choose_tokenizer(byte_level(add_prefix_space=False), None, [[["two", "words"]]])
