"""A driver for triton where there is no GPU: it believes that there is an H100, on which nothing can be launched."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

__all__ = ["pretended_card"]


class _Pretended:
    """What triton asks of a driver in order to compile."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def pretended_card() -> Iterator[None]:
    """Within it triton compiles for an H100."""
    from triton.runtime.driver import driver

    before = driver._active
    driver.set_active(cast(Any, _Pretended()))
    try:
        yield
    finally:
        driver._active = before
