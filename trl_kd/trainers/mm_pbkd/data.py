"""What `MMPbKDTrainer` reads beside prompts: the teacher's completions as off-policy states, and preference pairs."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from trl_kd.responses.finish_reasons import has_end
from trl_kd.responses.reasoning import stripped
from trl_kd.responses.rendering import row_options
from trl_kd.responses.special_tokens import turn_end
from trl_kd.responses.tokens import OWN, encode
from trl_kd.trainers.common.held_out import MOST_HELD_OUT, hold_out
from trl_kd.trainers.common.preference_pairs import pair_settings
from trl_kd.trainers.common.prompts import check_row
from trl_kd.trainers.common.response_rows import KIND_COLUMNS, ResponseReader, tokenize_rows
from trl_kd.trainers.common.tokenizer import check_tokenizer
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig


logger = get_logger(__name__)


# ---- States ------------------------------------------------------------------------------------------------------------


def look_at_completions(dataset: Any, processing_class: Any, args: MMPbKDConfig, name: str) -> Any:
    """
    What the chat template makes of the teacher's completions: see
    [`~trl_kd.trainers.common.response_rows.ResponseReader.look`].

    Returns:
        The dataset, without the rows that cannot be rendered.
    """
    if args.lmbda == 1 or "completion" not in next(iter(dataset)):
        return dataset
    reader = ResponseReader(processing_class, args, name, ("completion",), args.chat_template_kwargs)  # type: ignore
    return reader.look(dataset)


def check_prompt_count(dataset: Any, args: MMPbKDConfig, processes: int) -> None:
    """Raises a `ValueError` for fewer prompts than one step takes: TRL leaves out what does not fill a step, and would end
    without having learnt anything."""
    batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    if isinstance(dataset, Dataset) and len(dataset) < batch:
        raise ValueError(
            f"The train dataset has {len(dataset)} prompts, and one step takes {batch} "
            f"(`per_device_train_batch_size` = {args.per_device_train_batch_size}, {processes} processes, "
            f"`gradient_accumulation_steps` = {args.gradient_accumulation_steps}): give more prompts, or lower one of them."
        )


def is_on_policy(index: int, lmbda: float) -> bool:
    """Whether the row with this running number is on-policy: a share of `lmbda`, spread evenly."""
    return math.floor(round((index + 1) * lmbda, 9)) > math.floor(round(index * lmbda, 9))


def tokenize_completion(
    row: dict[str, Any], processing_class: Any, ends: list[int], reasoning: str | None = None, **template: Any
) -> tuple[list[int], list[int], list[bool]]:
    """
    The teacher's completion as a student would have sampled it: with the end token, and nothing after it. One that was cut
    off has no end token.

    Args:
        row (`dict[str, Any]`):
            With `prompt` and `completion`, both text or both messages, and perhaps `completion_finish_reason`, `tools` and
            `chat_template_kwargs`.
        processing_class:
            The tokenizer or processor.
        ends (`list[int]`):
            Tokens that end a completion.
        reasoning (`str`, *optional*):
            See [`MMPbKDConfig`].
        **template:
            Keyword arguments for the chat template.

    Returns:
        The prompt's tokens, the completion's, and of each of the latter whether it is the teacher's own. What a user or a
        tool says within a completion is not. Where prompt and completion together are tokenized otherwise than one by one,
        the completion begins where they first differ, as with TRL's pairs.

    Raises:
        `ValueError`: the row is none, or the chat template cannot render it.
    """
    check_row(row, "A row of a stream", mixed=True)
    completion = stripped(row["completion"]) if reasoning == "strip" else row["completion"]
    complete = has_end(row.get("completion_finish_reason"))
    encoded = encode(
        processing_class,
        row["prompt"],
        completion,
        template | row_options(row),
        complete=complete,
        reasoning=reasoning,
    )
    ids, own = encoded.ids, encoded.own
    last = len(own) - 1 - own[::-1].index(True) if True in own else -1  # the last turn that is the model's ends here
    first = last
    while first > 0 and own[first - 1]:
        first -= 1
    said = ids[first : last + 1]
    end = next((place for place, token in enumerate(said, first) if token in ends), None)
    if end is None:
        end = last
        if complete and turn_end(processing_class) is None:
            logger.warning_once(
                "A completion of the teacher's ends without an end token, since the chat template writes none: the student "
                "will not learn from it where to stop."
            )
    elif any(token in ends for token in ids[end + 1 : last + 1]):
        logger.warning_once(
            "A completion of the teacher's has an end token within its text. What follows it in that turn is left out."
        )
    if not ids:
        raise ValueError("A row of a stream: `completion` was cut off before it said anything. Drop the row.")
    return encoded.prompt_ids, ids[: end + 1], own[: end + 1]


# ---- Pairs -------------------------------------------------------------------------------------------------------------


def tokenize_pairs(dataset: Dataset, processing_class: Any, args: MMPbKDConfig) -> Dataset:
    """What `known_pairs` returned, as the columns `prompt_ids`, `chosen_ids`, `rejected_ids` and `preference`, and
    [`~trl_kd.trainers.common.response_rows.KIND_COLUMNS`] where a row needs them.

    Raises:
        `ValueError`: the tokenizer cannot render them, or `pair_max_length` leaves no response token.
    """
    check_tokenizer(getattr(processing_class, "tokenizer", processing_class), dataset, "preference")
    settings = pair_settings(args.pair_max_length, args.reasoning)
    dataset = tokenize_rows(dataset, processing_class, settings, "preference", limit="pair_max_length")
    kinds = [column for column in KIND_COLUMNS if column in dataset.column_names]
    return dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids", "preference", *kinds])


class PairBatches:
    """
    Training pairs in an endless order that depends on the seed alone, and pairs held out, with no prompt in common.

    Args:
        dataset (`Dataset`):
            From `tokenize_pairs`.
        args (`MMPbKDConfig`):
            Settings.
        accelerator (`Accelerator`):
            Says which share of each batch is this process's.
        pad_token_id (`int`):
            Fills up rows.

    Attributes:
        seen (`int`):
            Pairs drawn so far, over all processes. It is all the state there is.
        size (`int`):
            Pairs of one batch, over all processes.
        strict (`int`):
            Held-out pairs that are no ties.
    """

    def __init__(self, dataset: Dataset, args: MMPbKDConfig, accelerator: Accelerator, pad_token_id: int):
        self._dataset, self._pad, self._seed = dataset, pad_token_id, args.seed
        self._rank, self._world = accelerator.process_index, accelerator.num_processes
        world = self._world
        self._micro_batch, self._max_length = args.per_device_train_batch_size, args.pair_max_length
        wanted = min(MOST_HELD_OUT, int(args.pair_held_out * len(dataset))) // world * world
        self._held_out, self._train = hold_out(dataset, self._permutation(len(dataset), 0).tolist(), wanted)
        del self._held_out[len(self._held_out) // world * world :]  # and not learnt from: their prompts are held out
        self._orders: dict[int, torch.Tensor] = {}
        if len(self._train) < world:
            raise ValueError(
                f"`preference_dataset` has {len(dataset)} pairs to learn from, for {world} processes: give more, or lower "
                f"`pair_held_out` = {args.pair_held_out}."
            )
        self.strict = sum(p != 0.5 for p in dataset[self._held_out]["preference"]) if self._held_out else 0
        wanted = args.pair_batch_size or self._micro_batch * args.gradient_accumulation_steps * world
        if wanted % world:
            raise ValueError(
                f"`pair_batch_size` is {wanted}, which {world} processes do not divide: give a multiple of {world}."
            )
        self.size = min(wanted, len(self._train) // world * world)
        self.seen = 0

    def __len__(self) -> int:
        return len(self._train)

    def _permutation(self, count: int, epoch: int) -> torch.Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self._seed + epoch))

    def draw(self) -> list[dict[str, torch.Tensor]]:
        """This process's micro-batches of the next batch."""
        count = len(self._train)
        places = range(self.seen, self.seen + self.size)
        epochs = {i // count for i in (places[0], places[-1])}
        self._orders = {
            epoch: self._orders[epoch] if epoch in self._orders else self._permutation(count, 1 + epoch)
            for epoch in epochs
        }
        self.seen += self.size
        return self._batches([self._train[int(self._orders[i // count][i % count])] for i in places])

    def held_out(self) -> list[dict[str, torch.Tensor]]:
        """This process's micro-batches of the pairs held out."""
        return self._batches(self._held_out)

    def _batches(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        # Shares are equally long, so that all processes take part in every collective
        count = len(rows) // self._world
        mine = rows[self._rank * count : (self._rank + 1) * count]
        step = self._micro_batch
        return [self._collate(self._dataset[mine[i : i + step]]) for i in range(0, len(mine), step)]

    def _collate(self, rows: dict[str, list]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `completion_mask` `[2b, T]`, chosen above rejected, and `preference` `[b]`."""
        prompts = rows["prompt_ids"] * 2
        responses = rows["chosen_ids"] + rows["rejected_ids"]
        ids = [torch.tensor((p + r)[: self._max_length]) for p, r in zip(prompts, responses, strict=True)]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self._pad)
        position_T = torch.arange(input_ids.size(1))
        lengths_2b1 = torch.tensor([len(row) for row in ids]).unsqueeze(1)
        prompts_2b1 = torch.tensor([len(p) for p in prompts]).unsqueeze(1)
        attention_mask = (position_T < lengths_2b1).long()
        completion_mask = attention_mask * (position_T >= prompts_2b1)
        kinds = [of_row for column in KIND_COLUMNS for of_row in rows.get(column, [None] * (len(prompts) // 2))]
        for row, of_row in enumerate(kinds):
            if of_row is not None:  # Q and its baseline read the model's own words alone
                start, stop = len(prompts[row]), len(ids[row])
                own = torch.tensor([kind == OWN for kind in of_row[: stop - start]])
                completion_mask[row, start:stop] *= own
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            "preference": torch.tensor(rows["preference"], dtype=torch.float32),
        }
