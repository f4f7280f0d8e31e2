"""Which tokens of a response `PbKDTrainer` learns: ends of answers, turns of others, templates that change what was said."""

import logging

import pytest
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from tests.conftest import make_tokenizer, save_tiny
from tests.reference.pbkd import Row, pbkd_loss
from tests.responses.templates import CHATML, R1, TOOLS, calls, says, tokenizer_with
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.trainers.common.response_rows import PairReader


USER = [says("user", "1+1=")]


def student(tmp_path, template: str, **settings) -> str:
    tokenizer = tokenizer_with(template)
    return save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer), **settings)


def make(model, settings, rows, train: bool = False, **options) -> PbKDTrainer:
    dataset = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    """With the preference term, so that both responses are seen."""
    args = PbKDConfig(**{**settings, "dual_init": 1.0, "per_device_train_batch_size": 8, "max_steps": 1} | options)
    trainer = PbKDTrainer(model=model, args=args, train_dataset=dataset)
    if train:
        trainer.train()
    return trainer


def batch_of(trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


def texts(trainer, mask: str = "completion_mask") -> list[str]:
    """What the loss is on, chosen responses first."""
    batch = batch_of(trainer)
    kept = batch.get(mask, batch["completion_mask"]).bool()
    return [trainer._tokenizer.decode(ids[row]) for ids, row in zip(batch["input_ids"], kept, strict=True)]


def in_order(trainer) -> PbKDTrainer:
    trainer.args.train_sampling_strategy = "sequential"
    return trainer


# ---- Answers that were cut off ---------------------------------------------------------------------------------------


def cut_rows(conversational: bool, reasons=("length", "stop")) -> list[dict]:
    pairs = [("1+1=", "first we add", "2"), ("2+3=", "5", "so it is six")]
    rows = []
    for prompt, chosen, rejected in pairs:
        row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        if conversational:
            row = {side: [says("user" if side == "prompt" else "assistant", row[side])] for side in row}
        cut = ("chosen", "rejected") if chosen == "first we add" else ("rejected", "chosen")
        rows.append({**row, **{f"{side}_finish_reason": reason for side, reason in zip(cut, reasons, strict=True)}})
    return rows


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_no_end_token_is_learnt_behind_a_cut_answer(tiny_dir, settings, conversational, stream):
    rows = Dataset.from_list(cut_rows(conversational))
    trainer = make(tiny_dir, settings, rows.to_iterable_dataset() if stream else rows)
    assert set(texts(trainer)) == {"first we add", "2<eos>", "5<eos>", "so it is six"}
    assert "own_mask" not in batch_of(trainer)


@pytest.mark.parametrize("reason", ["stop", None, "EOS"])
def test_complete_answers_train_as_rows_that_say_nothing(tiny_dir, settings, reason):
    rows = cut_rows(False, (reason, reason))
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    said, unsaid = (make(tiny_dir, settings, r, train=True, max_steps=2) for r in (rows, plain))
    columns = unsaid.train_dataset.column_names
    assert said.train_dataset.column_names == [*columns[:3], *REASONS, *columns[3:]]
    for ours, theirs in zip(said.model.parameters(), unsaid.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


REASONS = ["chosen_finish_reason", "rejected_finish_reason"]
TOKENS = ["prompt_ids", "chosen_ids", "rejected_ids"]


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}, {"precompute_ref_log_probs": True}])
def test_the_loss_is_that_of_the_texts_without_an_end(tiny_dir, settings, options):
    rows = cut_rows(False)
    trainer = make(tiny_dir, settings, rows, train=True, learning_rate=0.0, **options)
    model = LlamaForCausalLM.from_pretrained(tiny_dir).double()
    encode = make_tokenizer()
    reference = []
    for row in rows:
        ids = {side: encode(row[side])["input_ids"] for side in ("prompt", "chosen", "rejected")}
        for side in ("chosen", "rejected"):
            ids[side] = ids[side] + ([] if row[f"{side}_finish_reason"] == "length" else [1])
        reference.append(Row(ids["prompt"], ids["chosen"], ids["rejected"]))
    expected = pbkd_loss(model, model, reference, ends=(1,), q=0.0, ld_alpha=options.get("ld_alpha"))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )  # the reference reads the same


