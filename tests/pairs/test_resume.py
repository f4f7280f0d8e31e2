"""Nothing lost and nothing asked twice: exceptions, `kill -9`, changed settings."""

import hashlib
import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import closing

import pytest
from datasets import Dataset

from tests.pairs.fakes import Longer, Source, processes
from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import StoreError, build_pairs, load_pairs
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences.judge import LLMJudge
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler


pytest.importorskip("openai", reason="needs the extra `api`")

WINDOW, LABELS, AT_ONCE = 3, 4, 2
PROMPTS = Dataset.from_dict({"prompt": [f"question {i % 20}" for i in range(24)]})
FEW_PROMPTS = Dataset.from_dict({"prompt": [f"question {i % 14}" for i in range(16)]})


def build(folder, log, delay=0.0, prompts=PROMPTS, **options):
    parts = {
        "teacher": Source("teacher", log, WINDOW, delay),
        "student": Source("student", log, WINDOW, delay),
        "preference": Longer(log, delay=delay),
        "num_student_samples": 2,
        "policy": "all",
        "label_batch_size": LABELS,
        "show_progress": False,
    }
    return build_pairs(prompts, output_dir=folder, **{**parts, **options})


def asks(log):
    return Counter(log.read_text().splitlines())


def replies(body, number):
    """What a server says depends on what it is asked alone; it ignores `n`, and takes a moment."""
    content = body["messages"][-1]["content"]
    digest = hashlib.sha256(f"{body['model']}/{content}/{body['seed']}".encode()).hexdigest()
    reply = chat(f"Verdict: {'ABC'[int(digest, 16) % 3]}" if body["model"] == "judge" else digest[:4])
    reply.delay = 0.002
    return reply


def build_by_server(folder, url):
    """Teacher, student and judge, all three behind a server."""

    def client():
        return ServerClient(url, max_concurrency=AT_ONCE)

    sources = {name: ServerSampler(name, client()) for name in ("teacher", "student")}
    judge = LLMJudge("judge", client(), template="{prompt}|{first}|{second}", both_orders=False, logprobs=False)
    return build(folder, None, prompts=FEW_PROMPTS, **sources, preference=judge)


def server_asks(server):
    """How often the server was asked for each answer and verdict, by its own count."""
    return Counter((body["model"], body["messages"][-1]["content"], body["seed"]) for body in server.bodies)


def test_kill_9_at_20_points(tmp_path):
    with FaultServer(replies) as server:
        whole = build_by_server(tmp_path / "whole", server.url).to_list()
    minimum = server_asks(server)
    assert set(minimum.values()) == {1}
    context = processes()
    rng = random.Random(0)
    asked_again = 0
    for folder in (tmp_path / str(i) for i in range(5)):
        with FaultServer(replies) as server:
            for number in range(4):
                process = context.Process(target=build_by_server, args=(folder, server.url))
                process.start()
                point = minimum.total() * (number + rng.random()) / 4
                while process.exitcode is None and server.count < point:
                    time.sleep(0.001)
                time.sleep(0.004 * rng.random())
                process.kill()
                process.join()
                assert process.exitcode == -9
            assert build_by_server(folder, server.url).to_list() == whole
        # What was under way when it died, and no more: `AT_ONCE` requests, and as many whose answers are handed over
        again = server_asks(server) - minimum
        assert set(again) <= set(minimum)
        assert again.total() <= 4 * 2 * AT_ONCE
        asked_again += again.total()
    assert asked_again > 0


def several(body, number):
    """A server that honours `n`: its choices depend on the seed of the request, and on their place."""
    content = body["messages"][-1]["content"]
    return chat(*(f"{content} {body['seed']} {place}" for place in range(body.get("n", 1))))


def build_in_several(folder, url):
    return build(folder, None, student=ServerSampler("student", ServerClient(url, max_concurrency=AT_ONCE)))


def build_until_a_second_choice(folder, url):
    """Is killed, as by `kill -9`, while the second choice of a reply is on its way into the database."""
    opened = AnswerStore._open

    def deadly(store):
        opened(store)
        store._connection.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
        store._connection.execute(
            "CREATE TEMP TRIGGER deadly BEFORE INSERT ON answers WHEN NEW.source = 'student' AND NEW.sample = 1 "
            "BEGIN SELECT die(); END"
        )

    AnswerStore._open = deadly
    build_in_several(folder, url)


def test_kill_9_between_two_choices_of_one_reply(tmp_path):
    with FaultServer(several) as server:
        whole = build_in_several(tmp_path / "whole", server.url).to_list()
        asked = Counter(body["seed"] for body in server.bodies)
        process = processes().Process(target=build_until_a_second_choice, args=(tmp_path / "a", server.url))
        process.start()
        process.join()
        assert process.exitcode == -9
        assert build_in_several(tmp_path / "a", server.url).to_list() == whole
        assert {body["seed"] for body in server.bodies} == set(asked)  # no answer by another seed


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_an_exception_keeps_what_came(tmp_path, source):
    whole = build(tmp_path / "whole", tmp_path / "whole.log").to_list()
    log = tmp_path / "log"
    failing = Source(source, log, window=5, fail_after=13)
    with pytest.raises(ConnectionError, match="the server is down"):
        build(tmp_path / "a", log, **{source: failing})
    with pytest.raises(FileNotFoundError, match="run the same command again"):
        load_pairs(tmp_path / "a")
    assert build(tmp_path / "a", log).to_list() == whole
    again = asks(log) - asks(tmp_path / "whole.log")
    assert 0 < again.total() <= 5


