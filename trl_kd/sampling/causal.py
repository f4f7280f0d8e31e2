"""Whether a model predicts each token from those before it alone, as all that samples, scores or trains here needs."""

from typing import Any

import torch
from transformers.models.auto import modeling_auto as families

from trl_kd.sampling.model_files import is_adapter, read_config
from trl_kd.sampling.own_logits import Probe, evaluating, log_probs, run


_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OF_ENCODERS = ("ForMaskedLM", "Classification", "ForQuestionAnswering", "ForMultipleChoice", "ForPreTraining")

_LEAK = {torch.float32: 1e-4, torch.float64: 1e-4}
_LEAK_16_BIT = 0.05
"""How much of a change of later tokens may be seen at earlier ones: what kernels round otherwise, and no more."""


def check_kind(config: Any, architectures: list[str], who: str) -> None:
    """
    Args:
        config (`PretrainedConfig`):
            The model's.
        architectures (`list[str]`):
            The classes that its checkpoint names, or the model's own.
        who (`str`):
            How a message calls the model: "The teacher 'name'".

    Raises:
        `ValueError`: it is an encoder, an encoder-decoder, or of another kind that continues no text.
    """
    fault = _fault(config, architectures)
    if fault is not None:
        raise ValueError(
            f"{who} is {fault}: a causal language model is needed, which reads what comes before a token only."
        )


def check_named(model: Any, who: str, **options: Any) -> None:
    """As `check_kind`, for a model or the name of one that is not loaded yet. Of an adapter's folder nothing is said: who
    loads the model reads the config of its base.

    Raises:
        `ValueError`: see `check_kind`.
        `BadModel`: there is no config, or it is none.
    """
    if not isinstance(model, str):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return check_kind(model.config, [type(base).__name__], who)
    if is_adapter(model):
        return None
    config = read_config(model, options)
    return check_kind(config, config.architectures or [], who)


def _fault(config: Any, architectures: list[str]) -> str | None:
    names = " or ".join(architectures)
    if getattr(config, "is_encoder_decoder", False):
        return f"an encoder-decoder ({names or config.model_type})"
    if architectures and not any(map(_continues_texts, architectures)):
        return f"of the class {names}"
    text = config.get_text_config()
    if getattr(text, "is_decoder", None) is False and text.model_type in _encoder_families():
        return f"an encoder ({names or text.model_type} with `is_decoder=False` in its config)"
    # Gemma's embedding models; XLM and FlauBERT; XLNet. PaliGemma reads its prefix both ways, and no answer
    both_ways = (
        getattr(text, "use_bidirectional_attention", None) in (True, "all") and config.model_type != "paligemma"
    )
    both_ways = both_ways or getattr(text, "is_causal", None) is False or getattr(text, "causal", None) is False
    if both_ways or getattr(text, "attn_type", None) == "bi":
        return f"a bidirectional model ({names or text.model_type}, as its config says)"
    return None


def _continues_texts(architecture: str) -> bool:
    """Whether a class of this name is a language model's. Those of remote code are known by their names alone."""
    import transformers

    if architecture.endswith(_DECODERS) or architecture in _causal_classes():
        return True
    return not architecture.endswith(_OF_ENCODERS) and not hasattr(transformers, architecture)


def _causal_classes() -> set[str]:
    found: set[str] = set()
    for mapping in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        for names in getattr(families, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            found |= {names} if isinstance(names, str) else set(names)
    return found


def _encoder_families() -> set[str]:
    """Model types whose classes for causal language models attend to both sides unless `is_decoder` is set. Other families
    have the field too, and do not look at it."""
    both = families.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & families.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    return {*both, "bert-generation"}


def check_causality(model: Any, probe: Probe, who: str) -> None:
    """
    Raises where tokens depend on later ones, which no config says: later tokens are changed, and the distributions at
    earlier ones must stay. A repeated run says how much they move by themselves. Models in int8 or with dynamic scales (FP8)
    are not looked at: a token's numbers depend on its whole batch there.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model, on its device.
        probe (`Probe`):
            What it said of a text.
        who (`str`):
            How a message calls the model.

    Raises:
        `ValueError`: it reads later tokens.
    """
    early = probe.ids.size(1) // 2
    if early < 2 or not _is_exact(model):
        return
    generator = torch.Generator().manual_seed(0)
    rows = model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else 2
    rows = min(rows or 2, model.config.get_text_config().vocab_size)
    later = torch.randint(0, rows, (1, probe.ids.size(1) - early), generator=generator)
    changed = torch.cat([probe.ids[:, :early], later.to(probe.ids)], dim=1)
    with evaluating(model):
        again, other = run(model, probe.ids), run(model, changed)
    before, repeated, after = (log_probs(logits) for logits in (probe.logits, again.logits, other.logits))
    noise = _distance(before[:early], repeated[:early])
    leak, effect = _distance(before[:early], after[:early]), _distance(before[early:], after[early:])
    if leak > 10 * noise and leak > _LEAK.get(probe.logits.dtype, _LEAK_16_BIT) * effect:
        raise ValueError(
            f"{who} reads later tokens (its class is {type(model).__name__}): a change of the words behind a token moves "
            f"its distribution by {leak:.2g} nats, and by itself it moves by {noise:.2g}. A causal language model is needed."
        )


def _distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().mean().item()


def _is_exact(model: Any) -> bool:
    """Whether a token's numbers depend on no other token by the number format alone: no quantisation, or that of weights to
    4 bits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = getattr(base.config, "quantization_config", None)
    if found is not None or getattr(base, "is_quantized", False):
        options = found if isinstance(found, dict) else vars(found or object()) if hasattr(found, "__dict__") else {}
        return bool(options.get("load_in_4bit") or options.get("_load_in_4bit")) or (
            options.get("bits") == 4 and str(options.get("quant_method", "")).split(".")[-1].lower() in ("gptq", "awq")
        )
    narrow = (torch.int8, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_")))
    return all(p.dtype not in narrow for p in base.parameters())
