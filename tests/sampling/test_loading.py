"""What local sources, preferences that run a model and the white-box teacher are loaded by."""

import pytest
import torch

from trl_kd.sampling.loading import load_model


def test_options_reach_the_model_and_are_left_as_they_were(tiny_dir):
    pytest.importorskip("bitsandbytes")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "dtype": "bfloat16", "attn_implementation": "eager"}
    given = dict(options)
    model = load_model(tiny_dir, given)
    assert given == options
    assert model.config.quantization_config.bnb_4bit_quant_type == "nf4"
    assert model.config._attn_implementation == "eager"
    assert model.dtype == torch.bfloat16
    assert load_model(tiny_dir, {}).dtype == torch.float32


def test_without_bitsandbytes_the_extra_is_named(tiny_dir, monkeypatch):
    monkeypatch.setattr("trl_kd.sampling.loading.is_bitsandbytes_available", lambda: False)
    said = r"load_in_4bit, bnb_4bit_quant_type: bitsandbytes is missing, install it by `pip install trl-kd\[bnb\]`"
    with pytest.raises(ImportError, match=said):
        load_model(tiny_dir, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
