import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Json, List, Value
from PIL import Image as Picture

from tests.pairs.fakes import Column, Longer, Pairwise, Source
from trl_kd.pairs import build_pairs, load_pairs, merge_shards
from trl_kd.pairs.dedup import SeenPairs
from trl_kd.preferences import ScoredPreference


def prompts(count=12):
    return Dataset.from_list([{"prompt": f"question {i}", "level": i % 3} for i in range(count)])


def build(data, folder, **options):
    parts = {
        "teacher": Source("teacher"),
        "student": Source("student"),
        "preference": Longer(),
        "show_progress": False,
    }
    return build_pairs(data, output_dir=folder, **{**parts, **options})


def rows(dataset):
    return dataset.to_list()


class TeacherWins:
    is_lookup = True

    def __call__(self, prompts, first, second, first_source, second_source, **columns):
        return [
            1.0 if sources == ("teacher", "student") else None
            for sources in zip(first_source, second_source, strict=True)
        ]


def test_a_dataset_with_all_that_belongs_to_it(tmp_path):
    data = prompts()
    made = build(data, tmp_path, num_student_samples=3, policy="all")
    assert rows(made) == rows(load_pairs(tmp_path))
    assert made.column_names == [
        *("prompt", "chosen", "rejected", "preference", "teacher_side", "teacher", "score_chosen", "score_rejected"),
        *("chosen_source", "rejected_source", "chosen_finish_reason", "rejected_finish_reason"),
        *("student_count", "teacher_finish_reason", "source_row", "level"),
    ]
    assert made["source_row"] == sorted(made["source_row"])
    for row in made:
        assert row["prompt"] == data[row["source_row"]]["prompt"]
        assert row["level"] == data[row["source_row"]]["level"]
        assert row["preference"] is None or (row["score_chosen"] >= row["score_rejected"])
        assert row["chosen"].startswith(row["chosen_source"])
        assert row["chosen_finish_reason"] == "stop"
    for name in ("README.md", "summary.json", "settings.json", "pairs.html", "answers.db"):
        assert (tmp_path / name).exists(), name


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path):
    log, preference = tmp_path / "log", Longer()
    first = build(prompts(), tmp_path / "a", teacher=Source("teacher", log), preference=preference)
    asked, scored = log.read_text(), len(preference.asked)
    teacher = Source("teacher", log)
    second = build(prompts(), tmp_path / "a", teacher=teacher, preference=preference)
    assert rows(first) == rows(second)
    assert (log.read_text(), len(preference.asked)) == (asked, scored)
    assert teacher.closed == 0


def test_more_samples_ask_only_for_those(tmp_path):
    log = tmp_path / "log"
    build(prompts(), tmp_path / "a", student=Source("student", log))
    build(prompts(), tmp_path / "a", student=Source("student", log), num_student_samples=3)
    asked = [line.split() for line in log.read_text().splitlines()]
    assert len({tuple(ask) for ask in asked}) == len(asked) == 36
    fewer = build(prompts(), tmp_path / "a", student=Source("student", log))
    assert len(log.read_text().splitlines()) == 36
    assert len(fewer) == 12


@pytest.mark.parametrize("policy", ["teacher_vs_student", "best_vs_worst", "all"])
def test_the_order_in_which_answers_arrive_does_not_matter(tmp_path, policy):
    options = {"policy": policy, "num_student_samples": 3, "num_teacher_samples": 2, "max_pairs_per_prompt": 2}
    made = [
        rows(build(prompts(), tmp_path / str(window), student=Source("student", window=window), **options))
        for window in (1, 5, 100)
    ]
    assert made[0] == made[1] == made[2]


def test_another_seed_draws_other_pairs_from_the_same_answers(tmp_path):
    options = {"policy": "all", "num_student_samples": 4, "max_pairs_per_prompt": 2}
    made = [rows(build(prompts(), tmp_path, seed=seed, **options)) for seed in (0, 1, 0)]
    assert made[0] == made[2] != made[1]


def test_equal_prompts_are_asked_and_paired_once(tmp_path):
    log = tmp_path / "log"
    data = Dataset.from_list([{"prompt": f"question {i % 4}"} for i in range(2500)])
    made = build(data, tmp_path / "a", teacher=Source("teacher", log, window=7))
    assert len(log.read_text().splitlines()) == 4
    assert made["source_row"] == [0, 1, 2, 3]


