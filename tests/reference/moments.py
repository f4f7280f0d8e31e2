"""Divergence, moment gap and advantage in plain loops: one token and one word at a time, float64, gradients by autograd.

It shares nothing with the package: every formula is written out again from docs/method.md, with the exponentials summed as
they are.
"""

import torch


def dot(left, right):
    return sum((a * b for a, b in zip(left, right, strict=True)), torch.zeros((), dtype=torch.float64))


def tanh(x):
    return (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1)


def softmax(hidden, weight, bias=None, scale=1.0, cap=None, temperature=1.0, words=None) -> list:
    """Probabilities of the words at one state."""
    exponentials = []
    for word in range(len(weight) if words is None else words):
        raw = dot(hidden, weight[word])
        if bias is not None:
            raw = raw + bias[word]
        raw = scale * raw
        logit = raw if cap is None else cap * tanh(raw / cap)
        exponentials.append(torch.exp(logit / temperature))
    total = sum(exponentials)
    return [x / total for x in exponentials]


def q_values(features, embedding, bound, words=None) -> list:
    rows = len(embedding) if words is None else words
    return [bound * tanh(dot(features, embedding[word]) / bound) for word in range(rows)]


def kl(p, q):
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def divergence(pi, mu, beta):
    if beta == 0:
        return kl(mu, pi)
    if beta == 1:
        return kl(pi, mu)
    middle = [(1 - beta) * p + beta * m for p, m in zip(pi, mu, strict=True)]
    return beta * kl(mu, middle) + (1 - beta) * kl(pi, middle)


def expectation(p, values):
    return sum(a * b for a, b in zip(p, values, strict=True))


def moments(
    student, teacher, features, embedding, *, bound, beta, temperature=1.0, words=None, actions=None, variation=None
) -> list[torch.Tensor]:
    """
    Seven lists of a value per token, as `MomentOutput` names them. `student` and `teacher` are (hidden, weight, bias, scale,
    cap). The student's gradient comes from the first two and the last, Q's from the third.
    """
    results = [[] for _ in range(7)]
    for n in range(len(student[0])):
        pi = softmax(student[0][n], *student[1:], temperature=temperature, words=words)
        mu = [m.detach() for m in softmax(teacher[0][n], *teacher[1:], temperature=temperature, words=words)]
        fixed_pi = [p.detach() for p in pi]
        q = [0 * p for p in fixed_pi]
        if features is not None:
            q = q_values(features[n], embedding.detach(), bound, words)
        fixed_q = [x.detach() for x in q]
        share = 0.0 if variation is None else float(variation[n])
        total_variation = sum(abs(p - m) for p, m in zip(pi, mu, strict=True)) / 2
        results[0].append((1 - share) * divergence(pi, mu, beta) + share * total_variation)
        results[1].append(expectation(mu, fixed_q) - expectation(pi, fixed_q))
        results[2].append(expectation(mu, q) - expectation(fixed_pi, q))
        results[3].append(-expectation(fixed_pi, [torch.log(p) for p in fixed_pi]))
        results[4].append(expectation(fixed_pi, [abs(x) for x in fixed_q]))
        results[5].append(expectation(fixed_pi, [float(abs(x) > 0.99 * bound) for x in fixed_q]))
        results[6].append(0.0 if actions is None else torch.log(pi[int(actions[n])]))
    return [torch.stack([torch.as_tensor(x) for x in column]) for column in results]


def advantages(baseline, features, embedding, actions, *, bound, temperature=1.0, words=None) -> torch.Tensor:
    """`[K, N]`; the baseline has no gradient."""
    rows = []
    for of_head in features:
        row = []
        for n, action in enumerate(actions.tolist()):
            b = [p.detach() for p in softmax(baseline[0][n], *baseline[1:], temperature=temperature, words=words)]
            q = q_values(of_head[n], embedding.detach(), bound, words)
            row.append(q[action] - expectation(b, q))
        rows.append(torch.stack(row))
    return torch.stack(rows)
