"""Batched generation, sampled or greedy."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    sample: bool = True,
    seed: int = 0,
    temperature: float = 1.0,
    batch_size: int = 512,
) -> list[str]:
    """Answers each prompt once.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model. It is put in evaluation mode meanwhile, and back as it was.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer, with a padding token. Padding is on the left whatever its setting.
        prompts (`Sequence[str]`):
            Plain-text prompts; give one several times for several answers.
        max_new_tokens (`int`):
            Longest response, in tokens, its end-of-sequence token included.
        sample (`bool`, *optional*, defaults to `True`):
            Sample from the model's own distribution (no top-k or top-p); otherwise take the most likely token each
            time.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling. The global random state is left as it was, so that evaluating during a training run
            does not change that run.
        temperature (`float`, *optional*, defaults to `1.0`):
            Above 0. Temperature of the sampling.
        batch_size (`int`, *optional*, defaults to `512`):
            Prompts a batch. It is part of the random stream: another value samples other answers.

    Returns:
        `list[str]`: one response a prompt, without special tokens.
    """
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    strategy = sampled if sample else {"do_sample": False}
    responses: list[str] = []
    was_training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            batch = tokenizer(
                list(prompts[start : start + batch_size]), padding=True, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **strategy,
            )
            completions = output[:, batch["input_ids"].shape[1] :]
            responses += tokenizer.batch_decode(completions, skip_special_tokens=True)
    model.train(was_training)
    return responses
