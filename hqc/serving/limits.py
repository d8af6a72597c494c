"""What one request may ask for, how many may wait, and how long anything may take."""

from dataclasses import dataclass, fields

from hqc.serving.errors import ServingError

__all__ = ["Limits"]

_FROM_ZERO = ("max_queue", "shutdown_s")


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the server.

    Args:
        max_images: images a request (`n`).
        max_steps: denoising steps a request; a scheduler with fewer training steps lowers it.
        max_batch: images under way at once.
        max_queue: requests that may wait for them; the next one gets status 429.
        max_body_bytes: size of a request's body; a larger one gets status 413.
        max_connections: open at once; the next one is closed.
        head_s: seconds until a connection's first, or next, request has arrived but for its body.
        body_s: seconds until the body has; one that nobody reads too, from when its request was answered.
        request_s: seconds until the images are there, with the wait in the line.
        shutdown_s: seconds that what runs may go on after a signal.

    Raises:
        ServingError: a bound below 1 (`max_queue` and `shutdown_s` may be 0).
    """

    max_images: int = 10  # as many as OpenAI's own API draws
    max_steps: int = 250
    max_batch: int = 8
    max_queue: int = 64
    max_body_bytes: int = 192 * 1024
    max_connections: int = 256
    head_s: float = 10.0
    body_s: float = 10.0
    request_s: float = 600.0
    shutdown_s: float = 5.0

    def __post_init__(self) -> None:
        wrong = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if not getattr(self, field.name) >= (0 if field.name in _FROM_ZERO else 1e-3)
        ]
        if wrong:
            raise ServingError("Limits", f"{', '.join(wrong)} below the least that makes sense", "Raise it.")
