"""How the compute thread's time was divided while both inference and training wanted it."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.policy.batching.scheduling import is_training_due


@dataclass(frozen=True)
class TimeShares:
    """The seconds that each side has had, counted only while both were waiting.

    So a side that was alone for a while owes the other one nothing for that.
    """

    inference_seconds: float = 0.0
    training_seconds: float = 0.0

    def is_training_due(self, share: float) -> bool:
        """Whether training has had less than this share of the time."""
        return is_training_due(
            inference_seconds=self.inference_seconds, training_seconds=self.training_seconds, share=share
        )

    def after_inference(self, seconds: float) -> TimeShares:
        """The shares after inference had this much more time."""
        return TimeShares(self.inference_seconds + seconds, self.training_seconds)

    def after_training(self, seconds: float) -> TimeShares:
        """The shares after training had this much more time."""
        return TimeShares(self.inference_seconds, self.training_seconds + seconds)
