"""States of both kinds in one generation batch: TRL samples the student's completions, the teacher's are put among them."""

from collections import defaultdict
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import torch

from trl_kd._trl.seams import temporarily
from trl_kd.trainers.mm_pbkd.data import is_on_policy, tokenize_completion


class MixedStates:
    """
    Mixin before `DistillationTrainer`: of a generation batch's rows a share of `args.lmbda` is on-policy. The batch gets
    three entries more, lists of one value a row:

    - `on_policy`: whether the student sampled the completion;
    - `token_weight`: its source's share of the rows by the number of the source's tokens in the global batch;
    - `row_weight`: one by the number of the global batch's rows.
    """

    args: Any
    accelerator: Any
    model: Any
    model_wrapped: Any
    teacher: Any
    teacher_model: Any
    processing_class: Any
    state: Any
    use_vllm: bool
    chat_template: Any
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    generation_config: Any
    generation_kwargs: dict[str, Any]
    max_completion_length: int | None
    _metrics: dict[str, defaultdict[str, list[float]]]
    _tokenize_prompts: Any
    _generate_single_turn: Any

    _teacher_rows: dict[int, dict[str, Any]] = {}
    """Of the generation batch under way: the rows whose completion is the teacher's."""
    _sources_anywhere: frozenset[bool] = frozenset({True})
    """Whether any process has on-policy rows (`True`), and rows of the teacher's (`False`)."""
    _evaluated_rows = 0

    def _generate_and_score_completions(self, inputs):
        rows, world = len(inputs), self.accelerator.num_processes
        if self.model.training:
            first = self.state.global_step * rows * world
        else:
            first = self._evaluated_rows
            self._evaluated_rows += rows * world
        mine = first + rows * self.accelerator.process_index
        on_policy = [is_on_policy(mine + i, self.args.lmbda) for i in range(rows)]
        self._teacher_rows = {i: row for i, row in enumerate(inputs) if not on_policy[i]}
        self._sources_anywhere = frozenset(is_on_policy(first + i, self.args.lmbda) for i in range(rows * world))
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]

        # Every source's mean is over its tokens in the global batch, weighted by its share of the rows
        mask_BT = output["completion_mask"] * output.get("tool_mask", 1)
        on_B = torch.tensor(on_policy, device=mask_BT.device)
        counts = torch.stack([(mask_BT.sum(1) * on_B).sum(), (mask_BT.sum(1) * ~on_B).sum(), on_B.sum()])
        on_tokens, off_tokens, on_rows = self.accelerator.reduce(counts, reduction="sum").tolist()
        share = on_rows / (rows * world)
        weights = {True: share / max(on_tokens, 1), False: (1 - share) / max(off_tokens, 1)}
        output["on_policy"] = on_policy
        output["token_weight"] = [weights[on] for on in on_policy]
        output["row_weight"] = [1 / (rows * world)] * rows
        return output

    def _generate(self, prompts):
        if False not in self._sources_anywhere:
            return super()._generate(prompts)  # type: ignore[misc]
        prompt_ids: list[list[int]] = [[] for _ in prompts]
        completion_ids: list[list[int]] = [[] for _ in prompts]
        theirs = [i for i in range(len(prompts)) if i not in self._teacher_rows]
        if True in self._sources_anywhere:
            # A process without on-policy rows takes part in what the others do together, for nothing
            generated = super()._generate([prompts[i] for i in theirs] or prompts[:1])  # type: ignore[misc]
            for i, prompt, completion in zip(theirs, *generated[:2], strict=False):
                prompt_ids[i], completion_ids[i] = prompt, completion
        own: dict[int, list[bool]] = {}
        for i, (prompt, completion, mine) in self._teacher_states().items():
            prompt_ids[i], completion_ids[i], own[i] = prompt, completion, mine
        if self.model.training:
            lengths = [len(prompt_ids[i]) + len(completion_ids[i]) for i in self._teacher_rows]
            seen = self.accelerator.reduce(torch.tensor(sum(lengths), device=self.accelerator.device), reduction="sum")
            self.state.num_input_tokens_seen += seen.item()
            self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        tool_mask = None  # zero where a tool or a user speaks
        if not all(all(mine) for mine in own.values()):
            tool_mask = [list(map(int, own.get(i, [True] * len(ids)))) for i, ids in enumerate(completion_ids)]
        return prompt_ids, completion_ids, tool_mask, None, []

    def _teacher_states(self) -> dict[int, tuple[list[int], list[int], list[bool]]]:
        """`(prompt_ids, completion_ids, own)` of the rows whose completion is the teacher's: given, or sampled now. See
        `tokenize_completion`."""
        rows = list(self._teacher_rows.values())
        prompt_ids = self._tokenize_prompts([row["prompt"] for row in rows])[0] if rows else []
        found, unsaid = {}, {}
        for i, row, prompt in zip(self._teacher_rows, rows, prompt_ids, strict=True):
            if row.get("completion") is None:
                unsaid[i] = prompt
                continue
            template = {"chat_template": self.chat_template, **self.chat_template_kwargs}
            prompt, ids, own = tokenize_completion(
                row, self.processing_class, self.eos_token_ids, self.args.reasoning, **template
            )
            found[i] = prompt, ids[: self.max_completion_length], own[: self.max_completion_length]
        wanted = self.accelerator.reduce(torch.tensor(len(unsaid), device=self.accelerator.device), reduction="sum")
        if wanted > 0:
            # Again all processes together, one that wants nothing with a prompt of a single token
            with self._teacher_speaks():
                prompts = list(unsaid.values()) or [[self.eos_token_ids[0]]]
                sampled = self._generate_single_turn(prompts, None, {})[: len(unsaid)]
            for (i, prompt), ids in zip(unsaid.items(), sampled, strict=True):
                found[i] = prompt, ids, [True] * len(ids)
        return found

    def _teacher_speaks(self) -> AbstractContextManager[None]:
        """TRL's generation, with the teacher in the student's place. It ends where either would."""
        ends = sorted({*self.eos_token_ids, *self.teacher.end_tokens()})
        config = deepcopy(self.generation_config)
        config.eos_token_id = ends
        return temporarily(
            self,
            model_wrapped=self.teacher_model,
            use_vllm=False,
            eos_token_ids=ends,
            generation_config=config,
            generation_kwargs={**self.generation_kwargs, "eos_token_id": ends},
        )

    def evaluation_loop(self, *args, **kwargs):
        self._evaluated_rows = 0
        return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