@pytest.mark.parametrize(("mode", "left"), [("keep_start", "first "), ("keep_end", "we add")])
def test_max_length_takes_tokens_and_their_kinds_alike(tiny_dir, settings, mode, left):
    """The end token behind "first we add" is no token of the loss, from whichever side the row is cut."""
    rows = [{"prompt": "1+1=", "chosen": "first we add", "rejected": "2", "chosen_finish_reason": "length"}]
    length = 10 if mode == "keep_start" else 7
    trainer = make(tiny_dir, settings, rows, max_length=length, truncation_mode=mode)
    assert texts(trainer)[0] == left


def test_a_third_text_of_the_teachers_has_a_reason_of_its_own(tiny_dir, settings):
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "teacher_side": None, "teacher": "first we"}
    row |= {"chosen_finish_reason": "stop", "rejected_finish_reason": "length", "teacher_finish_reason": "length"}
    complete = {**row, "teacher": "one", "teacher_finish_reason": "stop"}
    trainer = make(tiny_dir, settings, [row, complete])
    assert sorted(texts(trainer)) == sorted(["2<eos>", "3"] * 2 + ["first we"] * 2 + ["one<eos>"] * 2)


def test_a_reason_of_the_teachers_text_alone(tiny_dir, settings):
    """Whether it is a third text or one of the two."""
    row = {"prompt": "1+1=", "chosen": "2", "rejected": "3", "teacher": "first we", "teacher_finish_reason": "length"}
    trainer = make(tiny_dir, settings, [row, {**row, "teacher": "2"}])
    assert sorted(texts(trainer)) == sorted(["2<eos>", "3<eos>", "first we", "first we", "2", "3<eos>"])


@pytest.mark.parametrize("reason", ["error", "content_filter"])
def test_no_end_token_behind_an_answer_that_broke_off_or_was_refused(tiny_dir, settings, reason):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3", "chosen_finish_reason": reason}]
    assert texts(make(tiny_dir, settings, rows)) == ["2", "3<eos>"]


def test_what_has_no_token_left_is_left_out_with_a_count(tiny_dir, settings, caplog):
    cut = {"prompt": "1+1=", "chosen": "", "rejected": "3", "chosen_finish_reason": "length"}
    thought = {**cut, "chosen": "<think>hm", "chosen_finish_reason": "stop"}
    whole = {**cut, "chosen": "<think>hm</think>2", "chosen_finish_reason": "stop"}
    with caplog.at_level(logging.WARNING):
        trainer = make(tiny_dir, settings, [cut, thought, whole], reasoning="strip")
    assert texts(trainer) == ["2<eos>", "3<eos>"]
    assert "2 of 3 rows of the train dataset cannot be learnt from" in caplog.text
    assert "The first is row 0: `chosen` was cut off before it said anything" in caplog.text


@pytest.mark.parametrize("value", [3, 1.5, True, ["stop"]])
def test_a_reason_that_is_no_text_is_refused_before_weights_load(tiny_dir, settings, value):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3", "chosen_finish_reason": value}]
    with pytest.raises(
        ValueError, match="Row 0 of the train dataset: `chosen_finish_reason` is .*: it must be a text"
    ):
        make(tiny_dir, settings, rows)


def test_unknown_reasons_keep_the_text(tiny_dir, settings):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3", "chosen_finish_reason": "odd_word"}]
    assert texts(make(tiny_dir, settings, rows)) == ["2", "3<eos>"]


# ---- Turns of others -------------------------------------------------------------------------------------------------


