"""Who is right on running sums: the answer with every total on the way, as the demo's task has it."""


def correct(completions, answer, **columns):
    """1 for an answer that is right, 0 for any other."""
    return [float(completion.strip() == truth) for completion, truth in zip(completions, answer, strict=True)]
