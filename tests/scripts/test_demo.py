import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_kd.demo import experiment, methods, table
from trl_kd.demo.experiment import DemoSettings
from trl_kd.demo.stage import check_settings, stage, write_json
from trl_kd.pairs import load_pairs
from trl_kd.pairs.lock import lock_folder
from trl_kd.scripts import demo
from trl_kd.scripts.cli import main
from trl_kd.tasks import load_task


# A question that even a tiny model gets right now and then, with characters that a page has to escape
TASK = """
from trl_kd.tasks import Question, Task

def generate(rng):
    number = rng.randrange(100_000)
    return Question(f"{number}?", "<b>" if number % 10 > 4 else "e")

TASK = Task("size", "Says <b> where the last digit is above 4, else e.", generate, "0123456789?<b>e", 4)
"""

TINY = DemoSettings(
    prompts=64,
    steps=12,
    batch_size=8,
    teacher_accuracy=0.6,
    start_accuracy=0.2,
    teacher_size=(16, 1),
    student_size=(16, 1),
    pretraining_questions=300,
    pretraining_steps=120,
    pretraining_learning_rate=1e-2,
    test_questions=20,
    test_samples=2,
    curve_questions=20,
    curve_every=4,
    learning_rate=1e-2,
    learning_rates={"dpo": 3e-2},
)


@pytest.fixture(scope="module")
def task_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "size.py"
    path.write_text(TASK)
    return f"{path}:TASK"


@pytest.fixture(scope="module")
def interrupted_then_finished(task_file, tmp_path_factory):
    """The demo cut off in the middle of a stage, twice, and run to its end; with what was trained in each run."""
    folder = tmp_path_factory.mktemp("demo")
    trained: list[list[str]] = []
    patch = pytest.MonkeyPatch()
    train_and_test = experiment.Cell._train_and_test

    def run(stop_before=None):
        trained.append([])

        def counted(cell, trainer, stage_folder):
            if stage_folder.name == stop_before:
                raise KeyboardInterrupt
            trained[-1].append(stage_folder.name)
            return train_and_test(cell, trainer, stage_folder)

        patch.setattr(experiment.Cell, "_train_and_test", counted)
        return demo.run(folder, tasks=[task_file], settings=TINY)

    for stop in ("start", "dpo_sft"):
        with pytest.raises(KeyboardInterrupt):
            run(stop)
    results = run()
    finished = run()
    patch.undo()
    assert finished == results
    return folder, results["size"][0], trained


def test_goes_on_where_it_stopped(interrupted_then_finished):
    _, _, trained = interrupted_then_finished
    clean, wrong = ["seqkd", "seqkd_dft", "sft_chosen", "dpo"], ["sft_chosen", "dpo_sft", "pbkd"]
    assert trained == [["teacher"], ["start", *clean], ["dpo_sft", "pbkd", *wrong], []]