def turns() -> list[dict]:
    asked = [says("assistant", "two"), says("user", "sure?"), says("assistant", "yes")]
    called = [calls("add"), says("tool", "secret 2"), says("assistant", "it is 2")]
    return [
        {"prompt": USER, "chosen": asked, "rejected": [says("assistant", "3")]},
        {"prompt": USER, "chosen": called, "rejected": [says("assistant", "no")]},
        {"prompt": USER, "chosen": [says("assistant", "2")], "rejected": [says("assistant", "4")]},
    ]


def test_imitation_leaves_turns_of_others_out_and_dpo_does_not(tmp_path, settings):
    trainer = in_order(make(student(tmp_path, TOOLS), settings, turns()))
    whole = ["two<eos>[u]sure?[a]yes<eos>", "call add<eos>[t]secret 2[a]it is 2<eos>", "2<eos>"]
    assert texts(trainer)[:3] == whole
    assert texts(trainer, "own_mask")[:3] == ["two<eos>yes<eos>", "call add<eos>it is 2<eos>", "2<eos>"]
    assert trainer.row_counts["train"].empty == 0  # a call of a tool is no empty response


def test_the_imitation_loss_is_on_own_words_alone(tmp_path, settings):
    folder = student(tmp_path, TOOLS)
    rows = turns()[:1]
    trainer = make(folder, settings, rows, train=True, dual_init=1e-12, learning_rate=0.0)
    batch, model = batch_of(trainer), AutoModelForCausalLM.from_pretrained(folder).double()
    logps = model(input_ids=batch["input_ids"][:1]).logits[0, :-1].log_softmax(-1)
    logps = logps.gather(1, batch["input_ids"][0, 1:, None]).squeeze(1)
    own = batch["own_mask"][0, 1:]
    expected = -float((logps * own).sum() / own.sum())
    assert trainer.state.log_history[0]["pbkd/imitation"] == pytest.approx(expected, rel=1e-5)
    assert int(own.sum()) < int(batch["completion_mask"][0, 1:].sum())


