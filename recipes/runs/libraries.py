"""What libraries print."""

import logging
import sys


def silence_libraries() -> None:
    """Silence Transformers, datasets and adapters but for errors; progress bars show on a terminal only."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
