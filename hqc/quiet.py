"""Libraries without what they print by themselves, while hqc says what matters."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries", "quiet_output"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Of diffusers and transformers errors alone are logged inside; afterwards all is as before."""
    import diffusers.utils.logging as diffusers_log
    import transformers.utils.logging as transformers_log

    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    for log, _, _ in before:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


@contextmanager
def quiet_output() -> Iterator[None]:
    """What native code prints on standard output inside is dropped: it would stand among a command's own lines."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # C's own buffer, which would be written later
        os.dup2(kept, 1)
        os.close(kept)