def test_equal_prompts_with_answers_of_their_own_are_paired_apart(tmp_path):
    data = Dataset.from_dict({"prompt": ["q"] * 3, "t": ["t", "t", "t"], "s": ["a", "b", "a"]})
    made = build(data, tmp_path, teacher=Column("t"), student=Column("s"), preference=TeacherWins())
    assert [(row["source_row"], row["rejected"]) for row in made] == [(0, "a"), (1, "b")]


def test_pairs_seen_before_are_found_on_disk_too():
    rng = random.Random(0)
    small, large = SeenPairs(in_memory=5), SeenPairs()
    for _ in range(20):
        made = [
            (rng.choice("xy"), dict(zip(("chosen", "rejected"), rng.sample("abcdef", 2), strict=True)))
            for _ in range(4)
        ]
        assert small.are_new(made) == large.are_new(made)
    assert not any(small.are_new(made))
    assert not any(small.are_new([(key, {"chosen": p["rejected"], "rejected": p["chosen"]}) for key, p in made]))


def test_a_source_may_read_its_requests_in_a_thread(tmp_path):
    class Threaded(Source):
        def sample(self, requests):
            requests, waiting = iter(requests), []
            with ThreadPoolExecutor(1) as pool:
                while request := pool.submit(next, requests, None).result():
                    waiting.append(request)
                    if len(waiting) == 5:
                        yield from super().sample([waiting.pop(0)])
                yield from super().sample(waiting)

    made = build(prompts(30), tmp_path / "a", teacher=Threaded("teacher"))
    assert rows(made) == rows(build(prompts(30), tmp_path / "b"))


def test_tools_make_another_prompt(tmp_path):
    log = tmp_path / "log"
    data = [
        {"prompt": "q", "tools": None},
        {"prompt": "q", "tools": '[{"name": "f"}]'},
        {"prompt": "q", "tools": None},
    ]
    made = build(Dataset.from_list(data), tmp_path / "a", teacher=Source("teacher", log))
    assert len(log.read_text().splitlines()) == 2
    assert made["tools"] == [None, '[{"name": "f"}]']


def test_columns_used_as_answers_go_and_reserved_names_get_a_prefix(tmp_path):
    data = Dataset.from_list(
        [
            {
                "prompt": "q",
                "t": "t",
                "s": ["a", "b"],
                "messages": "m",
                "teacher": 3,
                "source_teacher": 4,
                "source_row": 5,
                "id": 6,
            }
        ]
    )
    made = build(
        data, tmp_path, teacher=Column("t"), student=Column("s"), preference=TeacherWins(), num_student_samples=2
    )
    kept = {name: made[0][name] for name in made.column_names[made.column_names.index("source_row") :]}
    assert kept == {
        "source_row": 0,
        "source_messages": "m",
        "source_source_teacher": 3,
        "source_teacher": 4,
        "source_source_row": 5,
        "id": 6,
    }
    assert [row["rejected"] for row in made] == ["a", "b"]


def test_messages_keep_system_messages_and_tools(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    prompt = [
        system,
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "2"},
    ]
    other = [system, {"role": "user", "content": "2+2?"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    message = {
        "role": Value("string"),
        "content": Value("string"),
        "name": Value("string"),
        "tool_calls": List(Json()),
    }
    data = Dataset.from_list(
        [{"prompt": prompt, "tools": tools}, {"prompt": other, "tools": None}],
        features=Features({"prompt": List(message), "tools": List(Json())}),
    )
    seen = []

    class Asked(Source):
        def text(self, request, sample):
            seen.append(request)
            return super().text(request, sample)

    made = build(data, tmp_path, teacher=Asked("teacher"))
    assert made.features["prompt"] == data.features["prompt"]
    assert made[0]["prompt"] == data[0]["prompt"]
    assert made[0]["tools"] == tools
    assert made[0]["chosen"][0]["role"] == "assistant"
    assert set(made[0]["chosen"][0]) == {"role", "content"}
    first = next(request for request in seen if len(request.prompt) == 4)
    assert first.prompt[1] == {"role": "user", "content": "1+1?"}  # without the nulls that Arrow adds
    assert first.columns["tools"] == tools


def test_fields_of_an_answers_messages_are_kept(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"q{i}"}],
                "t": [call if i == 1100 else {"role": "assistant", "content": "x"}],
            }
            for i in range(1200)
        ]
    )
    made = build(data, tmp_path, teacher=Column("t"), preference=TeacherWins())
    assert made[1100]["chosen"] == [call]
    assert made[0]["chosen"] == [{"role": "assistant", "content": "x"}]


