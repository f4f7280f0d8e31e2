"""The offline objective in plain loops: one row at a time, one token at a time, float64, no padding, no batch.

It shares nothing with the package: sequences are run alone through a float64 copy of the model, and every formula is written
out again from docs/method.md.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Row:
    """Token ids of a pair, P(chosen ≻ rejected) or `None`, and which response the teacher wrote."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    preference: float | None = 1.0
    teacher: str | None = "chosen"


def token_logits(model, prompt: list[int], response: list[int]) -> list[torch.Tensor]:
    """The model's logits before each token of the response."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0].double()
    return [logits[len(prompt) - 1 + t] for t in range(len(response))]


def log_probability(logits: torch.Tensor, token: int) -> torch.Tensor:
    top = max(float(x) for x in logits)
    total = sum(math.e ** (x - top) for x in logits)
    return logits[token] - top - torch.log(total)


def sequence_logps(model, prompt, response) -> list[torch.Tensor]:
    return [
        log_probability(logits, token)
        for logits, token in zip(token_logits(model, prompt, response), response, strict=True)
    ]


def weighted_sum(logps: list[torch.Tensor], shared: int, ld_alpha: float | None):
    total = torch.zeros((), dtype=torch.float64)
    for t, logp in enumerate(logps):
        total = total + (logp if ld_alpha is None or t < shared else ld_alpha * logp)
    return total


def margin(model, reference, row: Row, beta: float, ld_alpha: float | None = None) -> torch.Tensor:
    shared = min(len(row.chosen), len(row.rejected))
    total = 0.0
    for sign, response in ((1, row.chosen), (-1, row.rejected)):
        ours = weighted_sum(sequence_logps(model, row.prompt, response), shared, ld_alpha)
        with torch.no_grad():
            theirs = weighted_sum(sequence_logps(reference, row.prompt, response), shared, ld_alpha)
        total = total + sign * (ours - theirs)
    return beta * total


def bradley_terry(z: torch.Tensor, p: float) -> torch.Tensor:
    """−p·log σ(z) − (1−p)·log σ(−z), by the logistic function itself."""
    sigma = 1 / (1 + torch.exp(-z))
    return -p * torch.log(sigma) - (1 - p) * torch.log(1 - sigma)


def divergence(
    model, row: Row, teacher, tokens: int | None = None, q: float = 0.0, ends: tuple[int, ...] = ()
) -> torch.Tensor:
    """Σ_t (1 − q)·KL(μ(·|s_t) ‖ π(·|s_t)) + q·TV of them on the teacher's response, over the first `tokens` of both. Where
    an end token comes it is KL."""
    response = row.chosen if row.teacher == "chosen" else row.rejected
    total = torch.zeros((), dtype=torch.float64)
    ours = token_logits(model, row.prompt, response)
    with torch.no_grad():
        theirs = token_logits(teacher, row.prompt, response)
    for said, pi, mu in zip(response, ours, theirs, strict=True):
        pi, mu = pi[:tokens], mu[:tokens]
        share = 0.0 if said in ends else q
        for token in range(len(pi)):
            log_pi, log_mu = log_probability(pi, token), log_probability(mu, token)
            total = total + (1 - share) * torch.exp(log_mu) * (log_mu - log_pi)
            total = total + share * abs(torch.exp(log_mu) - torch.exp(log_pi)) / 2
    return total


def pbkd_loss(
    model,
    reference,
    rows: list[Row],
    *,
    ends: tuple[int, ...],
    beta: float = 0.1,
    weight: float = 1.0,
    dual: float = 1.0,
    radius: float = 0.02,
    q: float | None = None,
    teacher=None,
    tokens: int | None = None,
    ld_alpha: float | None = None,
    preference_loss=bradley_terry,
) -> torch.Tensor:
    """w·L_imit over the teacher's texts + λ·mean over known rows of the preference loss."""
    known = [row for row in rows if row.preference is not None]
    q = (0.5 if teacher is None else 0.0) if q is None else q
    options = {"radius": radius, "q": q, "ends": ends, "weight": weight, "teacher": teacher, "tokens": tokens}
    loss = texts_loss(model, texts_of(rows), **options)
    for row in known:
        z = margin(model, reference, row, beta, ld_alpha)
        loss = loss + dual * preference_loss(z, row.preference) / len(known)
    return loss


# ---- The teacher's texts -----------------------------------------------------------------------------------------------


@dataclass
class Text:
    """A text of the teacher's for a prompt, and the known P(it ≻ another) of its pairs."""

    prompt: list[int]
    response: list[int]
    preferences: list[float]


def texts_of(rows: list[Row]) -> list[Text]:
    """Each text of the teacher's once for each prompt, with what is known of all of its pairs."""
    found: dict[tuple, Text] = {}
    for row in rows:
        if row.teacher is None:
            continue
        response = row.chosen if row.teacher == "chosen" else row.rejected
        text = found.setdefault((*row.prompt, -1, *response), Text(row.prompt, response, []))
        if row.preference is not None and row.chosen != row.rejected:
            text.preferences.append(row.preference if row.teacher == "chosen" else 1 - row.preference)
    return list(found.values())


def advantage(text: Text, radius: float, steps: int = 100_000) -> float:
    """a = (2·p̂ − 1)₊ with p̂ = max{s : KL(p ‖ s) ≤ ζ}, by trying every s of a fine grid."""
    if not text.preferences or radius == math.inf:
        return 1.0
    p = sum(text.preferences) / len(text.preferences)
    largest = p
    for step in range(1, steps):
        s = p + (1 - p) * step / steps
        divergence = sum(x * math.log(x / y) for x, y in ((p, s), (1 - p, 1 - s)) if x > 0)
        if divergence <= radius:
            largest = s
    return max(0.0, 2 * largest - 1)


def texts_loss(
    model,
    texts: list[Text],
    *,
    radius: float,
    q: float,
    ends: tuple[int, ...],
    weight: float = 1.0,
    teacher=None,
    tokens: int | None = None,
) -> torch.Tensor:
    """w·Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā·Σ_{a_i>0} |y_i|), all texts being one batch and the whole dataset."""
    advantages = [advantage(text, radius) for text in texts]
    used = [len(text.response) for text, a in zip(texts, advantages, strict=True) if a > 0]
    if not used:
        return torch.zeros((), dtype=torch.float64)
    mean = sum(a * len(text.response) for text, a in zip(texts, advantages, strict=True)) / sum(used)
    total = torch.zeros((), dtype=torch.float64)
    for text, a in zip(texts, advantages, strict=True):
        if teacher is not None:
            row = Row(text.prompt, text.response, text.response)
            total = total + a * divergence(model, row, teacher, tokens, q, ends)
            continue
        for token, logp in zip(text.response, sequence_logps(model, text.prompt, text.response), strict=True):
            pi = torch.exp(logp)
            total = total + a * (-logp if q == 0 or token in ends else (1 - pi**q) / q)
    return weight * total / (mean * sum(used))
