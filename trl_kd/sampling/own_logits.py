"""
A model's own logits, and whether they are those that a loss makes of its hidden states.

Losses over a vocabulary take hidden states and the weight of the output layer, so that no `[tokens, vocabulary]` table ever
lives: logits are h Wᵀ (+ bias, scale, cap). In some families they are not: a layer lies before the output layer, a cap has
another name, an adapter sits on it. That is measured here, on a short text, and `OwnLogits` is the way out.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from trl_kd._trl import models as trl_models


TOLERANCE, TOLERANCE_16_BIT = 1e-3, 0.25
"""Nats by which two ways to the same log-probabilities may differ on average, in float32 and in less."""

TEXT = "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42. Why? Because 2 + 0 = 2 and 1 + 3 = 4."
POSITIONS = 32

OTHER_CAPS = ("logits_soft_cap", "output_logit_soft_cap")
"""Names of a cap of the logits in a config (RecurrentGemma, xLSTM) that TRL does not read. Small logits, such as those of an
untrained model, do not show a cap."""


class Probe(NamedTuple):
    """
    What a model says of a short text.

    Attributes:
        ids (`torch.Tensor` of shape `[1, T]`):
            The text.
        logits (`torch.Tensor` of shape `[T, V]`):
            The model's own.
        hidden (`torch.Tensor` of shape `[T, H]`):
            Its hidden states, which its backbone ends with.
        output, backbone (`torch.nn.Module`):
            What the backbone returned, and what the model's forward calls as such. `None` where it calls none.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    hidden: torch.Tensor
    output: Any
    backbone: Any


class NotOwn(NamedTuple):
    """
    How a model's own logits differ from those of hidden states and an output layer.

    Attributes:
        reason (`str`):
            What was seen, as the end of a sentence.
        logits (`OwnLogits`):
            Gives the model's own.
    """

    reason: str
    logits: "OwnLogits"


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode meanwhile; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_ids(tokenizer: Any, config: Any) -> torch.Tensor:
    """A short text as tokens `[1, T]`: `POSITIONS` of them, unless the model has positions for fewer only. Without a
    tokenizer any tokens will do."""
    text = config.get_text_config()
    length = min(POSITIONS, getattr(text, "max_position_embeddings", None) or POSITIONS)
    if tokenizer is None:
        return torch.randint(0, text.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))
    ids = list(tokenizer(TEXT)["input_ids"]) or [0]
    return torch.tensor([(ids * length)[:length]])


@torch.no_grad()
def run(model: Any, ids: torch.Tensor) -> Probe:
    """One forward of a model in evaluation mode, in the dtype of its weights. The global random state stays."""
    base = trl_models.backbone(model)
    device = next(base.parameters()).device
    ids = ids.to(device)
    # OPT's and BART's language models call the decoder inside their backbone
    called = [module for module in (base, getattr(base, "decoder", None)) if isinstance(module, torch.nn.Module)]
    captured: dict[Any, Any] = {}
    hooks = [module.register_forward_hook(lambda *args: captured.update({args[0]: args[-1]})) for module in called]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), _attention_dtype(model, device):
            logits = own_forward(model)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    # Prompt learning puts virtual tokens in front
    logits = logits[0, -ids.size(1) :]
    backbone = next((module for module in called if module in captured), None)
    if backbone is None:  # of code that is not transformers' own: nobody needs it to sample
        return Probe(ids, logits, logits[:, :0], None, None)
    output = captured[backbone]
    return Probe(ids, logits, output[0][0, -ids.size(1) :], output, backbone)


def output_like(output: Any, hidden: torch.Tensor) -> Any:
    """What a backbone that has returned `output` would return with these hidden states."""
    return (hidden,) if isinstance(output, tuple) else type(output)(last_hidden_state=hidden)


def own_forward(model: Any) -> Callable:
    """A model's forward without the autocast that accelerate puts around it. Not `__call__`: its hooks have run already
    inside the forward of a wrapper (FSDP, DeepSpeed)."""
    return getattr(model, "_original_forward", None) or model.forward


def _attention_dtype(model: Any, device: torch.device) -> AbstractContextManager:
    """Flash attention knows 16 bits alone: float32 weights run under autocast with it."""
    kind = str(getattr(model.config, "_attn_implementation", ""))
    narrow = "flash" in kind and next(model.parameters()).dtype == torch.float32
    return torch.autocast(device.type, torch.bfloat16) if narrow else nullcontext()


