"""How fast a run goes on, in words."""

from __future__ import annotations

from dataclasses import dataclass


def duration(seconds: float) -> str:
    """Seconds as "12 s", "34 min" or "5.6 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Pace:
    """How fast a run goes on.

    Attributes:
        seconds: of an update.
        images: of an update.
        left: updates.
    """

    seconds: float
    images: int
    left: int

    @property
    def images_per_second(self) -> str:
        """Images that are trained on in a second."""
        rate = self.images / max(self.seconds, 1e-9)
        return f"{rate:.1f} images/s" if rate < 100 else f"{rate:.0f} images/s"

    @property
    def time_left(self) -> str:
        """Until the run ends."""
        return duration(self.left * self.seconds)
