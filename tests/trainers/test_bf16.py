"""`bf16` left unset: what this machine can do decides."""

import logging

import pytest

from tests.trainers.rounds_cases import make
from trl_kd import MMPbKDConfig, OnlinePbKDConfig, PbKDConfig


CONFIGS = pytest.mark.parametrize("config", [PbKDConfig, MMPbKDConfig, OnlinePbKDConfig])
SAID = "`bf16` is not set, and False, since this run has no GPU that can do it."


@pytest.fixture
def gpu(monkeypatch):
    """Says whether there is a GPU that can do it."""

    def has(it):
        for module in ("trl_kd.trainers.common.config_checks", "transformers.training_args"):
            monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: it)

    has(False)
    return has


@CONFIGS
@pytest.mark.parametrize("words", [{}, {"use_cpu": True}, {"bf16": None}])
def test_unset_it_is_false_without_a_gpu_and_said_once(config, words, tmp_path, gpu, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        args = config(str(tmp_path), **words)
    assert args.bf16 is False
    assert args.mixed_precision == "no"
    assert caplog.messages.count(SAID) == 1


@CONFIGS
def test_unset_it_is_true_with_one(config, tmp_path, gpu, caplog):
    gpu(True)
    assert config(str(tmp_path)).bf16 is True
    assert config(str(tmp_path), use_cpu=True).bf16 is False  # where nothing uses it
    assert caplog.messages.count(SAID) == 1


@CONFIGS
def test_what_is_said_is_kept(config, tmp_path, gpu, caplog):
    with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
        config(str(tmp_path), bf16=True)
    assert config(str(tmp_path), bf16=True, use_cpu=True).bf16 is True
    assert config(str(tmp_path), bf16=False).bf16 is False
    assert config(str(tmp_path), fp16=True, use_cpu=True).bf16 is False
    assert SAID not in caplog.messages


@pytest.mark.slow
def test_rounds_begun_when_it_was_true_on_the_cpu_go_on_so(tiny_dir, tmp_path, gpu):
    begun = make(tmp_path, tiny_dir, {"bf16": True}, rounds=1, schedule="round").run()
    rounds = make(tmp_path, tiny_dir, {"bf16": None}, rounds=2, schedule="round")
    assert (rounds.args.bf16, rounds.args.mixed_precision) == (True, "bf16")
    assert rounds.run()["rounds"][:1] == begun["rounds"]
    with pytest.raises(ValueError, match="`bf16` was True and is False"):
        make(tmp_path, tiny_dir, {"bf16": False}, rounds=2, schedule="round").run()
