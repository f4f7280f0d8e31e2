"""Image datasets: labels are read before TRL's vision collator changes its examples; what is not supported is refused."""

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import DPOConfig, DPOTrainer

from trl_kd import PbKDConfig, PbKDTrainer


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + '?' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a?{% endif %}"
)


@pytest.fixture(scope="module")
def llava_dir(tiny_dir, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("llava"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=8, patch_size=4).to_dict(),
        text_config=LlamaConfig(
            **small, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None
        ).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def dataset(pairs: list[dict], **columns) -> Dataset:
    rows = [
        {
            "image": Image.new("RGB", (8, 8), (30 * i, 10, 200)),
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            **{name: values[i] for name, values in columns.items()},
        }
        for i, row in enumerate(pairs)
    ]
    return Dataset.from_list(rows).cast_column("image", ImageFeature())


def test_without_our_terms_it_is_dpo_on_images_too(llava_dir, pairs, settings):
    trainers = []
    for trainer_class, args in (
        (DPOTrainer, DPOConfig(**settings)),
        (PbKDTrainer, PbKDConfig(**settings, imitation_weight=0.0, dual_init=1.0)),
    ):
        trainers.append(trainer_class(model=llava_dir, args=args, train_dataset=dataset(pairs)))
        trainers[-1].train()
    for theirs, ours in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_labels_of_images_reach_the_loss(llava_dir, pairs, settings):
    labels = {
        "preference": [None, 1.0, 0.5, None, 1.0, 1.0, None, 0.7],
        "teacher_side": ["chosen", "rejected", None, "chosen", None, "chosen", "rejected", "chosen"],
    }
    trainer = PbKDTrainer(
        model=llava_dir,
        args=PbKDConfig(
            **{**settings, "per_device_train_batch_size": 8, "max_steps": 1}, dual_init=1.0, imitation_radius="inf"
        ),
        train_dataset=dataset(pairs, **labels),
    )
    assert trainer.row_counts["train"].known == 5
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["pbkd/known_preferences"] == 5
    assert logged["pbkd/imitation"] == pytest.approx(logged["pbkd/teacher_nll"])


@pytest.mark.parametrize(
    ("columns", "options"),
    [({"teacher": [[{"role": "assistant", "content": "7"}]] * 8}, {}), ({}, {"imitation": "token"})],
    ids=["third text", "token"],
)
def test_what_images_cannot_have_is_refused(columns, options, llava_dir, teacher_dir, pairs, settings):
    if options:
        options = {**options, "teacher_model_name_or_path": teacher_dir}
    with pytest.raises(ValueError, match="The train dataset has images"):
        PbKDTrainer(model=llava_dir, args=PbKDConfig(**settings, **options), train_dataset=dataset(pairs, **columns))


def test_responses_with_images_are_read_by_the_same_rules(llava_dir, pairs, settings):
    """No end token behind an answer that was cut off, no imitation of a user's turn, null template variables left out."""
    rows = dataset(
        pairs,
        chosen_finish_reason=["length", *["stop"] * 7],
        rejected_finish_reason=[None] * 8,
        chat_template_kwargs=[{"mood": "glad"}, *[None] * 7],
    ).to_list()
    rows[1]["chosen"] = [
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "5"},
    ]
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "max_length": 40, "dual_init": 1.0}
    args = PbKDConfig(**{**settings, **options})
    args.train_sampling_strategy = "sequential"
    train = Dataset.from_list(rows).cast_column("image", ImageFeature())
    trainer = PbKDTrainer(model=llava_dir, args=args, train_dataset=train)
    batch = next(iter(trainer.get_train_dataloader()))

    def texts(mask):
        kept = zip(batch["input_ids"], batch[mask].bool(), strict=True)
        return [trainer._tokenizer.decode(ids[row]) for ids, row in kept]

    assert texts("completion_mask")[:3] == ["2", "2<eos>u?and?a?5<eos>", "42<eos>"]
    assert texts("own_mask")[:3] == ["2", "2<eos>5<eos>", "42<eos>"]
    assert texts("completion_mask")[8:] == [f"{row['rejected']}<eos>" for row in pairs]
    trainer.train()


def test_kept_reasoning_is_refused_with_images(llava_dir, pairs, settings):
    with pytest.raises(ValueError, match="The train dataset has images, .* `reasoning='keep'` is not supported"):
        PbKDTrainer(model=llava_dir, args=PbKDConfig(**settings, reasoning="keep"), train_dataset=dataset(pairs))
