"""A reward that rises while the student loses: the reward model is climbed where it is wrong."""

from itertools import pairwise

from accelerate.logging import get_logger


logger = get_logger(__name__)


class HackingWatch:
    """
    Looks whether the reward rises while the student loses more and more.

    Attributes:
        history (`dict[str, list[tuple[float, float]]]`):
            Mean reward and win rate at each look, for each evaluation dataset.
        warned (`bool`):
            Whether it has been said: it is once.
    """

    PATIENCE = 3

    def __init__(self):
        self.history: dict[str, list[tuple[float, float]]] = {}
        self.warned = False

    def look(self, name: str, reward: float, win_rate: float) -> None:
        """After an evaluation on the dataset that `name` tells: mean reward, and the student's win rate against its
        teacher."""
        looks = self.history.setdefault(name, [])
        looks.append((reward, win_rate))
        last = looks[-self.PATIENCE - 1 :]
        steps = list(pairwise(last))
        hacked = len(steps) == self.PATIENCE and all(b[0] > a[0] and b[1] < a[1] for a, b in steps)
        if hacked and not self.warned:
            self.warned = True
            logger.warning(
                f"Over the last {self.PATIENCE} evaluations the reward rose from {last[0][0]:.3g} to {last[-1][0]:.3g} "
                f"while the student's win rate fell from {last[0][1]:.1%} to {last[-1][1]:.1%}: it exploits the reward "
                "model. Raise `beta` or `rm_steps`, lower `confidence_radius` or `learning_rate`, or use an earlier "
                "checkpoint."
            )
