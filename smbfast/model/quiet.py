"""What transformers and PEFT say while they load a model: said as an error, or not at all."""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from transformers.utils import logging

logging.disable_progress_bar()  # progress bars clutter the log of a job


@contextmanager
def own_words() -> Iterator[None]:
    """Leave out what transformers logs and warns of in the block.

    What matters of it is an error here, see `require_whole`. The rest is about generating text, or
    about calls inside these libraries that one of them will rename.
    """
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by a name that is to go; nothing that a user could change
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        logging.set_verbosity(before)


def require_whole(path: str, missing: Collection[str]) -> None:
    """Refuse a model of which a file does not hold all weights: transformers would draw them.

    Raises:
        ValueError: some names of weights are `missing`.
    """
    if missing:
        raise ValueError(
            f"`model.path` {path} must hold all weights of its model; {len(missing)} are not "
            f"there, such as {min(missing)}: download it once more"
        )
