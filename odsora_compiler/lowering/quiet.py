"""Importing and running coremltools without its log lines and progress bars."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_coremltools(watch: Callable[[Any], None] | None = None) -> Iterator[Any]:
    """Within the scope coremltools reports nothing; yields the module `coremltools`.

    `watch` is called with each node that the torch front end is about to convert. coremltools'
    settings are restored at the end.
    """
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
            from coremltools.converters.mil.frontend.torch import ops

            def nodes_in_silence(nodes: Iterable[Any], **_: Any) -> Iterator[Any]:
                for node in nodes:
                    if watch is not None:
                        watch(node)
                    yield node

            progress_bar = ops._tqdm
            ops._tqdm = nodes_in_silence
            try:
                yield coremltools
            finally:
                ops._tqdm = progress_bar
    finally:
        logger.setLevel(level)
