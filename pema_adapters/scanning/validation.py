"""Default columns, limits and argument checks shared by scans and vocabularies."""

import operator

from pema_adapters.errors import VocabularyError

DEFAULT_COLUMNS = ("input_ids", "decoder_input_ids")
MAX_VOCAB_SIZE = 2**31  # ids are stored as int32


def validate_vocab_size(vocab_size: int) -> int:
    """Return V as an int in [1, 2**31]; raise a VocabularyError for anything else."""
    try:
        size = operator.index(vocab_size)
    except TypeError:
        size = 0
    if not 0 < size <= MAX_VOCAB_SIZE:
        raise VocabularyError(
            f"vocab_size is {vocab_size!r}, expected an integer from 1 to 2**31: the rows of the embedding, "
            "model.get_input_embeddings().num_embeddings"
        )
    return size


def validate_num_proc(num_proc: int) -> int:
    """Return the number of workers as an int of at least 1; raise a VocabularyError for anything else."""
    try:
        count = operator.index(num_proc)
    except TypeError:
        count = 0
    if count < 1:
        raise VocabularyError(f"num_proc is {num_proc!r}, expected an integer from 1: the processes to scan with")
    return count