def test_features_come_through(tmp_path):
    features = Features(
        {
            "prompt": Value("string"),
            "kind": ClassLabel(names=["a", "b"]),
            "image": Image(),
            "when": Value("timestamp[ms]"),
        }
    )
    picture = Picture.new("RGB", (2, 2), (255, 0, 0))
    data = Dataset.from_list([{"prompt": "q", "kind": 1, "image": picture, "when": None}], features=features)
    made = build(data, tmp_path)
    assert made.features["kind"] == features["kind"]
    assert made.features["when"] == features["when"]
    assert made.features["source_image"] == features["image"]
    assert made[0]["source_image"].getpixel((0, 0)) == (255, 0, 0)


def stream(count, late=None):
    def generate():
        for i in range(count):
            yield {"prompt": f"question {i}", "note": late if i >= 1100 else None, "n": i}

    return IterableDataset.from_generator(generate)


def test_a_stream_equals_a_dataset(tmp_path):
    data = Dataset.from_list(list(stream(1200, "late")))
    made = build(stream(1200, "late"), tmp_path / "a")
    assert rows(made) == rows(build(data, tmp_path / "b"))
    assert made.features["note"] == Value("string")  # nulls alone in the first rows
    assert len(list((tmp_path / "a" / "data").iterdir())) == 2  # of which the first was rewritten


def test_a_stream_of_changing_types_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match=r"The column 'x' of the prompts has values of different types.*prompts\.cast_column"
    ):
        build(
            IterableDataset.from_generator(
                lambda: ({"prompt": str(i), "x": i if i < 1100 else [i]} for i in range(1200))
            ),
            tmp_path,
        )


def test_a_stream_that_changes_is_noticed(tmp_path):
    calls = []

    def generate():
        calls.append(None)
        for i in range(10):
            yield {"prompt": f"question {i} {random.random() if i == 7 else ''}"}

    with pytest.raises(ValueError, match="Row 7 of the prompts was another when the teacher was asked"):
        build(IterableDataset.from_generator(generate), tmp_path)


def test_pairwise_labels_are_asked_once_teacher_first(tmp_path):
    preference = Pairwise({"t": 3.0, "a": 1.0, "b": 3.0})
    data = Dataset.from_list([{"prompt": f"q{i}", "t": "t", "s": ["a", "b", "t", "?"]} for i in range(3)])
    options = {"teacher": Column("t"), "student": Column("s"), "preference": preference, "num_student_samples": 4}
    made = build(data, tmp_path, **options)
    assert [ask[1:] for ask in preference.asked[:3]] == [("t", "a"), ("t", "b"), ("t", "?")]
    assert len(preference.asked) == 9  # and no equal texts
    assert [(row["chosen"], row["rejected"], row["preference"]) for row in made][:4] == [
        ("t", "a", 0.75), ("t", "b", 0.5), ("t", "t", None), ("t", "?", None),
    ]  # fmt: skip
    build(data, tmp_path, **options)
    assert len(preference.asked) == 9  # nulls are answers too


def test_labels_hang_on_the_columns_that_the_preference_sees(tmp_path):
    class Right(ScoredPreference):
        def score(self, prompts, completions, answer, **columns):
            return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]

    data = Dataset.from_dict({"prompt": ["q", "q"], "answer": ["t", "a"], "t": ["t", "t"], "s": ["a", "b"]})
    made = build(data, tmp_path, teacher=Column("t"), student=Column("s"), preference=Right())
    assert [(row["chosen"], row["preference"]) for row in made] == [("t", 1.0), ("t", 0.5)]


def test_equal_answers_are_scored_once(tmp_path):
    class Same(Source):
        def text(self, request, sample):
            return "same"

    preference = Longer()
    build(prompts(3), tmp_path, student=Same("student"), num_student_samples=4, preference=preference)
    assert len(preference.asked) == len(set(preference.asked)) == 6