def test_token_imitation_reads_the_same_tokens(tmp_path, settings):
    folder = student(tmp_path, TOOLS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = save_tiny(tmp_path / "teacher", tokenizer, vocab_size=len(tokenizer), seed=1)
    options = {"imitation": "token", "teacher_model_name_or_path": teacher, "dual_init": 1e-12, "learning_rate": 0.0}
    trainer = make(folder, settings, turns()[:1], train=True, **options)
    batch = batch_of(trainer)
    pi, mu = (
        AutoModelForCausalLM.from_pretrained(name).double()(input_ids=batch["input_ids"][:1]).logits[0, :-1]
        for name in (folder, teacher)
    )
    pi, mu = pi.log_softmax(-1), mu.log_softmax(-1)
    divergence = (mu.exp() * (mu - pi)).sum(-1)
    expected = float((divergence * batch["own_mask"][0, 1:]).sum() / batch["own_mask"][0, 1:].sum())
    assert trainer.state.log_history[0]["pbkd/imitation"] == pytest.approx(expected, rel=1e-4)


# ---- Templates that change a response --------------------------------------------------------------------------------


SAMPLED = "one and one\n</think>\n\n2"


def thoughts() -> list[dict]:
    answers = [(SAMPLED, "2"), ("2", "3")]
    return [{"prompt": USER, "chosen": [says("assistant", c)], "rejected": [says("assistant", r)]} for c, r in answers]


def test_what_is_not_learnt_as_sampled_is_said_once_with_a_count(tmp_path, settings, caplog):
    with caplog.at_level(logging.WARNING):
        make(student(tmp_path, R1), settings, thoughts())
    said = [r.getMessage() for r in caplog.records if "what is learnt is not what is sampled" in r.getMessage()]
    assert len(said) == 1
    assert "In 2 of 2 rows of the train dataset" in said[0]
    assert "In row 0 the chat template leaves a part of the response out" in said[0]


def test_ordinary_templates_are_not_warned_of(tmp_path, settings, caplog):
    rows = [{"prompt": USER, "chosen": [says("assistant", " 2 ")], "rejected": [says("assistant", "3")]}]
    with caplog.at_level(logging.WARNING):
        make(student(tmp_path, CHATML), settings, rows)
    assert "what is learnt" not in caplog.text


@pytest.mark.parametrize(
    ("reasoning", "learnt"),
    [
        (None, ["\n\n2<|im_end|>", "2<|im_end|>"]),
        ("keep", [f"{SAMPLED}<|im_end|>", "2<|im_end|>"]),
        ("strip", ["2<|im_end|>", "2<|im_end|>"]),
    ],
)
def test_reasoning_says_what_is_learnt(tmp_path, settings, reasoning, learnt):
    trainer = in_order(make(student(tmp_path, R1), settings, thoughts(), reasoning=reasoning))
    assert texts(trainer)[:2] == learnt
    prompt = trainer._tokenizer.decode(trainer.train_dataset[0]["prompt_ids"])
    assert prompt.endswith("<think>\n") == (reasoning == "keep")


def test_reasoning_error_stops_before_weights_load(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded")
    )
    with pytest.raises(ValueError, match="In 2 of 2 rows .* Set `reasoning` to 'keep' or 'strip'"):
        make(student(tmp_path, R1), settings, thoughts(), reasoning="error")
    with pytest.raises(ValueError, match="`reasoning` is 'drop': use 'keep'"):
        PbKDConfig(**settings, reasoning="drop")


def test_keep_equals_dpo_trainer_where_the_template_changes_nothing(tmp_path, settings):
    folder = student(tmp_path, CHATML)
    rows = [{"prompt": USER, "chosen": [says("assistant", "2")], "rejected": [says("assistant", "3")]}]
    kept, plain = (make(folder, settings, rows, reasoning=reasoning) for reasoning in ("keep", None))
    for column in TOKENS:
        assert kept.train_dataset[column] == plain.train_dataset[column]


def test_rows_that_cannot_be_rendered_are_left_out_with_a_count(tmp_path, settings, caplog):
    template = "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    folder = student(tmp_path, template)
    rows = [{**row, "prompt": [says("user", "no" if i == 1 else "1+1=")]} for i, row in enumerate(turns()[2:] * 3)]
    with caplog.at_level(logging.WARNING):
        trainer = make(folder, settings, rows)
    assert len(trainer.train_dataset) == 2
    assert trainer.row_counts["train"].rows == 2
    assert "1 of 3 rows of the train dataset cannot be learnt from and are left out. The first is row 1" in caplog.text
    assert len(list(make(folder, settings, Dataset.from_list(rows).to_iterable_dataset()).train_dataset)) == 2
    with pytest.raises(ValueError, match="3 of 3 rows of the train dataset cannot be learnt from. Row 0: the chat"):
        make(folder, settings, [{**row, "prompt": [says("user", "no")]} for row in rows])


# ---- Options of the template in some rows only -----------------------------------------------------------------------


def test_null_options_train_as_they_were_built(tmp_path, settings):
    template = "{{ tools[0] if tools }}{{ mood if mood is defined }}{{ tone if tone is defined }}" + CHATML
    folder = student(tmp_path, template)
    plain = {"prompt": USER, "chosen": [says("assistant", "2")], "rejected": [says("assistant", "3")]}
    options = [{"mood": "glad"}, {"tone": "low"}, None]
    dataset = Dataset.from_list([{**plain, "chat_template_kwargs": one} for one in options])
    assert dataset[0]["chat_template_kwargs"] == {"mood": "glad", "tone": None}
    expected = ["glad", "low", ""]
    for rows in (dataset, dataset.to_iterable_dataset()):
        trainer = make(folder, settings, rows)
        prompts = [trainer._tokenizer.decode(row["prompt_ids"]) for row in trainer.train_dataset]
        assert [prompt.partition("<|im_start|>")[0] for prompt in prompts] == expected
    tools = [[{"name": "add"}], [{"kind": "x"}], None]
    trainer = make(folder, settings, [{**plain, "tools": one} for one in tools])
    prompts = [trainer._tokenizer.decode(row["prompt_ids"]) for row in trainer.train_dataset]
    assert ["None" in prompt for prompt in prompts] == [False] * 3


def test_options_without_nulls_are_trls(tmp_path, settings):
    template = "{{ mood }}" + CHATML
    folder = student(tmp_path, template)
    rows = [{**turns()[2], "chat_template_kwargs": {"mood": "glad"}}] * 2
    trainer = make(folder, settings, rows, max_length=30)
    assert trainer._tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]).startswith("glad")


