"""The adversary over one row, in closed form: how much better the teacher's answer may look than the student's."""

import math


def _divergence(p: float, step: float) -> float:
    """KL(Bern(p) ‖ Bern(p + step)) in nats, for 0 < p < 1 and 0 ≤ step < 1 − p."""
    return -p * math.log1p(step / p) - (1 - p) * math.log1p(-step / (1 - p))


def optimistic_preference(preference: float, radius: float) -> float:
    """
    The largest probability of a preference inside its confidence set,

        p̂ = max { s : KL(Bern(p) ‖ Bern(s)) ≤ ζ }

    KL(Bern(p) ‖ Bern(s)) is by how much the NLL of the label p under the reward's probability s exceeds its least value,
    H(p). So the set is that of all rewards which explain the label within ζ of the best one (confidence set of
    https://huggingface.co/papers/2505.18952, taken for each pair; docs/method.md, "The adversary over one row").

    Args:
        preference (`float`):
            p in [0, 1], the observed P(teacher's answer ≻ student's).
        radius (`float`):
            ζ in [0, ∞], nats.

    Returns:
        `float` in [p, 1], to within 1e-9.
    """
    if radius == 0 or preference == 1:
        return preference
    if math.isinf(radius):
        return 1.0
    if preference == 0:
        return -math.expm1(-radius)
    if preference == 0.5:
        return (1 + math.sqrt(-math.expm1(-2 * radius))) / 2
    low, high = 0.0, 1 - preference
    while high - low > 1e-10:
        middle = (low + high) / 2
        if _divergence(preference, middle) <= radius:
            low = middle
        else:
            high = middle
    return preference + low


def imitation_advantage(preference: float | None, radius: float) -> float:
    """
    The adversary's advantage a(p, ζ) = max(0, 2p̂ − 1) of the teacher's answer over the student's: the weight with which it
    is imitated. p̂ is [`optimistic_preference`]; 2σ(Δ) − 1 = tanh(Δ/2) is the bounded reward of the margin Δ.

    Args:
        preference (`float`, *optional*):
            p in [0, 1], the observed P(teacher's answer ≻ student's). `None` where nothing is known: the set is no limit.
        radius (`float`):
            ζ in [0, ∞], nats. 0: (2p − 1)₊. ∞: 1, whatever the label.

    Returns:
        `float` in [0, 1], rising in p and in ζ.
    """
    if preference is None:
        return 1.0
    return max(0.0, 2 * optimistic_preference(preference, radius) - 1)
