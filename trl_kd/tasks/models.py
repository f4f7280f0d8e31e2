"""Tiny language models and a character tokenizer, made on the spot: nothing to download."""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The user's text followed by the assistant's, so that a conversation reads as the plain text does."""


def make_tokenizer(alphabet: str, max_length: int = 128) -> PreTrainedTokenizerFast:
    """Makes a tokenizer with one token a character.

    Args:
        alphabet (`str`):
            The characters it knows; any other becomes `<unk>`.
        max_length (`int`, *optional*, defaults to `128`):
            Longest sequence, in tokens, of the models that it is for.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: starts a text with `<bos>`; has `<eos>`, `<pad>` and a chat
            template, and pads on the left, as generation needs. `AutoTokenizer` loads it from where it was saved.
    """
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(set(alphabet))])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, seed: int) -> LlamaForCausalLM:
    """Makes an untrained Llama of a few ten thousand parameters.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Gives the vocabulary, the special tokens and the longest sequence.
        hidden_size (`int`):
            Width; a multiple of 8, since there are four heads and rotary embeddings need an even head size.
        num_layers (`int`):
            Number of layers.
        seed (`int`):
            Seed of the weights.

    Returns:
        [`~transformers.LlamaForCausalLM`]: in float32, with its `generation_config` set to sample at temperature 1.
    """
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=False,
        initializer_range=hidden_size**-0.5 / 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return model