def probe(model: Any, tokenizer: Any, who: str) -> Probe:
    """
    What a model says of a short text, its adapters on. Mode, gradients and the random state stay.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, on its device.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer.
        who (`str`):
            How a message calls the model.

    Raises:
        `ValueError`: its logits are NaN or infinite.
    """
    with evaluating(model):
        found = run(model, text_ids(tokenizer, model.config))
    check_numbers(found.logits, who)
    return found


def check_numbers(logits: torch.Tensor, who: str) -> None:
    """Raises a `ValueError` for logits that are NaN or +∞, or −∞ for every word."""
    if logits.isnan().any() or (logits == math.inf).any() or (logits == -math.inf).all(-1).any():
        raise ValueError(
            f"{who} gives logits that are NaN or infinite: its weights are broken, or too large for its `dtype` (load it in "
            "'bfloat16' or 'float32')."
        )


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-softmax in float32, finite: a word that the model masks has a very small one."""
    return logits.float().log_softmax(-1).clamp(min=-1e4)


def difference(ours: torch.Tensor, own: torch.Tensor) -> float:
    """
    Mean difference of two log-softmaxes, in nats, over the words that the model does not mask.

    Args:
        ours, own (`torch.Tensor` of shape `[N, V]`):
            Logits. Paddings of the vocabulary may differ.
    """
    words = min(ours.size(-1), own.size(-1))
    ours, own = ours[:, :words].to(own.device), own[:, :words]
    return (log_probs(ours) - log_probs(own))[is_allowed(own)].abs().mean().item()


def is_allowed(logits: torch.Tensor) -> torch.Tensor:
    """Where a model does not mask a word, by −∞ or the smallest number of its dtype."""
    return logits > torch.finfo(logits.dtype).min / 2


def tolerance(*tensors: torch.Tensor) -> float:
    exact = all(tensor.dtype in (torch.float32, torch.float64) for tensor in tensors)
    return TOLERANCE if exact else TOLERANCE_16_BIT


def not_own(model: Any, found: Probe, ours: Callable[[torch.Tensor], torch.Tensor]) -> NotOwn | None:
    """
    Compares logits that are made of hidden states with the model's own.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
        found (`Probe`):
            What it said of a text.
        ours (`Callable`):
            Logits `[N, V]` of hidden states `[N, H]`, as a loss makes them.

    Returns:
        `NotOwn`, *optional*: how they differ; `None` where they are the same.
    """
    if found.backbone is None:
        raise ValueError(
            f"The class {type(model).__name__} calls no backbone, from whose hidden states log-probabilities are computed: "
            "use a model of a class in transformers."
        )
    config = model.config.get_text_config()
    named = [name for name in OTHER_CAPS if getattr(config, name, None)]
    if named:
        reason = f"its logits are capped by `{named[0]}`"
    else:
        try:
            with torch.no_grad():
                gap = difference(ours(found.hidden), found.logits)
        except (RuntimeError, AttributeError, TypeError) as error:  # packed weights, or no matrix at all
            reason = f"its output layer is no matrix of hidden size by vocabulary ({type(error).__name__})"
        else:
            if gap <= tolerance(found.hidden, found.logits):
                return None
            reason = f"its log-probabilities differ from those of its hidden states and output layer by {gap:.2g} nats"
    return NotOwn(reason, OwnLogits(model, found))


@contextmanager
def standing_still(backbone: Any, output: Any) -> Iterator[None]:
    """The backbone returns `output` meanwhile, whatever it is given."""
    own = vars(backbone).get("forward")
    backbone.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own


class OwnLogits:
    """
    What a model does behind its backbone, whatever that is: its own logits of hidden states, without a gradient. The model's
    forward runs with its backbone standing still.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, whole on its device, in evaluation mode.
        found (`Probe`):
            What it said of a text.

    Attributes:
        words (`int`):
            V.
    """

    def __init__(self, model: Any, found: Probe):
        self.model, self.words, self._backbone = model, found.logits.size(-1), found.backbone
        self._output = output_like(found.output, found.hidden[:0])  # its class is needed, not what is in it

    @torch.no_grad()
    def __call__(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """Logits `[N, V]` of hidden states `[N, H]`."""
        hidden = hidden_NH.detach().unsqueeze(0)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with standing_still(self._backbone, output_like(self._output, hidden)):
            return own_forward(self.model)(input_ids=ids, use_cache=False).logits[0]

    def under_autocast(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same under the autocast that there is now, wherever it is called: a backward runs without."""
        device = next(self.model.parameters()).device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def logits(hidden_NH: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, dtype, enabled=enabled):
                return self(hidden_NH)

        return logits
