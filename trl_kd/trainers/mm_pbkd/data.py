"""What `MMPbKDTrainer` reads beside prompts: the teacher's completions as off-policy states, and preference pairs."""

import math
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Sampler

from trl_kd.pairs.checks import check_template_columns
from trl_kd.preferences.tokens import is_conversational
from trl_kd.responses.finish_reasons import check_finish_reason, has_end
from trl_kd.responses.reasoning import stripped
from trl_kd.responses.rendering import row_options
from trl_kd.responses.special_tokens import turn_end
from trl_kd.responses.tokens import OWN, encode
from trl_kd.trainers.common.held_out import MOST_HELD_OUT, hold_out
from trl_kd.trainers.common.response_rows import KIND_COLUMNS, ResponseReader, tokenize_rows
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig
from trl_kd.trainers.pbkd.data import check_text, check_tokenizer, has_images, prepare_rows


logger = get_logger(__name__)


# ---- States ------------------------------------------------------------------------------------------------------------


def check_prompts(dataset: Any, name: str, lmbda: float = 1.0, tools: Any = None) -> Any:
    """
    Args:
        dataset (`Dataset` or `IterableDataset`):
            Prompts, with `completion` or without. A stream is checked by its first row, and then as it is read.
        name (`str`):
            What it is called in messages.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of on-policy states; below 1 completions are read too.
        tools (*optional*):
            Tools of the student's, if it has any.

    Returns:
        The dataset.

    Raises:
        `ValueError`: it has no prompts, or its rows cannot give off-policy states.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = f": give one of them, such as dataset[{next(iter(dataset))!r}]" if isinstance(dataset, dict) else ""
        raise ValueError(f"The {name} dataset is a {type(dataset).__name__}, not a `datasets.Dataset`{hint}.")
    first: dict[str, Any] | None = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it needs at least one row.")
    if "prompt" not in first:
        raise ValueError(f"The {name} dataset has no column 'prompt'; it has {', '.join(sorted(first))}.")
    mixed = lmbda < 1
    if mixed and (has_images(first) or tools):
        raise ValueError(
            f"`lmbda` is {lmbda}, but {'tools' if tools else 'images'} are supported on-policy only: set `lmbda=1`."
        )
    unread = [column for column in ("tools", "chat_template_kwargs") if first.get(column)]
    if mixed and unread and lmbda > 0:
        logger.warning(
            f"The {name} dataset has a column {unread[0]!r}, which the student's own prompts are made without: they are "
            "another context than the one that the teacher answered in. Give what holds for all rows as "
            "`chat_template_kwargs` or `tools` of the trainer."
        )
    if mixed and "completion" not in first:
        logger.info(
            f"The {name} dataset has no column 'completion': the teacher's states are sampled from the teacher."
        )
    read = [column for column in ("prompt", "completion", "completion_finish_reason") if column in first]
    rows: Iterable[dict[str, Any]] = [first]
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(read).with_format(None).iter(batch_size=1000)  # much faster than row by row
        values = (row for batch in batches for row in zip(*(batch[column] for column in read), strict=True))
        rows = (dict(zip(read, row, strict=True)) for row in values)
    for index, row in enumerate(rows):
        check_row(row, f"Row {index} of the {name} dataset", mixed)
    return dataset


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


def check_row(row: dict[str, Any], where: str, mixed: bool) -> None:
    """Raises a `ValueError` for a prompt that is empty or no prompt, or a completion of another format."""
    if row["prompt"] in (None, ""):
        raise ValueError(f"{where}: `prompt` is {row['prompt']!r}. Give a text, or drop the row.")
    check_text(row["prompt"], f"{where}: `prompt`")
    check_template_columns(row, where)
    completion = row.get("completion") if mixed else None
    if completion is None:
        return
    check_text(completion, f"{where}: `completion`")
    check_finish_reason(row.get("completion_finish_reason"), f"{where}: `completion_finish_reason`")
    if isinstance(completion, str) != isinstance(row["prompt"], str):
        kind = "text" if isinstance(row["prompt"], str) else "messages"
        raise ValueError(
            f"{where}: `prompt` is {kind} but `completion` is not: give both as text or both as messages."
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


class EpochOrder(Sampler[int]):
    """
    TRL's order of the prompts, also where a training goes on in a later epoch: its generator would begin anew there.

    Args:
        sampler (`RepeatSampler`):
            TRL's.
        epoch (`Callable`):
            Returns the epoch that begins or goes on.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self._sampler, self._epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if sampler.shuffle:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(self._epoch()):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return iter(sampler)

    def __len__(self) -> int:
        return len(self._sampler)


