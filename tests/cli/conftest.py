"""What the tests of the commands share."""

import datasets
import pytest
import transformers


@pytest.fixture
def settings_as_they_were():
    """pema-scan silences the libraries for the rest of its process."""
    levels = datasets.utils.logging.get_verbosity(), transformers.logging.get_verbosity()
    yield
    datasets.enable_progress_bars()
    datasets.utils.logging.set_verbosity(levels[0])
    transformers.logging.set_verbosity(levels[1])