# ---- Ends that cannot be learnt, and BOS tokens ----------------------------------------------------------------------


def test_a_base_model_that_cannot_stop_is_told_of_and_eos_token_mends_it(tmp_path, settings, caplog):
    folder = student(tmp_path, CHATML)
    rows = [{"prompt": USER, "chosen": [says("assistant", "2")], "rejected": [says("assistant", "3")]}] * 8
    with caplog.at_level(logging.WARNING):
        make(folder, settings, rows)
    assert "The chat template ends turns with '<|im_end|>', but generation stops at '<eos>'" in caplog.text
    caplog.clear()
    out = str(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        trainer = make(
            *(folder, {**settings, "output_dir": out}, rows),
            **{"train": True, "eos_token": "<|im_end|>", "max_steps": 60, "imitation_weight": 10.0},
        )
    assert "The chat template ends turns" not in caplog.text
    trainer.save_model()
    end = trainer._tokenizer.convert_tokens_to_ids("<|im_end|>")
    saved = AutoModelForCausalLM.from_pretrained(out)
    assert saved.generation_config.eos_token_id == [end, 1]
    assert saved.config.eos_token_id == end
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    sampler = LocalSampler(out, SamplingSettings(temperature=0, max_new_tokens=8))
    ((_, _, answer),) = sampler.sample([Request("0", USER)])
    assert (answer.text, answer.finish_reason) == ("2", "stop")
    with pytest.raises(ValueError, match="`eos_token` is '<end>', which is not in the vocabulary"):
        make(folder, settings, rows, eos_token="<end>")


def test_an_adapter_keeps_the_end_token_beside_it(tmp_path, settings):
    rows = [{"prompt": USER, "chosen": [says("assistant", "2")], "rejected": [says("assistant", "3")]}] * 8
    out = str(tmp_path / "out")
    args = PbKDConfig(**{**settings, "max_steps": 1, "eos_token": "<|im_end|>", "output_dir": out})
    trainer = PbKDTrainer(
        model=student(tmp_path, CHATML),
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.save_model()
    end = trainer._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [end, 1]


def test_settings_that_do_not_matter_leave_the_cache_alone(tmp_path, settings):
    """What the new passes compute is found again under another output folder."""
    folder = student(tmp_path, CHATML)
    prints = []
    for out in ("a", "b"):
        args = PbKDConfig(**{**settings, "output_dir": str(tmp_path / out)})
        reader = PairReader(AutoTokenizer.from_pretrained(folder), args, "train")
        prints.append(Hasher.hash({k: v for k, v in vars(reader).items() if k != "processing_class"}))
    assert prints[0] == prints[1]


def test_a_second_bos_token_is_told_of_with_a_count(tmp_path, settings, caplog):
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    folder = save_tiny(tmp_path / "student", tokenizer)
    rows = [{"prompt": prompt, "chosen": "2", "rejected": "3"} for prompt in ("<unk>1+1=", "<unk>2=", "3-1=")]
    with caplog.at_level(logging.WARNING):
        make(folder, settings, rows)
    assert "2 prompts of the train dataset begin with '<unk>'" in caplog.text
