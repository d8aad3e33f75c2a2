"""Messages of a watch go to a function that does not block, instead of the installed log handlers."""

from __future__ import annotations

import logging

from phasewatch.live.outputs import redirect_log

LOG = logging.getLogger("phasewatch")


def test_messages_go_to_the_function_and_the_handlers_come_back() -> None:
    lines: list[str] = []
    handlers, level = LOG.handlers[:], LOG.level

    with redirect_log(lines.append):
        logging.getLogger("phasewatch.live.watcher").info("%s: paused", "web01")
        logging.getLogger("phasewatch.live.watcher").debug("not shown")
        logging.getLogger("other").warning("not ours")

    assert lines == ["web01: paused"]
    assert (LOG.handlers, LOG.level) == (handlers, level)


def test_the_level_of_the_replaced_handler_stays_in_force() -> None:
    lines: list[str] = []
    quiet = logging.NullHandler(logging.WARNING)
    LOG.addHandler(quiet)
    try:
        with redirect_log(lines.append):
            logging.getLogger("phasewatch.live").info("not shown")
            logging.getLogger("phasewatch.live").warning("shown")
    finally:
        LOG.removeHandler(quiet)

    assert lines == ["shown"]
