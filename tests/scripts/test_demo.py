import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_kd.pairs import load_pairs
from trl_kd.scripts import demo, demo_experiment, demo_methods
from trl_kd.scripts.cli import main
from trl_kd.scripts.demo_experiment import DemoSettings
from trl_kd.scripts.demo_stage import check_settings, stage, write_json
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
    train_and_test = demo_experiment.Cell._train_and_test

    def run(stop_before=None):
        trained.append([])

        def counted(cell, trainer, stage_folder):
            if stage_folder.name == stop_before:
                raise KeyboardInterrupt
            trained[-1].append(stage_folder.name)
            return train_and_test(cell, trainer, stage_folder)

        patch.setattr(demo_experiment.Cell, "_train_and_test", counted)
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
    assert trained == [["teacher"], ["start", "seqkd", "dpo"], ["dpo_sft", "pbkd"], []]


def test_methods_have_the_same_start_and_number_of_updates(interrupted_then_finished):
    _, results, _ = interrupted_then_finished
    methods = [results[method] for method in demo_methods.METHODS]
    assert [method["steps"] for method in methods] == [TINY.steps] * 4
    curves = [[entry["exact_match"] for entry in m["log"] if "exact_match" in entry] for m in methods]
    assert len({curve[0] for curve in curves}) == 1
    assert all(len(curve) == 1 + TINY.steps // TINY.curve_every for curve in curves)
    assert len({tuple(method["answers"]) for method in methods}) > 1


def test_methods_learn_from_the_rows_they_should(interrupted_then_finished, task_file):
    folder, results, _ = interrupted_then_finished
    rows = load_pairs(folder / "size/seed0/pairs").to_list()
    counts = results["pairs"]
    assert (len(rows), counts["total"]) == (TINY.prompts, TINY.prompts)
    assert 0 < counts["strict"] < TINY.prompts

    recipe = partial(demo_methods.recipe, rows=rows, teacher=folder, task=load_task(task_file, {}))
    length = {"max_length": 128}
    seqkd = recipe("seqkd").data
    assert list(seqkd["completion"]) == [row[row["teacher_side"]] for row in rows]
    pbkd = recipe("pbkd")
    assert pbkd.data.to_list() == [
        {name: row[name] for name in ("prompt", "chosen", "rejected", "preference", "teacher_side")} for row in rows
    ]
    assert pbkd.settings == length
    right = [row[f"score_{row['teacher_side']}"] == 1 for row in rows]
    assert 0 < sum(right) < len(rows)
    assert len(recipe("seqkd_verified").data) == sum(right)
    verified = recipe("pbkd_verified").data.to_list()
    assert [row["teacher_side"] is not None for row in verified] == right
    assert [row["preference"] for row in verified] == [row["preference"] for row in rows]
    for method, extra in (("dpo", {}), ("dpo_sft", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]})):
        found = recipe(method)
        assert len(found.data) == counts["strict"]
        assert found.settings == length | extra


def test_white_box_adds_its_rows(interrupted_then_finished, task_file, tmp_path, capsys):
    finished, results, _ = interrupted_then_finished
    folder = shutil.copytree(finished, tmp_path / "demo")
    (more,) = demo.run(folder, tasks=[task_file], settings=TINY, white_box=True)["size"]
    assert {name: more[name] for name in results} == results
    added = [more[name] for name in demo.WHITE_BOX_NAMES]
    assert [method["steps"] for method in added] == [TINY.steps] * 4
    assert len({tuple(method["answers"]) for method in added}) > 1
    assert any("mmpbkd/violation" in entry for entry in more["mm_pbkd"]["log"])
    assert not any("mmpbkd/violation" in entry for entry in more["mm"]["log"])
    shown = capsys.readouterr().out + (folder / "report.html").read_text()
    assert all(shown.count(name) > 2 for name in demo.WHITE_BOX_NAMES.values())
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
    assert html.count("<polyline") == 5 + 4 + 2  # methods and teacher, losses, violation and dual
    for text in ("prompts", "transformers", "cores"):
        assert text in html


def test_training_goes_on_from_a_whole_checkpoint(task_file, tmp_path, monkeypatch):
    """Cut off between two checkpoints, a stage ends with the very result of an unbroken run."""
    monkeypatch.setattr(demo_experiment, "SAVE_STEPS", 4)
    settings = replace(TINY, pretraining_steps=8, teacher_accuracy=1.1)
    task = demo_experiment_task(task_file)

    def teacher(folder):
        return demo_experiment.Cell(task, 0, settings, folder)._teacher(folder / "teacher")

    expected = teacher(tmp_path / "unbroken")
    evaluate = demo_experiment.ExactMatchCallback.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt
        return evaluate(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(demo_experiment.ExactMatchCallback, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            teacher(tmp_path / "broken")
    model = tmp_path / "broken/teacher/size-teacher"
    assert [path.name for path in model.glob("checkpoint-*")] == ["checkpoint-4"]
    (model / "checkpoint-6").mkdir()  # begun and never finished: must be passed over
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--seeds", "x"], "'x' is not a whole number of at least 1"),
        (["--tasks", "additoin"], "no task 'additoin': the bundled tasks are running_sums, addition"),
        (["--seed", "1"], "unrecognized arguments"),
        (["--output_dir", __file__], "Not a directory"),
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
        return {key: {"sampled": value, "greedy": 1.0} for key in demo.NAMES}

    table = demo.text_table([result(0.5), result(0.7)])
    assert "60.0 ± 14.1 %" in table
    assert "100.0 ± 0.0 %" in table
    assert "of 2 seeds" in table


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
