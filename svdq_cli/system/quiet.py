"""Loading of models without the bars and notes of the libraries that load them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Turns the loading bars of diffusers and transformers off, and back on if they were on; no deprecation notes."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    was_on = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in was_on:
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log in was_on:
            log.enable_progress_bar()
