"""Some tests press ctrl-C. Processes that a shell starts in the background ignore it, and so would all that the tests start."""

import signal


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
