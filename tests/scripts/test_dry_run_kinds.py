"""A dry run refuses what training would, by its config."""

from transformers import BertConfig, BertLMHeadModel

from tests.conftest import CHARACTERS, make_tokenizer
from tests.scripts.conftest import replaced


def test_a_dry_run_refuses_an_encoder(trl_kd, base, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertLMHeadModel(BertConfig(vocab_size=len(CHARACTERS) + 3, **sizes)).save_pretrained(tmp_path / "bert")
    make_tokenizer().save_pretrained(tmp_path / "bert")
    words = replaced(base, "--model_name_or_path", str(tmp_path / "bert"))
    for more in (["--dry_run"], []):
        assert "is an encoder (BertLMHeadModel with `is_decoder=False` in its config)" in trl_kd(*words, *more).error
