"""Pairs held out, by which a learnt reward is judged."""

from collections import Counter

from datasets import Dataset


LEAST_HELD_OUT = 100
"""Strict held-out pairs below which their accuracy says too little to end the warm-up."""
MOST_HELD_OUT = 500


def hold_out(dataset: Dataset, order: list[int], wanted: int) -> tuple[list[int], list[int]]:
    """
    Which rows are held out, and the rest, both in their order. Prompts are held out with all their pairs, since those of
    one prompt tell of each other (they may share a response): one prompt after another, each that leaves the number of
    rows at `wanted` or below.

    Args:
        dataset (`Dataset`):
            With the column `prompt_ids`.
        order (`list[int]`):
            All rows, in the order in which their prompts are looked at.
        wanted (`int`):
            Rows to hold out.
    """
    if not wanted:
        return [], order
    batches = dataset.select_columns(["prompt_ids"]).with_format(None).iter(batch_size=1000)
    prompts = [hash(tuple(ids)) for batch in batches for ids in batch["prompt_ids"]]
    pairs, held, count = Counter(prompts), set(), 0
    for prompt in dict.fromkeys(prompts[row] for row in order):
        if count + pairs[prompt] <= wanted:
            held.add(prompt)
            count += pairs[prompt]
    return [row for row in order if prompts[row] in held], [row for row in order if prompts[row] not in held]
