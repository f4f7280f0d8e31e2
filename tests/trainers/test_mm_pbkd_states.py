"""Which states `MMPbKDTrainer` trains on: whose completions, how they are tokenized, and what each token weighs."""

import copy
import logging
import math
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import CHARACTERS, CHAT_TEMPLATE, make_tokenizer, save_tiny
from tests.trainers.mm_cases import (
    ANSWERS,
    PAIRS,
    PROMPTS,
    QUESTIONS,
    ROWS,
    equal,
    logs_of,
    make,
    nats,
    that_says,
    unpadded,
    weights_of,
)
from trl_kd.trainers.mm_pbkd.data import is_on_policy, tokenize_completion


EOS = 1
SEVEN = make_tokenizer().convert_tokens_to_ids("7")


# ---- Whose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 1.0])
def test_on_policy_rows_are_spread_evenly(lmbda):
    chosen = [is_on_policy(i, lmbda) for i in range(600)]
    for count in range(601):
        assert sum(chosen[:count]) == math.floor(count * lmbda + 1e-6)


@pytest.mark.parametrize(
    ("lmbda", "on_policy"),
    [(0.0, [[False] * 4] * 3), (0.5, [[False, True] * 2] * 3), (1.0, [[True] * 4] * 3)],
)
def test_a_batch_has_its_share_of_on_policy_rows(lmbda, on_policy, tiny_dir, teacher_dir, settings):
    options = {"lmbda": lmbda, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    # Once for each generation batch, not for each of its two micro-batches
    assert [batch["on_policy"] for batch in trainer.batches] == on_policy
    encode = trainer.processing_class
    known = dict(zip(QUESTIONS, ANSWERS, strict=True))
    for batch in trainer.batches:
        prompts, completions = unpadded(batch, "prompt"), unpadded(batch, "completion")
        for prompt, completion, theirs in zip(prompts, completions, batch["on_policy"], strict=True):
            said = known[encode.decode(prompt)]
            assert (completion == [*encode(said)["input_ids"], EOS]) != theirs  # a sample is hardly ever right


def test_the_share_holds_across_batches(tiny_dir, teacher_dir, settings):
    trainer = make(tiny_dir, teacher_dir, settings, lmbda=0.3)
    trainer.train()
    flat = [on for batch in trainer.batches for on in batch["on_policy"]]
    assert [i for i, on in enumerate(flat) if on] == [3, 6, 9]


def test_null_completions_are_sampled_from_the_teacher(tiny_dir, settings):
    """And from nobody else: its words are not the student's."""
    rows = [{**row, "completion": row["completion"] if i % 2 else None} for i, row in enumerate(ROWS)]
    teacher = that_says({SEVEN: 50.0})
    for dataset in (rows, PROMPTS):  # the latter has no such column
        trainer = make(tiny_dir, teacher, settings, dataset, lmbda=0.5, shuffle_dataset=False, max_steps=2)
        student = weights_of(trainer.model)
        trainer.train()
        assert not equal(student, weights_of(trainer.model))
        for completions, batch in zip(trainer.completions, trainer.batches, strict=True):
            assert [row == [SEVEN] * 6 for row in completions] == [not on for on in batch["on_policy"]]


def test_a_sampled_completion_ends_with_the_end_token(tiny_dir, settings):
    trainer = make(tiny_dir, that_says({EOS: 50.0}), settings, PROMPTS, lmbda=0.0, max_steps=1)
    trainer.train()
    assert trainer.completions == [[[EOS]] * 4]


def test_a_teacher_with_another_end_token(tiny_dir, settings, caplog):
    """Its texts end there, and the student is as it was afterwards."""
    teacher = that_says({SEVEN: 50.0})
    teacher.generation_config.eos_token_id = [EOS, SEVEN]
    with caplog.at_level(logging.WARNING):
        trainer = make(tiny_dir, teacher, settings, PROMPTS, lmbda=0.5)
        said = caplog.text
        before = copy.deepcopy(student_side(trainer))
        trainer.train()
    assert said.count("The teacher ends its texts with 7 too, and the student does not") == 1
    assert "The teacher ends its texts" not in caplog.text[len(said) :]
    assert student_side(trainer) == before
    assert before["eos_token_ids"] == [EOS]
    taken = [
        completion
        for completions, batch in zip(trainer.completions, trainer.batches, strict=True)
        for completion, on_policy in zip(completions, batch["on_policy"], strict=True)
        if not on_policy
    ]
    assert taken == [[SEVEN]] * 6


def student_side(trainer) -> dict:
    """What the student's generation goes by."""
    names = ("eos_token_ids", "generation_kwargs", "use_vllm")
    kept = {name: getattr(trainer, name) for name in names} | trainer.generation_config.to_dict()
    return kept | {"model": trainer.model_wrapped is trainer.model}


def test_a_teacher_that_ends_with_no_token_of_the_tokenizer_is_named_by_number(tiny_dir, settings, caplog):
    teacher = that_says({})
    teacher.generation_config.eos_token_id = [EOS, 5000]
    with caplog.at_level(logging.WARNING):
        make(tiny_dir, teacher, settings, PROMPTS)
    assert "The teacher ends its texts with 5000 too" in caplog.text


def test_given_completions_leave_the_student_alone(tiny_dir, teacher_dir, settings, monkeypatch):
    """Off-policy nothing is generated."""
    trainer = make(tiny_dir, teacher_dir, settings, lmbda=0.0)
    monkeypatch.setattr(trainer, "_generate_single_turn", lambda *args: pytest.fail("something was generated"))
    trainer.train()
    assert [entry["num_tokens"] for entry in logs_of(trainer)] == sorted(
        entry["num_tokens"] for entry in logs_of(trainer)
    )
    tokens = sum(len(q) + len(a) + 1 for q, a in zip(QUESTIONS, ANSWERS, strict=True))
    assert logs_of(trainer)[1]["num_tokens"] == tokens  # two batches of four are all rows, once


# ---- Tokens ---------------------------------------------------------------------------------------------------------


def completion_of(tokenizer, row, ends=(EOS,), **template) -> tuple[list[int], list[int]]:
    prompt, ids, own = tokenize_completion(row, tokenizer, list(ends), **template)
    assert all(own)
    return prompt, ids


def said_by(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


def test_text_ends_with_the_end_token_once():
    tokenizer = make_tokenizer()
    for completion in ("42", "42<eos>", "42<eos>!"):
        prompt, ids = completion_of(tokenizer, {"prompt": "40+2=", "completion": completion})
        assert tokenizer.decode(prompt) == "40+2="
        assert tokenizer.decode(ids) == "42<eos>"


class Batched:
    """As processors are: of one text they make a batch of one, and their tokenizer is inside."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.apply_chat_template = tokenizer.apply_chat_template

    def __call__(self, text):
        return {"input_ids": [self.tokenizer(text)["input_ids"]]}


def test_a_processors_tokenizer_is_taken():
    tokenizer = make_tokenizer()
    for row in (
        {"prompt": "40+2=", "completion": "42"},
        {"prompt": said_by("user", "40+2="), "completion": said_by("assistant", "42")},
    ):
        expected = completion_of(tokenizer, row)
        assert tokenizer.decode(expected[1]) == "42<eos>"
        assert completion_of(Batched(tokenizer), row) == expected


@pytest.mark.parametrize("written_after", ["", "\n"], ids=["nothing", "a line break"])
def test_messages_end_with_the_end_token(written_after):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ eos_token + '" + written_after + "' }}")
    row = {"prompt": said_by("user", "40+2="), "completion": said_by("assistant", "42")}
    prompt, ids = completion_of(tokenizer, row)
    assert tokenizer.decode(prompt) == "u?40+2=a?"
    assert tokenizer.decode(ids) == "42<eos>"


def test_turns_after_the_first_stay_and_those_of_others_are_no_states():
    tokenizer = make_tokenizer()
    turns = [*said_by("assistant", "42"), *said_by("user", "sure"), *said_by("assistant", "yes")]
    prompt, ids, own = tokenize_completion({"prompt": said_by("user", "40+2="), "completion": turns}, tokenizer, [EOS])
    assert tokenizer.decode(prompt) == "u?40+2=a?"
    assert tokenizer.decode(ids) == "42<eos>u?surea?yes<eos>"
    assert tokenizer.decode([token for token, mine in zip(ids, own, strict=True) if mine]) == "42<eos>yes<eos>"


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "budget"])
def test_a_completion_that_was_cut_off_has_no_end_token(reason):
    tokenizer = make_tokenizer()
    for row in (
        {"prompt": "40+2=", "completion": "first we"},
        {"prompt": said_by("user", "40+2="), "completion": said_by("assistant", "first we")},
    ):
        assert tokenizer.decode(completion_of(tokenizer, row)[1]) == "first we<eos>"
        cut = row | {"completion_finish_reason": reason}
        assert tokenizer.decode(completion_of(tokenizer, cut)[1]) == "first we"


def test_a_template_that_writes_no_end_token_keeps_its_text():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ eos_token }}", "{{ '\n' }}")
    row = {"prompt": said_by("user", "1"), "completion": said_by("assistant", "2")}
    assert tokenizer.decode(completion_of(tokenizer, row)[1]) == "2\n"


def test_any_of_the_models_end_tokens_ends():
    tokenizer = make_tokenizer()
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "!"])
    ids = completion_of(tokenizer, {"prompt": "1", "completion": "4!"}, ends)[1]
    assert tokenizer.decode(ids) == "4!"


def test_where_prompt_and_completion_merge_the_completion_begins_earlier():
    """Numbers are one token here, so that "1" and "2" become "12"."""
    words = ["<pad>", "<eos>", "<unk>", "+", *map(str, range(100))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+|\D"), behavior="isolated")
    merging = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    prompt, ids = completion_of(merging, {"prompt": "5+1", "completion": "2"})
    assert merging.convert_ids_to_tokens(prompt) == ["5", "+"]
    assert merging.convert_ids_to_tokens(ids) == ["12", "<eos>"]


def test_max_completion_length_cuts_and_then_there_is_no_end_token(tiny_dir, teacher_dir, settings):
    rows = [{"prompt": "1", "completion": text} for text in ("1", "12", "123", "1234")]
    options = {"lmbda": 0.0, "max_completion_length": 3, "max_steps": 1, "shuffle_dataset": False}
    trainer = make(tiny_dir, teacher_dir, settings, rows, **options)
    trainer.train()
    tokens = [trainer.processing_class.convert_ids_to_tokens(ids) for ids in trainer.completions[0]]
    assert tokens == [["1", "<eos>"], ["1", "2", "<eos>"], ["1", "2", "3"], ["1", "2", "3"]]


def test_a_row_of_a_stream_is_checked_as_it_is_read(tiny_dir, teacher_dir, settings):
    rows = [{"prompt": "1", "completion": None}, *[{"prompt": "1", "completion": said_by("assistant", "2")}] * 3]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make(tiny_dir, teacher_dir, settings, stream, lmbda=0.0, max_steps=1)
    with pytest.raises(ValueError, match="A row of a stream: `prompt` is text but `completion` is not"):
        trainer.train()


def test_conversations(tiny_dir, teacher_dir, settings):
    rows = [
        {"prompt": said_by("user", r["prompt"]), "completion": said_by("assistant", r["completion"])} for r in ROWS
    ]
    trainer = make(tiny_dir, teacher_dir, settings, rows, lmbda=0.5, shuffle_dataset=False, max_steps=1)
    trainer.train()
    decode = trainer.processing_class.decode
    batch = trainer.batches[0]
    prompts = [decode(ids) for ids in unpadded(batch, "prompt")]
    assert prompts == [f"u?{q}a?" for q in QUESTIONS[:4]]
    completions = [decode(ids) for ids in trainer.completions[0]]
    for said, answer, on_policy in zip(completions, ANSWERS, batch["on_policy"], strict=False):
        assert (said == f"{answer}<eos>") != on_policy


# ---- Weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.25, 0.5])
def test_each_source_has_its_share_and_each_token_of_it_the_same(lmbda, tiny_dir, teacher_dir, settings):
    """Whatever the lengths, and however the rows fall into micro-batches."""
    options = {"lmbda": lmbda, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    for batch in trainer.batches:
        lengths = batch["completion_mask"].sum(1).tolist()
        assert len(set(lengths)) > 1
        for source in (True, False):
            rows = [i for i in range(8) if batch["on_policy"][i] == source]
            weights = {batch["token_weight"][i] for i in rows}
            assert len(weights) == 1
            total = sum(lengths[i] for i in rows) * weights.pop()
            assert total == pytest.approx(lmbda if source else 1 - lmbda)
        assert batch["row_weight"] == [1 / 8] * 8


@pytest.mark.parametrize("imitation_weight", [0.0, 0.3])
def test_the_first_loss_is_a_mean_over_the_tokens_of_each_source(imitation_weight, tiny_dir, teacher_dir, settings):
    options = {"lmbda": 0.25, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 1}
    options |= {"imitation_weight": imitation_weight, "kl_coef": 0.7, "learning_rate": 0.0}
    if imitation_weight:
        options |= {"imitation_q": 0.5, "imitation_q_warmup": 0.0}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    batch = trainer.batches[0]
    ours, theirs = nats(trainer.model, batch), nats(trainer.teacher_model, batch)
    sums, tokens, imitation, nll = {True: 0.0, False: 0.0}, {True: 0, False: 0}, 0.0, 0.0
    for row, on_policy in enumerate(batch["on_policy"]):
        for t in range(int(batch["completion_mask"][row].sum())):
            p, q = (ours, theirs) if on_policy else (theirs, ours)  # reverse on-policy, else forward
            sums[on_policy] += float((p[row, t].exp() * (p[row, t] - q[row, t])).sum())
            tokens[on_policy] += 1
            if not on_policy:
                word = int(batch["completion_ids"][row, t])
                logp = float(ours[row, t, word])
                nll -= logp
                imitation += -logp if word == EOS else (1 - math.exp(0.5 * logp)) / 0.5
    kl = 0.25 * sums[True] / tokens[True] + 0.75 * sums[False] / tokens[False]
    logged = logs_of(trainer)[0]
    assert logged["mmpbkd/kl"] == pytest.approx(kl, rel=1e-5)
    loss = 0.7 * kl + imitation_weight * 0.75 * imitation / tokens[False]  # Q is zero still
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    seen = {name: logged.get(f"mmpbkd/{name}") for name in ("imitation", "teacher_nll", "q", "advantage")}
    if imitation_weight:
        wanted = [imitation / tokens[False], nll / tokens[False], 0.5]
        assert list(seen.values())[:3] == pytest.approx(wanted, rel=1e-5)
        assert seen["advantage"] is None  # there are no pairs
    else:
        assert set(seen.values()) == {None}


# ---- The student's random stream ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lmbda", [0.5, 1.0])
def test_a_q_function_leaves_the_students_samples_alone(lmbda, tiny_dir, teacher_dir, settings):
    """With a student that stays as it is: the same samples without Q, with one, and with preferences and a warm-up."""
    frozen = {**settings, "learning_rate": 0.0}
    runs = [{"moment_coef": 0.0}, {"q_head": "mlp"}, {"pairs": PAIRS, "q_warmup_steps": 3, "q_head": "mlp"}]
    found = []
    for run in runs:
        trainer = make(tiny_dir, teacher_dir, frozen, lmbda=lmbda, **run)
        trainer.train()
        found.append(trainer.completions)
    assert found[0] == found[1] == found[2]
    assert len({str(row) for batch in found[0] for row in batch}) > 6


def test_the_order_of_every_epoch_is_that_of_trl(tiny_dir, teacher_dir, settings):
    """Also where a training begins in that epoch."""
    trainer = make(tiny_dir, teacher_dir, settings)
    theirs = trl.DistillationTrainer._get_train_sampler(trainer)
    orders = [list(theirs) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch in (2, 0, 1):
        trainer.state.epoch = float(epoch)
        sampler = trainer._get_train_sampler()
        assert list(sampler) == orders[epoch]
        assert len(sampler) == 8


# ---- Tools ----------------------------------------------------------------------------------------------------------


def double(number: int) -> int:
    """
    Doubles a number.

    Args:
        number: The number.
    """
    return 2 * number


def test_what_a_tool_says_is_no_state(tmp_path, settings, monkeypatch):
    """On-policy, as TRL: its tokens are in the context, and are not counted."""
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer = make_tokenizer(CHARACTERS + "<>{}[]()_\"':#|\\;&%$@`~^")
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    student, teacher = (
        save_tiny(tmp_path / name, tokenizer, seed=seed, vocab_size=len(tokenizer), max_position_embeddings=4096)
        for seed, name in enumerate(("student", "teacher"))
    )
    options = {"max_completion_length": 400, "max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 2}
    rows = [{"prompt": said_by("user", "6*2=")}] * 2
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    pairs = [{**pair, **{column: said_by(role, pair[column]) for column, role in roles.items()}} for pair in PAIRS]
    trainer = make(student, teacher, settings, rows, pairs=pairs, tools=[double], **options)
    call = '<tool_call>\n{"name": "double", "arguments": {"number": 6}}\n</tool_call><|im_end|>'
    turns = [[call, "12<|im_end|>"], ["12<|im_end|>"]]

    def say(prompt_ids, *args, **kwargs):
        return [tokenizer(text)["input_ids"] for text in turns.pop(0)]

    monkeypatch.setattr(trainer, "_generate_single_turn", say)
    trainer.train()
    batch = trainer.batches[0]
    first = max(unpadded(batch, "completion"), key=len)
    assert "<tool_response>\n12\n</tool_response>" in tokenizer.decode(first)
    counted = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    assert counted < int(batch["completion_mask"].sum())
    assert batch["token_weight"] == [1 / counted] * 2
    logged = logs_of(trainer)[0]
    states = (batch["completion_mask"] * batch["tool_mask"]).bool()
    pi, mu = nats(trainer.model, batch)[states], nats(trainer.teacher_model, batch)[states]
    assert logged["mmpbkd/kl"] == pytest.approx(float((pi.exp() * (pi - mu)).sum(-1).mean()), rel=1e-4)


def test_the_data_may_have_other_columns(tiny_dir, teacher_dir, settings):
    rows = Dataset.from_list(ROWS).add_column("source", list(range(8)))
    make(tiny_dir, teacher_dir, settings, rows, lmbda=0.5, max_steps=1, remove_unused_columns=True).train()
