"""At `imitation_weight=0, dual_init=1` `PbKDTrainer` is `DPOTrainer`: losses, metrics, gradient norms and weights."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_kd import PbKDConfig, PbKDTrainer


LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
MODES = {
    "default": {},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "uneven last batch": {"per_device_train_batch_size": 3, "max_steps": 6},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "ipo, precomputed reference": {"loss_type": "ipo", "precompute_ref_log_probs": True},
    "weighting (WPO)": {"use_weighting": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "JS divergence": {"f_divergence_type": "js_divergence"},
    "synced reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "aot": {"loss_type": "aot"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "no truncation": {"max_length": None},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "bfloat16": {"bf16": True},
    "lora": {},
    "trained lora": {},
    "prefix tuning": {"gradient_checkpointing": False},
    "streaming": {},
    "evaluation of several sets": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 3},
    "custom collator": {"remove_unused_columns": False},
    "reference model": {},
    "conversational": {},
    "workers": {"dataloader_num_workers": 1},
}


class PaddingCollator(DataCollatorForPreference):
    """A user's collator: it reads what TRL documents, and pads more than needed."""

    def torch_call(self, examples):
        batch = super().torch_call([{k: e[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for e in examples])
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("completion_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, 3), value=value)
        return batch


def keywords(mode: str, folder: str, rows: list[dict]) -> dict:
    dataset = Dataset.from_list(rows)
    given: dict = {"model": folder, "train_dataset": dataset}
    if mode == "lora":
        given["peft_config"] = LoraConfig(**LORA)
    elif mode == "trained lora":
        torch.manual_seed(0)
        given["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA))
    elif mode == "prefix tuning":
        given["peft_config"] = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    elif mode == "streaming":
        given["train_dataset"] = IterableDataset.from_generator(lambda: iter(rows))
    elif mode == "evaluation of several sets":
        given["eval_dataset"] = {"easy": dataset.select(range(5)), "hard": dataset.select(range(3, 8))}
    elif mode == "custom collator":
        given["data_collator"] = PaddingCollator(pad_token_id=0)
    elif mode == "reference model":
        given["ref_model"] = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        with torch.no_grad():
            given["ref_model"].lm_head.weight.mul_(0.5)
    elif mode == "conversational":
        given["train_dataset"] = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": row["prompt"]}],
                    "chosen": [{"role": "assistant", "content": row["chosen"]}],
                    "rejected": [{"role": "assistant", "content": row["rejected"]}],
                }
                for row in rows
            ]
        )
    return given


def train(trainer_class, config_class, mode, tiny_dir, pairs, settings, **more):
    args = config_class(**{**settings, **MODES[mode], **more})
    trainer = trainer_class(args=args, **keywords(mode, tiny_dir, pairs))
    trainer.train()
    return trainer


@pytest.mark.parametrize("mode", MODES)
def test_without_our_terms_it_is_dpo(mode, tiny_dir, pairs, settings):
    dpo = train(DPOTrainer, DPOConfig, mode, tiny_dir, pairs, settings)
    ours = train(PbKDTrainer, PbKDConfig, mode, tiny_dir, pairs, settings, imitation_weight=0.0, dual_init=1.0)

    assert len(dpo.state.log_history) == len(ours.state.log_history) >= 4
    for theirs, entry in zip(dpo.state.log_history, ours.state.log_history, strict=True):
        timed = {name for name in theirs if name.endswith(("runtime", "per_second"))}
        for name in theirs.keys() - timed:
            assert entry[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    moved = False
    start = AutoModelForCausalLM.from_pretrained(tiny_dir).state_dict()
    for (name, theirs), weight in zip(dpo.model.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(weight, theirs, rtol=1e-5, atol=1e-7)
        moved |= name not in start or not torch.equal(weight.float(), start[name].float())
    assert moved


def test_a_dpo_script_runs_with_one_import_changed(tiny_dir, pairs, settings):
    del settings["learning_rate"]
    trainer = PbKDTrainer(model=tiny_dir, args=DPOConfig(**settings), train_dataset=Dataset.from_list(pairs))
    assert isinstance(trainer.args, PbKDConfig)
    assert (trainer.args.dual_init, trainer.args.imitation_weight, trainer.args.learning_rate) == (0.0, 1.0, 2e-5)
    assert trainer.args.output_dir == settings["output_dir"]
    trainer.train()


def test_settings_of_dpo_are_refused_or_taken(tiny_dir, pairs, settings):
    """What only the preference term reads is refused, since it is off by default. A learning rate is taken."""
    rows = Dataset.from_list(pairs)
    with pytest.raises(ValueError, match="`beta` is 0.3, which only the preference term reads"):
        PbKDTrainer(model=tiny_dir, args=DPOConfig(**settings, beta=0.3), train_dataset=rows)
    assert PbKDTrainer(model=tiny_dir, args=DPOConfig(**settings), train_dataset=rows).args.learning_rate == 1e-2


def test_the_imitation_term_changes_the_weights(tiny_dir, pairs, settings):
    dpo = train(DPOTrainer, DPOConfig, "default", tiny_dir, pairs, settings)
    ours = train(PbKDTrainer, PbKDConfig, "default", tiny_dir, pairs, settings, dual_init=1.0)
    assert not all(torch.equal(a, b) for a, b in zip(dpo.model.parameters(), ours.model.parameters(), strict=True))