def test_a_source_that_ends_early_is_an_error(tmp_path):
    class Lazy(Source):
        def sample(self, requests):
            for number, answer in enumerate(super().sample(requests)):
                if number < 4:
                    yield answer

    with pytest.raises(RuntimeError, match="The teacher ended without 16 of the answers"):
        build(tmp_path, None, teacher=Lazy("teacher"))
    made = build(tmp_path, tmp_path / "log")
    assert sum(line.startswith("teacher") for line in asks(tmp_path / "log")) == 16
    assert made.to_list() == build(tmp_path, None).to_list()


def test_an_exception_of_the_preference_keeps_labels(tmp_path):
    class Fails(Longer):
        def score(self, prompts, completions, **columns):
            if len(self.asked) >= 20:
                raise TimeoutError("the judge is away")
            return super().score(prompts, completions, **columns)

    log = tmp_path / "log"
    with pytest.raises(TimeoutError):
        build(tmp_path / "a", log, preference=Fails(log))
    build(tmp_path / "a", log)
    assert max(asks(log).values()) == 1


def test_a_changed_source_is_refused_and_the_dataset_stays(tmp_path):
    made = build(tmp_path, None).to_list()
    with pytest.raises(
        ValueError, match=r"another student.*another `output_dir`.*differs: `student.temperature` was None and is 2"
    ):
        build(tmp_path, None, student=Source("student", temperature=2))
    assert load_pairs(tmp_path).to_list() == made


def test_a_changed_preference_needs_relabel(tmp_path):
    log = tmp_path / "log"
    build(tmp_path / "a", log)
    soft = Longer(scale=1.0)
    with pytest.raises(
        ValueError, match=r"another preference.*`relabel=True`.*differs: `preference.scale` was None and is 1.0"
    ):
        build(tmp_path / "a", log, preference=soft)
    before = log.read_text()
    made = build(tmp_path / "a", log, preference=soft, relabel=True)
    assert log.read_text() == before
    assert any(row["preference"] not in (None, 0.5, 1.0) for row in made)
    assert build(tmp_path / "a", log, preference=soft).to_list() == made.to_list()


def test_so_does_one_after_labels_that_nobody_stores(tmp_path):
    """The teacher always wins: such labels are made anew each time, and only the pairs tell that they were."""
    log = tmp_path / "log"
    made = build(tmp_path / "a", log, preference=TeacherWins())
    before = log.read_text()
    refused = r"another preference.*`relabel=True`.*differs: `preference.preference` was 'teacher_wins' and is None"
    with pytest.raises(ValueError, match=refused):
        build(tmp_path / "a", log)
    settings = json.loads((tmp_path / "a/settings.json").read_text()) | {"preference": Longer().describe()}
    with closing(StoredAnswers(tmp_path / "a")) as stored, pytest.raises(ValueError, match=refused):
        stored.check_settings(settings)  # as a dry run does
    assert load_pairs(tmp_path / "a").to_list() == made.to_list()
    assert log.read_text() == before
    longer = build(tmp_path / "a", log, relabel=True).to_list()
    assert longer != made.to_list()
    assert build(tmp_path / "a", log).to_list() == longer
    with pytest.raises(ValueError, match="another preference"):
        build(tmp_path / "a", log, preference=TeacherWins())
    build(tmp_path / "a", log, preference=TeacherWins(), relabel=True)
    asked = log.read_text().removeprefix(before).splitlines()
    assert all(line.startswith("score ") for line in asked)  # no answer anew


def test_before_any_pair_is_written_the_preference_may_change(tmp_path):
    with pytest.raises(ConnectionError):
        build(tmp_path / "a", None, preference=TeacherWins(), student=Source("student", fail_after=3))
    build(tmp_path / "a", None)


def test_the_dataset_before_stays_until_the_next_is_whole(tmp_path):
    made = build(tmp_path, None).to_list()

    class Breaks(Longer):
        def prefer(self, first, second):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, None, preference=Breaks())
    assert load_pairs(tmp_path).to_list() == made
    assert not (tmp_path / "data.building").exists()


def test_a_folder_in_use_is_refused(tmp_path):
    def other():
        with pytest.raises(StoreError, match="is being written by process"):
            build(tmp_path, None)
        return "said"

    said = []

    class Meanwhile(Source):
        def text(self, request, sample):
            if not said:
                said.append(other())
            return super().text(request, sample)

    build(tmp_path, None, teacher=Meanwhile("teacher"))
    assert said
