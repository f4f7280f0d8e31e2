"""The multiplier λ of the constraint that keeps the reward within the confidence set of the preference data."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar


def theory_radius(rows: int, constant: float = 1.0, delta: float = 0.05) -> float:
    """
    Radius ζ_N = c·log(N/δ)/N of the confidence set, in nats per pair (https://huggingface.co/papers/2505.18952).

    Args:
        rows (`int`):
            N ≥ 1, the number of rows with a known preference.
        constant (`float`):
            c > 0.
        delta (`float`):
            δ in (0, 1), the probability that the set misses the true reward.
    """
    return constant * math.log(rows / delta) / rows


@dataclass
class DualVariable:
    """
    λ ≥ 0 for the constraint NLL ≤ L* + ζ, moved by projected gradient ascent.

    Args:
        value (`float`):
            λ at the start, in [0, `maximum`].
        learning_rate (`float`):
            η_λ ≥ 0. Zero keeps λ fixed.
        maximum (`float`):
            λ's cap.
        target (`float`):
            L*, the best reachable NLL in excess of the labels' entropy, nats per pair.
        radius (`float`):
            ζ ≥ 0, nats per pair.
    """

    CAP_PATIENCE: ClassVar[int] = 50
    """Steps in a row at the cap before `step` says so."""

    _STATE: ClassVar[tuple[str, ...]] = ("value", "steps_at_cap", "warned", "history")
    _SETTINGS: ClassVar[tuple[str, ...]] = ("initial", "learning_rate", "maximum", "target", "radius")

    value: float
    learning_rate: float = 0.0
    maximum: float = 10.0
    target: float = 0.0
    radius: float = 0.0
    steps_at_cap: int = 0
    warned: bool = False
    history: list[float] = field(default_factory=list)
    initial: float = field(init=False)

    def __post_init__(self):
        self.initial = self.value

    def violation(self, nll: float) -> float:
        """NLL − L* − ζ in nats: above 0 the constraint is not met. `nll` is in excess of the labels' entropy."""
        return nll - self.target - self.radius

    def step(self, violation: float) -> bool:
        """λ ← clip(λ + η_λ·violation, 0, maximum). Returns `True` once: when a moving λ has first been at its cap for
        `CAP_PATIENCE` steps in a row."""
        self.value = min(max(self.value + self.learning_rate * violation, 0.0), self.maximum)
        self.history.append(self.value)
        at_cap = self.value >= self.maximum and self.learning_rate > 0
        self.steps_at_cap = self.steps_at_cap + 1 if at_cap else 0
        warn = self.steps_at_cap >= self.CAP_PATIENCE and not self.warned
        self.warned |= warn
        return warn

    def settings(self) -> dict[str, float]:
        """What was given, and does not move."""
        return {name: getattr(self, name) for name in self._SETTINGS}

    def state_dict(self) -> dict[str, Any]:
        """The training state, with the settings for the record. JSON keeps the floats exactly."""
        return {name: getattr(self, name) for name in self._STATE} | self.settings()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores λ (within the cap), its history and the count at the cap. Settings stay as they were given."""
        for name in self._STATE:
            setattr(self, name, list(state[name]) if name == "history" else state[name])
        self.value = min(self.value, self.maximum)
