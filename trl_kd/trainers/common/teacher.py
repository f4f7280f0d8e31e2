"""The white-box teacher: its weights give a distribution at each token, which the student imitates or is matched to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import AutoTokenizer, PreTrainedModel

from trl_kd._trl import models as trl_models
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import moment_matching
from trl_kd.sampling.causal import check_causality, check_named
from trl_kd.sampling.loading import load_model
from trl_kd.sampling.model_files import check_files, read_config, tokenizer_reason
from trl_kd.sampling.names import check_no_adapter
from trl_kd.sampling.own_logits import NotOwn, OwnLogits, not_own, probe
from trl_kd.trainers.common.config_checks import without_keys
from trl_kd.trainers.common.output_heads import head_logits, is_split, output_head, output_layer, whole
from trl_kd.trainers.common.vocabulary import check_same_vocabulary, shared_rows, vocabulary_size


if TYPE_CHECKING:
    from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig
    from trl_kd.trainers.pbkd.config import PbKDConfig

logger = get_logger(__name__)


class Teacher:
    """
    A frozen teacher, known by name until `load` is called, so that what can be checked is checked before.

    Args:
        args (`PbKDConfig` or `MMPbKDConfig`):
            Settings; `teacher_model_name_or_path` and its companions say where the teacher is.
        model (`PreTrainedModel`, *optional*):
            The teacher itself.

    Attributes:
        shared_tokens (`int`, *optional*):
            How many first rows of both output embeddings are tokens, where they are padded to different sizes.
        own (`OwnLogits`, *optional*):
            The loaded teacher's own logits, where they are not those of its hidden states and output layer.
    """

    def __init__(self, args: "PbKDConfig | MMPbKDConfig", model: PreTrainedModel | None = None):
        if model is None and args.teacher_model_name_or_path is not None:
            check_no_adapter("teacher_model_name_or_path", args.teacher_model_name_or_path)
        self._args = args
        self.model = model
        self.name = args.teacher_model_name_or_path or (
            trl_models.get_config_model_id(model.config) if model else None
        )
        self.shared_tokens: int | None = None
        self.own: OwnLogits | None = None
        self.looked_at = False
        self._tokenizer: Any = None
        self._redirect = trl_models.ForwardRedirection()

    @classmethod
    def from_args(cls, args: "PbKDConfig", model: str | PreTrainedModel | None) -> "Teacher | None":
        """The teacher that `args` and `model` describe, or `None` when none is needed.

        Raises:
            `ValueError`: one is needed and missing, or given and not needed, or given twice.
        """
        named = args.teacher_model_name_or_path
        if args.imitation != "token":
            if model is not None:
                raise ValueError(
                    f"`teacher_model` is given but `imitation` is {args.imitation!r}, which reads the teacher's texts only: "
                    "set `imitation='token'` or drop `teacher_model`."
                )
            return None
        if model is None and named is None:
            raise ValueError(
                "`imitation='token'` reads the teacher's distributions: give `teacher_model_name_or_path` (or the keyword "
                "`teacher_model`), or use `imitation='sequence'`."
            )
        if model is not None and named is not None:
            raise ValueError(
                f"The teacher is given twice, as `teacher_model` and as `teacher_model_name_or_path` = {named!r}: drop one."
            )
        if isinstance(model, str):
            args.teacher_model_name_or_path, model = model, None
        return cls(args, model)

    @classmethod
    def for_matching(cls, args: "MMPbKDConfig", student: Any, teacher: str | PreTrainedModel | None) -> "Teacher":
        """The teacher of `MMPbKDTrainer`, as its argument `teacher_model` or `args` name it.

        Raises:
            `ValueError`: it is missing, or given twice, or the student itself.
        """
        named = args.teacher_model_name_or_path
        if teacher is None and named is None:
            raise ValueError("There is no teacher: give `teacher_model`, or `args.teacher_model_name_or_path`.")
        if isinstance(teacher, str):
            if named not in (None, teacher):
                raise ValueError(
                    f"The teacher is given twice, as `teacher_model` = {teacher!r} and as `teacher_model_name_or_path` = "
                    f"{named!r}: drop one."
                )
            args.teacher_model_name_or_path, teacher = teacher, None
        if teacher is not None:
            if teacher is student:
                raise ValueError("`teacher_model` and `model` are the same object: load the teacher for itself.")
            for name in ("teacher_model_name_or_path", "teacher_model_init_kwargs"):
                value = getattr(args, name)
                if value is not None:
                    shown = without_keys({name: value}).get(name, value)
                    raise ValueError(
                        f"`teacher_model` is given, and so is `{name}` = {shown!r} for another: drop one."
                    )
        return cls(args, teacher)

    def check_vocabulary(self, student_tokenizer: Any, student: Any) -> None:
        """Raises a `ValueError` unless the teacher's tokenizer is the student's and both have an embedding for every token
        of it. A teacher passed as a model may have no tokenizer on disk; then only the sizes are compared.

        Args:
            student_tokenizer (`PreTrainedTokenizerBase`):
                The student's tokenizer.
            student (`str` or `PreTrainedModel`):
                The student, or where it is.
        """
        self._tokenizer = student_tokenizer
        options = {"revision": self._args.teacher_model_revision, "trust_remote_code": self._args.trust_remote_code}
        with self._named():
            check_named(self.model or self.name, self._who, **options)
        self._check_tokenizer(student_tokenizer)
        if self.model is None:
            assert self.name is not None
            with self._named():
                given: Any = self._args.teacher_model_init_kwargs or {}
                check_files(self.name, read_config(self.name, options), options | given)
        given = self._args.model_init_kwargs or {}
        ours = vocabulary_size(student, self._args, given.get("revision"))
        with self._named():
            theirs = vocabulary_size(self.model or self.name, self._args, self._args.teacher_model_revision)
        self.shared_tokens = shared_rows(ours, theirs, tokens=max(student_tokenizer.get_vocab().values()) + 1)

    def _check_tokenizer(self, student_tokenizer: Any) -> None:
        options = {"revision": self._args.teacher_model_revision, "trust_remote_code": self._args.trust_remote_code}
        try:
            with self._named():
                tokenizer = AutoTokenizer.from_pretrained(self.name, **options)
        except Exception as error:  # those of `tokenizers` have no class of their own
            if self.model is None and not (isinstance(error, OSError) and not Path(self.name or "").is_dir()):
                why = tokenizer_reason(self.name or "", error)
                raise ValueError(
                    f"The teacher {self.name!r} has no tokenizer that can be read, so that its vocabulary cannot be "
                    f"compared with the student's: save the tokenizer beside it. ({why})"
                ) from error
            if self.model is None:
                raise
            logger.info("The teacher has no tokenizer on disk: only the sizes of the vocabularies are compared.")
            return
        check_same_vocabulary(student_tokenizer, tokenizer)

    @property
    def _who(self) -> str:
        return f"The teacher {self.name!r}"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Whatever cannot be read here is the teacher's: a lost connection, for one, does not say whose file it was."""
        try:
            yield
        except OSError as error:
            raise OSError(f"`teacher_model_name_or_path` is {self.name!r}, which cannot be loaded: {error}") from error

    def end_tokens(self) -> list[int]:
        """Tokens with which the loaded teacher ends its texts."""
        found = self._accelerator.unwrap_model(self.model).generation_config.eos_token_id
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def load(self, accelerator: Accelerator) -> "Teacher":
        """Loads the weights where they are not given, freezes them and places them as the reference model is placed."""
        self._accelerator = accelerator
        model = self.model if self.model is not None else self._from_pretrained()
        model.requires_grad_(False).eval()
        state = accelerator.state
        if getattr(state, "deepspeed_plugin", None) is not None:
            model = trl_models.prepare_deepspeed(model, accelerator)
        elif getattr(state, "fsdp_plugin", None) is not None:
            model = trl_models.prepare_fsdp(model, accelerator)
        else:
            model = accelerator.prepare_model(model, device_placement=True, evaluation_mode=True)
        self.model = model
        if not is_split(accelerator):
            self.look()
        return self

    def look(self) -> None:
        """
        Compares what the losses make of the loaded teacher's hidden states with its own logits, and finds out whether it
        reads later tokens. `load` has done it, but for weights that are split among the processes: there all of them come
        here together, before the first step.

        Raises:
            `ValueError`: it is no causal language model, its logits are NaN, or they cannot be had of split weights.
        """
        self.looked_at = True
        model = self._accelerator.unwrap_model(self.model)
        if not is_split(self._accelerator):
            found = self._look_at(model)
            self.own = None if found is None else found.logits
        else:
            with torch.no_grad():
                found = self._redirect(self.model, model, self._look_at, model)
            if found is not None:
                raise ValueError(
                    f"{self._who}, of the type {model.config.model_type!r}, is split among the processes (ZeRO-3, FSDP), "
                    f"and {found.reason}: its own logits can be had of whole weights only. Use DDP or ZeRO-2, or another "
                    "teacher."
                )
        if found is not None:
            logger.info(f"{self._who}: {found.reason}, so that its own logits are taken, a few tokens at a time.")

    def _look_at(self, model: Any) -> NotOwn | None:
        found = probe(model, self._tokenizer, self._who)
        check_causality(model, found, self._who)
        return not_own(model, found, lambda hidden_NH: head_logits(model, hidden_NH))

    def head(self, hidden_NH: torch.Tensor) -> Head:
        """The teacher's distributions at its hidden states."""
        return output_head(self._accelerator.unwrap_model(self.model), hidden_NH, self.own)

    def layer(self) -> Head:
        """The same at no state."""
        return output_layer(self._accelerator.unwrap_model(self.model), self.own)

    def _from_pretrained(self) -> PreTrainedModel:
        name = "teacher_model_init_kwargs"
        given: Any = getattr(self._args, name)
        kwargs = dict(given or {})
        kwargs.setdefault("revision", self._args.teacher_model_revision or "main")
        kwargs.setdefault("trust_remote_code", self._args.trust_remote_code)
        if self._args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None  # one whole teacher a rank
        assert self.name is not None
        try:
            with self._named():
                return load_model(self.name, kwargs)
        except (TypeError, ImportError) as error:
            raise ValueError(
                f"The teacher {self.name!r} cannot be loaded with `{name}` = {without_keys({name: given})}: {error}"
            ) from error

    def hidden_states(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states `[B, T, H]` of the teacher on sequences `[B, T]`."""
        unwrapped = self._accelerator.unwrap_model(self.model)

        def forward(**kwargs):
            return trl_models.backbone(unwrapped)(**kwargs, use_cache=False).last_hidden_state

        with torch.no_grad(), self._accelerator.autocast():
            return self._redirect(self.model, unwrapped, forward, input_ids=input_ids, attention_mask=attention_mask)

    def student_forward(
        self,
        model: Any,
        imitated_BT: torch.Tensor,
        weight_B: torch.Tensor,
        variation_BT: torch.Tensor | None,
        choose: Callable[[torch.Tensor], torch.Tensor] = lambda values_B: values_B,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor]:
        """
        The student's forward, with the imitation term made inside it: a wrapped student (DDP, FSDP, DeepSpeed) allows one
        forward, within which alone its output embedding is whole.

        Args:
            model (`torch.nn.Module`):
                The student as wrapped for training.
            imitated_BT (`torch.Tensor` of shape `[B, T−1]`):
                The teacher's own tokens in its texts, from the second token on.
            weight_B (`torch.Tensor` of shape `[B]`):
                Weight of each text.
            variation_BT (`torch.Tensor` of shape `[B, T−1]`, *optional*):
                s in [0, 1], the share of the total variation in the divergence. `None`: 0.
            choose (`Callable`, *optional*):
                Takes the rows of the teacher's texts, `[B, ...]`, out of those that the student is given. By default they
                are the same.
            **kwargs:
                What the student is given: `input_ids`, `attention_mask` and `labels`, of T tokens a row.

        Returns:
            The student's output, and Σ over texts of weight × Σ over tokens of (1 − s)·KL(μ ‖ π_θ) + s·TV(μ, π_θ) of their
            next-token distributions, nats.
        """
        weight_N = weight_B.unsqueeze(1).expand_as(imitated_BT)[imitated_BT]
        variation_N = None if variation_BT is None else variation_BT[imitated_BT]
        length = kwargs["input_ids"].size(1)
        teacher_BTH = self.hidden_states(choose(kwargs["input_ids"]), choose(kwargs["attention_mask"]))[:, :-1]
        student = self._accelerator.unwrap_model(model)

        def forward(**kwargs):
            captured = []
            hook = trl_models.backbone(student).register_forward_hook(
                lambda *args: captured.append(args[-1].last_hidden_state)
            )
            try:
                output = student.forward(**kwargs)
            finally:
                hook.remove()
            # Prompt learning puts virtual tokens in front
            student_BTH = choose(captured[0][:, -length:][:, :-1])
            states = student_BTH[imitated_BT], teacher_BTH[imitated_BT]
            divergence = self._divergence(student, *states, weight_N, variation_N)
            # A tuple: DDP rebuilds a dataclass from its own fields
            return tuple(output.keys()), tuple(output.values()), divergence

        names, values, divergence = self._redirect(model, student, forward, **kwargs)
        return trl_models.FusedCausalLMOutput(**dict(zip(names, values, strict=True))), divergence

    def _divergence(
        self,
        student: Any,
        student_NH: torch.Tensor,
        teacher_NH: torch.Tensor,
        weight_N: torch.Tensor,
        variation_N: torch.Tensor | None,
    ) -> torch.Tensor:
        teacher = self._accelerator.unwrap_model(self.model)
        with self._accelerator.autocast():
            theirs = self.head(teacher_NH)
        layers = [p for m in (student, teacher) for p in m.get_output_embeddings().parameters()]
        matched = moment_matching(
            output_head(student, student_NH),
            theirs,
            beta=0.0,
            variation_N=variation_N,
            vocab_size=self.shared_tokens,
            gather=lambda: whole(layers),
        )
        return (weight_N * matched.divergence_N).sum()
