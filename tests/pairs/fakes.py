"""Sources and preferences of a few lines, which import nothing heavy: tests start processes that use them."""

import hashlib
import multiprocessing
import os
import time

from trl_kd.preferences import ScoredPreference
from trl_kd.sampling import Answer


class Source:
    """Answers out of order, some at a time; every prompt that it is asked is a line in `log`, as a server would count it."""

    is_lookup = False

    def __init__(self, name, log=None, window=3, delay=0.0, fail_after=None, **settings):
        self.name, self.log, self.window, self.delay, self.fail_after = name, log, window, delay, fail_after
        self.settings = settings
        self.given = 0
        self.closed = 0

    def describe(self):
        return {"name": self.name, **self.settings}

    def text(self, request, sample):
        digest = hashlib.sha256(f"{self.name}/{request.key}/{sample}".encode()).hexdigest()
        return f"{self.name} says {digest[: 1 + int(digest[0], 16) % 4]}"

    def sample(self, requests):
        waiting = []
        for request in requests:
            waiting += [(request, sample) for sample in request.samples]
            if len(waiting) >= self.window:
                yield from self._answer(waiting)
                waiting = []
        yield from self._answer(waiting)

    def _answer(self, waiting):
        if self.log and waiting:
            # One line an ask, written at once: what was asked counts even if the process dies
            lines = "".join(f"{self.name} {request.key} {sample}\n" for request, sample in waiting)
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, lines.encode())
            os.close(descriptor)
        for request, sample in reversed(waiting):
            if self.delay:
                time.sleep(self.delay)
            if self.fail_after is not None and self.given >= self.fail_after:
                raise ConnectionError("the server is down")
            self.given += 1
            yield request, sample, Answer(self.text(request, sample), "stop", 3)

    def close(self):
        self.closed += 1


class Column:
    is_lookup = True

    def __init__(self, column):
        self.column = column

    def describe(self):
        return {"column": self.column}

    def sample(self, requests):
        for request in requests:
            value = request.columns[self.column]
            texts = value if isinstance(value, list) and not isinstance(value[0], dict) else [value]
            for sample in request.samples:
                yield request, sample, Answer(texts[sample] if sample < len(texts) else None)


class Longer(ScoredPreference):
    """A score of its own for each answer: its length. Counts what it was asked."""

    def __init__(self, log=None, scale=None, delay=0.0):
        super().__init__(scale)
        self.log, self.delay = log, delay
        self.asked = []

    def describe(self):
        return {"prefers": "longer", "scale": self.scale}

    def score(self, prompts, completions, **columns):
        if self.delay:
            time.sleep(self.delay)
        if self.log:
            with open(self.log, "a") as file:
                file.writelines(f"score {prompt} {text}\n" for prompt, text in zip(prompts, completions, strict=True))
        self.asked += list(zip(prompts, completions, strict=True))
        return [float(len(content(text))) for text in completions]


class Pairwise:
    """P(first ≻ second) from a table of strengths by text; unknown texts are null."""

    def __init__(self, strengths):
        self.strengths = strengths
        self.asked = []

    def describe(self):
        return {"strengths": "given"}

    def __call__(self, prompts, first, second, **columns):
        self.asked += list(zip(prompts, first, second, strict=True))
        return [self._probability(content(a), content(b)) for a, b in zip(first, second, strict=True)]

    def _probability(self, a, b):
        known = {a, b} <= set(self.strengths)
        return self.strengths[a] / (self.strengths[a] + self.strengths[b]) if known else None


def content(text):
    return text if isinstance(text, str) else text[-1]["content"]


def processes():
    """Starts processes by forking one that has imported everything, or imports would take most of a test's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.pairs.test_resume", "tests.pairs.test_store"])
    return context
