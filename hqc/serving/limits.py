"""What one request may ask for, and how many may wait."""

from dataclasses import dataclass, fields

from hqc.serving.errors import ServingError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """Upper bounds of the server.

    Args:
        max_images: images a request (`n`).
        max_steps: denoising steps a request; a scheduler with fewer training steps lowers it.
        max_queue: requests that may wait while one is sampled; the next one gets status 429.
        max_body_bytes: size of a request's body; a larger one gets status 413.

    Raises:
        ServingError: a bound below 1 (`max_queue` may be 0).
    """

    max_images: int = 16
    max_steps: int = 250
    max_queue: int = 8
    max_body_bytes: int = 64 * 1024

    def __post_init__(self) -> None:
        least = {field.name: 0 if field.name == "max_queue" else 1 for field in fields(self)}
        wrong = [f"{name}={getattr(self, name)}" for name, low in least.items() if getattr(self, name) < low]
        if wrong:
            raise ServingError("Limits", f"{', '.join(wrong)} below the least that makes sense", "Raise it.")
