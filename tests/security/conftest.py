"""A network that is not there, and an ear on every logger."""

from __future__ import annotations

import logging
import socket

import pytest


@pytest.fixture
def blocked(monkeypatch):
    """Refuses every way out of this process; returns what was tried."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("the network is blocked")

    def refuse_all_but_local(name):
        original = getattr(socket.socket, name)

        def method(self, *arguments):
            return original(self, *arguments) if self.family == socket.AF_UNIX else refuse(self, *arguments)

        return method

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse_all_but_local(name))
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return tried


@pytest.fixture
def heard():
    """Everything that any logger says at INFO or above while the test runs."""
    import axolotl.cli.train  # noqa: F401 (its import sets up logging, and takes other ears off)
    from axolotl.logging_config import configure_logging

    configure_logging()

    class Ear(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())
            if record.exc_info:
                lines.append(str(record.exc_info[1]))

    lines, ear = [], Ear(level=logging.INFO)
    loggers = [logging.getLogger(name) for name in (None, "axolotl", "transformers", "trl", "datasets", "tvac_plugin")]
    for logger in loggers:
        logger.addHandler(ear)
        logger.setLevel(min(logger.level or logging.INFO, logging.INFO))
    yield lines
    for logger in loggers:
        logger.removeHandler(ear)