def test_methods_have_the_same_start_and_number_of_updates(interrupted_then_finished):
    _, results, _ = interrupted_then_finished
    found = [results[method] for method in methods.METHODS]
    found += [results[method]["flipped"] for method in methods.FLIPPED]
    assert [method["steps"] for method in found] == [TINY.steps] * 9
    curves = [[entry["exact_match"] for entry in m["log"] if "exact_match" in entry] for m in found]
    assert len({curve[0] for curve in curves}) == 1
    assert all(len(curve) == 1 + TINY.steps // TINY.curve_every for curve in curves)
    assert len({tuple(method["answers"]) for method in found}) > 1


def test_methods_learn_from_the_rows_they_should(interrupted_then_finished, task_file):
    folder, results, _ = interrupted_then_finished
    rows = load_pairs(folder / "size/seed0/pairs").to_list()
    counts = results["pairs"]
    assert (len(rows), counts["total"]) == (TINY.prompts, TINY.prompts)
    assert 0 < counts["strict"] < TINY.prompts

    recipe = partial(methods.recipe, rows=rows, teacher=folder, task=load_task(task_file, {}))
    length = {"max_length": 128}
    seqkd = recipe("seqkd").data
    assert list(seqkd["completion"]) == [row[row["teacher_side"]] for row in rows]
    assert recipe("seqkd_dft").data.to_list() == seqkd.to_list()
    assert recipe("seqkd_dft").settings == length | {"loss_type": "dft"}
    pbkd = recipe("pbkd")
    assert pbkd.data.to_list() == [
        {name: row[name] for name in ("prompt", "chosen", "rejected", "preference", "teacher_side")} for row in rows
    ]
    assert pbkd.settings == length
    right = [row[f"score_{row['teacher_side']}"] == 1 for row in rows]
    assert 0 < sum(right) < len(rows)
    assert len(recipe("seqkd_verified").data) == sum(right)
    verified = recipe("pbkd_verified")
    assert verified.settings["imitation_min_score"] == 1
    assert [row[f"score_{row['teacher_side']}"] == 1 for row in verified.data] == right
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows if row["preference"] == 1]
    assert recipe("sft_chosen").data.to_list() == chosen
    for method, extra in (
        ("dpo", {"beta": 5.0}),
        ("dpo_sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    ):
        found = recipe(method)
        assert len(found.data) == counts["strict"]
        assert found.settings == length | extra


def test_flipped_labels_change_sides_and_no_texts(interrupted_then_finished, task_file):
    folder, results, _ = interrupted_then_finished
    rows = load_pairs(folder / "size/seed0/pairs").to_list()
    wrong = methods.flip_labels(rows, 0.2, seed=0)
    changed = [index for index, (old, new) in enumerate(zip(rows, wrong, strict=True)) if old != new]
    strict = [index for index, row in enumerate(rows) if row["preference"] == 1]
    assert set(changed) < set(strict)
    assert len(changed) == round(0.2 * len(strict)) > 0
    assert all(wrong[index] == rows[index] | {"preference": 0.0} for index in changed)
    assert wrong == methods.flip_labels(rows, 0.2, seed=0) != methods.flip_labels(rows, 0.2, seed=1)

    task = load_task(task_file, {})
    dpo = methods.recipe("dpo", wrong, folder, task).data
    assert len(dpo) == len(strict)
    for index, pair in zip(strict, dpo, strict=True):
        texts = [rows[index]["chosen"], rows[index]["rejected"]]
        assert [pair["chosen"], pair["rejected"]] == (texts[::-1] if index in changed else texts)
    cell = experiment.Cell(task, 0, TINY, folder / "size/seed0", flipped=True)
    assert cell.rows() == wrong
    assert any(results[method]["answers"] != results[method]["flipped"]["answers"] for method in methods.FLIPPED)


def test_measures_at_the_temperature_that_validation_questions_choose(
    interrupted_then_finished, task_file, monkeypatch
):
    """And validation cells are measured on questions that chose nothing."""
    folder, _, _ = interrupted_then_finished
    asked = []

    def counted(model, tokenizer, questions, scorer, longest, samples=1, seed=0, temperature=1.0):
        asked.append((tuple(questions["prompt"]), samples, temperature))
        return experiment.Accuracy.of([0.5 - (temperature - 0.7) ** 2]), [""]

    monkeypatch.setattr(experiment, "exact_match", counted)
    for split in ("test", "validation"):
        cell = experiment.Cell(load_task(task_file, {}), 0, TINY, folder / "size/seed0", split=split)
        found = cell._test(*experiment.load(cell.model_folder("start")))
        assert found["temperature"] == 0.7
        assert found["best"] == 0.5 > found["sampled"] == found["greedy"]
        chose, measured = {prompt for prompt, *_ in asked[:4]}, {prompt for prompt, *_ in asked[4:]}
        assert [temperature for *_, temperature in asked] == [*TINY.temperatures, 1.0, 0.7, 1.0]
        assert [samples for _, samples, _ in asked] == [TINY.test_samples] * 6 + [0]
        assert len(chose) == len(measured) == 1
        assert len(measured.pop()) == TINY.test_questions
        assert not set(asked[0][0]) & set(asked[4][0])
        asked.clear()


def test_white_box_adds_its_rows(interrupted_then_finished, task_file, tmp_path, capsys):
    finished, results, _ = interrupted_then_finished
    folder = shutil.copytree(finished, tmp_path / "demo")
    (more,) = demo.run(folder, tasks=[task_file], settings=TINY, white_box=True)["size"]
    assert {name: more[name] for name in results} == results
    added = [more[name] for name in table.WHITE_BOX_NAMES]
    assert [method["steps"] for method in added] == [TINY.steps] * 4
    assert len({tuple(method["answers"]) for method in added}) > 1
    assert any("mmpbkd/violation" in entry for entry in more["mm_pbkd"]["log"])
    assert not any("mmpbkd/violation" in entry for entry in more["mm"]["log"])
    shown = capsys.readouterr().out + (folder / "report.html").read_text()
    assert all(shown.count(name) > 2 for name in table.WHITE_BOX_NAMES.values())
    assert "MM-PbKD" in (folder / "size/seed0/mm_pbkd/size-mm-pbkd/README.md").read_text()


def test_student_folder_loads_and_has_an_honest_card(interrupted_then_finished):
    folder, results, _ = interrupted_then_finished
    student = folder / "size/seed0/pbkd/size-pbkd"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    ids = tokenizer("12345?", return_tensors="pt")
    assert tokenizer.decode(model.generate(**ids, max_new_tokens=4)[0], skip_special_tokens=True).startswith("12345?")
    card = (student / "README.md").read_text()
    for text in ("A toy made by `trl-kd demo`", "size-start", "2505.18952", f"{results['pbkd']['sampled']:.6g}"):
        assert text in card
    for name in ("this model", "its start", "its teacher"):
        assert f"sampled exact match of {name} on 20 unseen questions" in card
    assert "time machine" not in card
    assert not list(student.glob("checkpoint-*"))


def test_page_shows_what_was_found(interrupted_then_finished):
    folder, results, _ = interrupted_then_finished
    html = (folder / "report.html").read_text()
    assert "<b>" not in html
    assert f"{100 * results['pbkd']['sampled']:.1f} %" in html
    assert html.count('class="sample"') == 10
    assert html.count("<polyline") == 7 + 6 + 2  # methods and teacher, losses, PbKD's loss and NLL
    for text in ("prompts", "transformers", "cores"):
        assert text in html


@pytest.mark.parametrize("at_the_end", [False, True])
def test_training_goes_on_from_a_whole_checkpoint(task_file, tmp_path, monkeypatch, at_the_end):
    """Cut off between two checkpoints, or after the last, a stage ends with the very result of an unbroken run."""
    monkeypatch.setattr(experiment, "SAVE_STEPS", 4)
    settings = replace(TINY, pretraining_steps=8, teacher_accuracy=1.1)
    task = demo_experiment_task(task_file)

    def teacher(folder):
        return experiment.Cell(task, 0, settings, folder)._teacher(folder / "teacher")

    expected = teacher(tmp_path / "unbroken")
    evaluate = experiment.ExactMatchCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt
        return evaluate(self, args, state, control, **kwargs)

    def test(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at_the_end:
            patch.setattr(experiment.Cell, "_test", test)
        else:
            patch.setattr(experiment.ExactMatchCallback, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teacher(tmp_path / "broken")
    model = tmp_path / "broken/teacher/size-teacher"
    assert [path.name for path in model.glob("checkpoint-*")] == [f"checkpoint-{8 if at_the_end else 4}"]
    (model / "checkpoint-10").mkdir()  # begun and never finished: must be passed over
    found = teacher(tmp_path / "broken")
    for key in ("sampled", "greedy", "answers", "steps"):
        assert found[key] == expected[key]
    curves = [[e for e in result["log"] if "exact_match" in e or "loss" in e] for result in (found, expected)]
    assert [e.get("loss", e.get("exact_match")) for e in curves[0]] == [
        e.get("loss", e.get("exact_match")) for e in curves[1]
    ]


def demo_experiment_task(name):
    from trl_kd.tasks import TASKS, load_task

    return load_task(name, TASKS)


def test_changed_settings_are_not_mixed(interrupted_then_finished, task_file, capsys):
    folder, _, _ = interrupted_then_finished
    assert main(["demo", "--output_dir", str(folder), "--tasks", task_file]) == 2
    error = capsys.readouterr().err
    assert "steps was 12 and is now 600" in error
    assert "choose another --output_dir, or delete that folder" in error
    assert "Traceback" not in error


def test_a_second_demo_in_one_folder_is_refused(task_file, tmp_path, capsys):
    with lock_folder(tmp_path):
        assert main(["demo", "--tasks", task_file, "--output_dir", str(tmp_path)]) == 2
    assert "is being written by process" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--seeds", "x"], "'x' is not a whole number of at least 1"),
        (["--tasks", "additoin"], "no task 'additoin': the bundled tasks are running_sums, addition"),
        (["--seed", "1"], "unrecognized arguments"),
        (["--output_dir", __file__], "is a file: choose another folder"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from trl_kd.scripts.cli import main; main(['demo', '--help']); sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--seeds" in result.stdout


def test_several_seeds_give_mean_and_spread():
    def result(value):
        own = {key: {"sampled": value, "best": 0.9, "greedy": 1.0} for key in table.NAMES}
        own["pbkd"]["flipped"] = {"sampled": value / 2}
        return own

    text = table.text_table([result(0.5), result(0.7)])
    assert "60.0 ± 14.1 %" in text
    assert "100.0 ± 0.0 %" in text
    assert "of 2 seeds" in text
    last = {line.split("  ")[1]: line.split("  ")[-1].strip() for line in text.splitlines()}
    assert last["PbKD (ours)"] == "30.0 ± 7.1 %"
    assert last["SeqKD with dft"] == "60.0 ± 14.1 %"
    assert last["Teacher"] == last["DPO"] == "–"


class TestStage:
    def test_counts_only_when_its_marker_is_written(self, tmp_path):
        def fails(folder):
            (folder / "file").write_text("half")
            raise RuntimeError

        with pytest.raises(RuntimeError):
            stage(tmp_path / "a", fails)
        assert stage(tmp_path / "a", lambda folder: {"x": (folder / "file").read_text()}) == {"x": "half"}
        assert stage(tmp_path / "a", fails) == {"x": "half"}

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        write_json(tmp_path / "x.json", {"a": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "x.json", {"a": object()})
        assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}

    def test_settings(self, tmp_path):
        check_settings(tmp_path, {"size": (1, 2), "steps": 3})
        check_settings(tmp_path, {"steps": 3, "size": (1, 2)})
        with pytest.raises(ValueError, match="steps was 3 and is now 4; width was None and is now 5"):
            check_settings(tmp_path, {"size": (1, 2), "steps": 4, "width": 5})
