"""A reward model decides: P(first ≻ second) = σ((r(x, first) − r(x, second)) / scale)."""

from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_kd.preferences.batches import ModelPreference
from trl_kd.preferences.tokens import template_options
from trl_kd.sampling import Text


class RewardModelPreference(ModelPreference):
    """
    Scores responses with a sequence-classification checkpoint of one label.

    Rows are tokenized as TRL's `RewardTrainer` does when it trains such a model: messages as one conversation through the
    chat template, plain text as prompt + response + end token.

    Args:
        model (`str` or `PreTrainedModel`):
            The reward model, or its name or folder.
        scale (`float`, *optional*, defaults to `1.0`):
            Temperature of the Bradley–Terry model, in units of reward, above 0; 1 is how reward models are trained.
            `None`: the higher reward wins outright.
        processing_class, max_batch_tokens, max_length, model_init_kwargs:
            See [`~trl_kd.preferences.batches.ModelPreference`]. A row longer than `max_length` loses the beginning of its
            prompt, but for a token that opens every row.

    Raises:
        `ValueError`: the model has another number of labels than one, or no head for them; before its weights are read.
    """

    kind = "reward_model"
    architecture = AutoModelForSequenceClassification

    def __init__(
        self,
        model: str | PreTrainedModel,
        scale: float | None = 1.0,
        processing_class: Any = None,
        max_batch_tokens: int = 8192,
        max_length: int | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__(model, scale, processing_class, max_batch_tokens, max_length, model_init_kwargs)

    def check_kind(self, config: Any, architectures: list[str]) -> None:
        classifier = any(name.endswith("ForSequenceClassification") for name in architectures)
        if config.num_labels != 1 or not (classifier or getattr(config, "auto_map", None)):
            raise ValueError(
                f"{self.name!r} is no reward model, but {' or '.join(architectures) or 'of no class'} with `num_labels` = "
                f"{config.num_labels}: a reward model is a sequence-classification checkpoint with one label."
            )

    def score(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        """The reward of each completion; a `ValueError` for one that is NaN or infinite."""
        rows = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            encoded = self.encode(prompt, completion, template_options(columns, index))
            rows.append([] if encoded is None else self._shorten(encoded.prompt_ids + encoded.ids))

        def run(batch: list[int]) -> list[float | None]:
            ids_BT, mask_BT = self.pad([rows[index] for index in batch])
            return self.model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, 0].float().tolist()

        return self.in_batches(prompts, [len(row) for row in rows], run)

    def _shorten(self, ids: list[int]) -> list[int]:
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        self.note_truncation()
        # The reward is read at the end, or by some models at the token that opens every row
        opening = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        return opening + ids[len(opening) - self.max_length :]