@pytest.mark.parametrize(
    ("values", "message"), [([2.0], "returned 2.0: it must return P"), ([], "returned 0 values for 1")]
)
def test_a_preference_that_is_none(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        build(prompts(1), tmp_path, preference=lambda prompts, first, second, **columns: values)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("as_stream", [False, True])
def test_pieces_equal_one_run(tmp_path, count, as_stream, monkeypatch):
    monkeypatch.setattr("trl_kd.pairs.merge._AT_ONCE", 7)
    data = [{"prompt": f"question {i % 90}", "level": i, "note": "late" if i > 60 else None} for i in range(120)]
    dataset = IterableDataset.from_generator(lambda: iter(data)) if as_stream else Dataset.from_list(data)
    options = {"num_student_samples": 2, "num_teacher_samples": 2, "policy": "all", "max_pairs_per_prompt": 3}
    whole = build(dataset, tmp_path / "whole", **options)
    pieces = [tmp_path / str(i) for i in range(count)]
    lengths = [len(build(dataset, piece, shard=(i, count), **options)) for i, piece in enumerate(pieces)]
    assert sum(lengths) == len(whole)
    assert all(lengths)
    merged = merge_shards(random.Random(0).sample(pieces, count), tmp_path / "merged")
    assert merged.features == whole.features
    assert rows(merged) == rows(whole)
    for name in ("summary.json", "settings.json", "README.md", "pairs.html"):
        assert (tmp_path / "merged" / name).read_text() == (tmp_path / "whole" / name).read_text(), name


def test_an_empty_piece(tmp_path):
    pieces = [tmp_path / str(i) for i in range(3)]
    lengths = [len(build(prompts(1), piece, shard=(i, 3))) for i, piece in enumerate(pieces)]
    assert sorted(lengths) == [0, 0, 1]
    assert rows(merge_shards(pieces, tmp_path / "merged")) == rows(build(prompts(1), tmp_path / "whole"))


def test_pieces_that_do_not_fit(tmp_path):
    for i in range(3):
        build(prompts(), tmp_path / str(i), shard=(i, 3))
    pieces = [tmp_path / str(i) for i in range(3)]
    build(prompts(), tmp_path / "other", shard=(2, 3), student=Source("student", temperature=2))
    build(prompts(), tmp_path / "whole")
    for folders, message in [
        ([], "nothing to merge"),
        (pieces[:2], r"Of the 3 pieces, 2 \(counted from 0\) are not named"),
        ([*pieces, pieces[0]], "are the same piece, 0 of 3"),
        ([*pieces[:2], tmp_path / "other"], "was built with other settings than .*: student"),
        ([tmp_path / "whole"], "is not a piece"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_shards(folders, tmp_path / "merged")
    with pytest.raises(ValueError, match="which is one of the pieces"):
        merge_shards(pieces, pieces[0])
    with pytest.raises(FileNotFoundError, match="holds no finished pairs"):
        merge_shards([*pieces[:2], tmp_path / "nothing"], tmp_path / "merged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_student_samples": 0}, "`num_student_samples` is 0"),
        ({"shard": (2, 2)}, r"`shard` is \(2, 2\): it must be \(i, n\) with 0 ≤ i < n"),
        ({"policy": "x"}, "`policy` is 'x'"),
    ],
)
def test_bad_options_leave_no_folder(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(prompts(), tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"question": "q"}], "The prompts have no column 'prompt': they have 'question'"),
        ([{"prompt": None}], "Row 0 of the prompts: `prompt` is 'None'"),
        ([{"prompt": "a"}, {"prompt": None}], "Row 1 of the prompts: `prompt` is 'None'"),
        ([{"prompt": [{"content": "no role"}]}], "Row 0 of the prompts: `prompt` is"),
        ([], "There are no prompts"),
    ],
)
def test_bad_prompts(tmp_path, data, message):
    data = Dataset.from_list(data) if data else Dataset.from_dict({"prompt": []})
    with pytest.raises(ValueError, match=message):
        build(data, tmp_path)


def test_progress_shows_each_step_and_the_cost(tmp_path, capsys):
    class Paid(Source):
        class usage:
            cost = 0.0123

    build(prompts(), tmp_path, teacher=Paid("teacher", delay=0.02), show_progress=True)
    shown = capsys.readouterr().err
    for name in ("teacher answers", "student answers", "labels of prompts", "prompts paired"):
        assert name in shown
    assert "cost so far 0.0123" in shown
    assert "12/12 answers" in shown
    assert "12/12 prompts" in shown


def test_bad_arguments_are_refused_before_anything_is_asked(tmp_path):
    with pytest.raises(ValueError, match="`label_batch_size` is 0"):
        build(prompts(2), tmp_path, label_batch_size=0)
    with pytest.raises(ValueError, match="`prompts` is a list"):
        build([{"prompt": "a"}], tmp_path)


def test_half_characters_in_messages_are_mended(tmp_path):
    class Odd(Source):
        def text(self, request, sample):
            return [{"role": "assistant", "content": "half \udc00"}]

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "hi"}]}])
    row = build(data, tmp_path, teacher=Odd("teacher"))[0]
    assert row[row["teacher_side"]][0]["content"] == "half \ufffd"
