"""Keep long texts of mmengine's log off the terminal; the log file has all of them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from mmengine.logging import MMLogger
from mmengine.runner import Runner

_ANYWHERE = ('\nSystem environment:', ' is skipped since its requires_grad=False')
"""What else such messages have in them."""

_BEGINNINGS = (
    'Config:\n',
    'Hooks will be executed in the following order',
    'Distributed training is not used, all SyncBatchNorm',
    'paramwise_options -- ',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias of',
)
"""The beginnings of messages of no use at the start of a run: hundreds of lines, or the same in every run."""


class _Short(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage().lstrip('\n')
        return not message.startswith(_BEGINNINGS) and not any(text in message for text in _ANYWHERE)


@contextmanager
def short_terminal() -> Iterator[None]:
    """Let the runners that are built within keep long texts off the terminal: the environment, the config, the order of
    the hooks, and a line for every parameter with options of its own. Their log files have everything."""
    build_logger = Runner.build_logger

    @wraps(build_logger)
    def build(self: Runner, *args: Any, **kwargs: Any) -> MMLogger:
        logger = build_logger(self, *args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.addFilter(_Short())
        return logger

    Runner.build_logger = build
    try:
        yield
    finally:
        Runner.build_logger = build_logger
