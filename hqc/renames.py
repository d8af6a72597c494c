"""Renames that replace nothing, or exchange two paths at once, where the system has them: Linux's renameat2."""

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["exchange", "rename_new"]

_AT_FDCWD = -100
_NOREPLACE, _EXCHANGE = 1, 2
# What a kernel, a C library or a file system without them answers.
_MISSING = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def rename_new(source: Path, target: Path) -> bool:
    """Renames `source` where nothing is at `target`; False, and nothing done, where something is.

    Without renameat2 an empty folder that appears within microseconds is replaced; nothing else can be.

    Raises:
        OSError: if it cannot be renamed.
    """
    try:
        if _renameat2(source, target, _NOREPLACE):
            return True
    except FileExistsError:
        return False
    return _rename_new_elsewhere(source, target)


def _rename_new_elsewhere(source: Path, target: Path) -> bool:
    if os.path.lexists(target):
        return False
    try:
        if source.is_dir():
            os.rename(source, target)
        else:
            os.link(source, target)
            source.unlink()
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        if source.is_dir() or error.errno not in (*_MISSING, errno.EPERM):
            raise
        os.rename(source, target)  # a file system without hard links
    return True


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two paths at once: at no moment is either missing. False, and nothing done, where that is not possible.

    Raises:
        OSError: if they cannot be renamed.
    """
    return _renameat2(first, second, _EXCHANGE)


def _renameat2(source: Path, target: Path, flag: int) -> bool:
    call = _system_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _MISSING:
        return False
    raise OSError(number, os.strerror(number), str(target))


@cache
def _system_call() -> Any | None:
    """renameat2 of the C library, None where there is none."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    return call