# ---- Pairs -------------------------------------------------------------------------------------------------------------


def _pair_settings(max_length: int | None, reasoning: str | None = None) -> Any:
    """What the readers of pairs ask of a `PbKDConfig`: Q's likelihood is Bradley–Terry's, so every label will do."""
    return SimpleNamespace(
        loss_type=["sigmoid"],
        use_weighting=False,
        f_divergence_type="reverse_kl",
        max_length=max_length,
        truncation_mode="keep_start",
        dataset_num_proc=None,
        reasoning=reasoning,
    )


def read_pairs(dataset: Any, max_length: int | None, prompts: Any) -> Dataset:
    """
    Checks preference pairs as `PbKDTrainer` does.

    Args:
        dataset (`Dataset`):
            Pairs in TRL's preference format, `preference` being P(chosen ≻ rejected), by default 1.
        max_length (`int` or `None`):
            Tokens of a row that will be read.
        prompts (`Dataset` or `IterableDataset`, *optional*):
            What is trained on, of the same format as the pairs.

    Returns:
        All pairs, with a column `preference`.

    Raises:
        `ValueError`: a stream, images, a wrong label, or text beside messages.
    """
    if not isinstance(dataset, Dataset):
        hint = ""
        if isinstance(dataset, dict) and dataset:
            hint = f", for example preference_dataset[{next(iter(dataset))!r}]"
        elif isinstance(dataset, list):
            hint = ", for example `Dataset.from_list(pairs)`"
        elif isinstance(dataset, IterableDataset):
            hint = ": a stream cannot be drawn from in a new order again and again, as Q does"
        raise ValueError(f"`preference_dataset` is a {type(dataset).__name__}; give a `datasets.Dataset`{hint}.")
    if has_images(next(iter(dataset), {})):
        raise ValueError("`preference_dataset` has images, which Q does not read: drop their columns, or those rows.")
    unused = [c for c in ("teacher", "teacher_side") if c in dataset.column_names]  # who wrote what is nothing to Q
    dataset = dataset.remove_columns(unused)
    dataset, _ = prepare_rows(dataset, "preference", _pair_settings(max_length), imitated=False)
    if prompts is not None:
        _check_same_format(next(iter(dataset)), next(iter(prompts)))
    if "preference" not in dataset.column_names:
        dataset = dataset.add_column("preference", [1.0] * len(dataset))
    return dataset


def known_pairs(dataset: Dataset) -> Dataset:
    """
    Those of the pairs that Q learns from: with a known preference. Two equal responses have none, whatever their label says.

    Args:
        dataset (`Dataset`):
            What `read_pairs` returned.

    Raises:
        `ValueError`: no pair is left.
    """
    read = dataset.select_columns(["chosen", "rejected", "preference"]).with_format(None).iter(batch_size=1000)
    rows = (row for b in read for row in zip(b["chosen"], b["rejected"], b["preference"], strict=True))
    differ = [None if p is None or math.isnan(p) else chosen != rejected for chosen, rejected, p in rows]
    if False in differ:
        logger.warning(
            f"In {differ.count(False)} of {len(dataset)} rows of the preference dataset both responses are equal, so that "
            "none is preferred: they are left out."
        )
    dataset = dataset.select([i for i, use in enumerate(differ) if use])
    if not len(dataset):
        raise ValueError(
            "`preference_dataset` has no row with a known `preference` between two different responses: Q would learn "
            "nothing from it."
        )
    return dataset


def _check_same_format(pair: dict[str, Any], row: dict[str, Any]) -> None:
    ours, theirs = ("messages" if is_conversational(first) else "text" for first in (pair, row))
    if ours != theirs:
        raise ValueError(
            f"`preference_dataset` is {ours}, but the prompts of the train dataset are {theirs}: give both as text or both "
            "as messages (`trl-kd pairs --as_messages` makes pairs of messages from prompts of text)."
        )


def tokenize_pairs(dataset: Dataset, processing_class: Any, args: MMPbKDConfig) -> Dataset:
    """What `known_pairs` returned, as the columns `prompt_ids`, `chosen_ids`, `rejected_ids` and `preference`, and
    [`~trl_kd.trainers.common.response_rows.KIND_COLUMNS`] where a row needs them.

    Raises:
        `ValueError`: the tokenizer cannot render them, or `pair_max_length` leaves no response token.
    """
    check_tokenizer(getattr(processing_class, "tokenizer", processing_class), dataset, "preference")
    settings = _pair_settings(args.pair_max_length, args.reasoning)
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
