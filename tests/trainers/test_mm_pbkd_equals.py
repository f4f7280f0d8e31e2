"""At its special settings `MMPbKDTrainer` equals TRL's trainer, and with Q an independent float64 loop, step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

from tests.conftest import make_tokenizer
from trl_kd import MMPbKDConfig, MMPbKDTrainer


STEPS = 4
EOS = 1
SGD = {"optim": "sgd", "learning_rate": 0.1}
"""Adam would divide by the gradients' size, and make a step of their rounding where they are small."""
ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(8)]
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 17)} for a in range(4) for b in range(6)
]


@pytest.fixture
def settings(settings):
    return settings | {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 5,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }


def double(folder: str):
    """The student or teacher in float64, where rounding hides nothing."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def train(trainer) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def same(found, expected, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=0, abs=max(tolerance, 1e-12))
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=tolerance, msg=name)


class GivenCompletions(DistillationTrainer):
    """TRL's trainer on the teacher's states, for which it has no path of its own."""

    completions: dict[tuple, list[int]]

    def _generate(self, prompts):
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        return prompt_ids, [self.completions[tuple(ids)] for ids in prompt_ids], None, None, []


@pytest.mark.parametrize("beta", [1.0, 0.0, 0.4])
@pytest.mark.parametrize("without_q", [{"moment_coef": 0.0}, {"q_learning_rate": 0.0}], ids=["no Q", "Q is zero"])
def test_on_policy_without_q_is_distillation(tiny_dir, teacher_dir, settings, beta, without_q):
    settings |= SGD
    common = {"model": tiny_dir, "teacher_model": teacher_dir, "train_dataset": Dataset.from_list(ROWS)}
    expected = train(DistillationTrainer(args=DistillationConfig(**settings, beta=beta), **common))
    found = train(MMPbKDTrainer(args=MMPbKDConfig(**settings, beta=beta, **without_q), **common))
    same(found, expected, 2e-6)


def test_it_is_distillation_in_bf16_as_well(tiny_dir, teacher_dir, settings):
    """`bf16` leaves weights in their dtype, and neither TRL's trainer nor this one runs autocast in what it learns from."""
    settings |= SGD | {"bf16": True, "max_steps": 3}
    common = {"model": tiny_dir, "teacher_model": teacher_dir, "train_dataset": Dataset.from_list(ROWS)}
    expected = train(DistillationTrainer(args=DistillationConfig(**settings), **common))
    for without_q in ({"moment_coef": 0.0}, {"q_learning_rate": 0.0}):
        same(train(MMPbKDTrainer(args=MMPbKDConfig(**settings, **without_q), **common)), expected, 2e-6)


def test_a_teacher_that_is_the_student_has_nothing_to_teach_in_bf16(tiny_dir, settings):
    args = MMPbKDConfig(**settings | {"bf16": True}, lmbda=0.5, q_warmup_steps=0)
    trainer = MMPbKDTrainer(tiny_dir, tiny_dir, args, Dataset.from_list(ROWS))
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["mmpbkd/kl"] == first["grad_norm"] == 0


def test_off_policy_without_q_is_forward_kl(tiny_dir, teacher_dir, settings):
    settings |= SGD
    tokenizer = make_tokenizer()
    common = {"model": tiny_dir, "teacher_model": teacher_dir, "train_dataset": Dataset.from_list(ROWS)}
    theirs = GivenCompletions(args=DistillationConfig(**settings, beta=0.0), **common)
    theirs.completions = {
        tuple(tokenizer(row["prompt"])["input_ids"]): tokenizer(row["completion"])["input_ids"]
        + [tokenizer.eos_token_id]
        for row in ROWS
    }
    expected = train(theirs)
    found = train(MMPbKDTrainer(args=MMPbKDConfig(**settings, lmbda=0.0, moment_coef=0.0), **common))
    same(found, expected, 2e-6)


# ---- With Q --------------------------------------------------------------------------------------------------------------


class Reference:
    """
    The alternating updates, in float64 and plain torch: whole logits, a loop over tokens, `torch.optim`'s Adam by hand.
    Only the rows of each batch are taken from the trainer.
    """

    def __init__(self, student, teacher, trainer, args):
        self.student, self.teacher, self.args = student, teacher, args
        self.weights = dict(student.named_parameters())
        adversary = trainer.adversary
        self.outputs = adversary.q.outputs.detach().clone()  # [K, E, H + 1], zeros
        embedding = student.get_output_embeddings().weight.detach()
        inputs = embedding.shape[1] + 1
        self.scale = 1 / (embedding.square().mean().sqrt().item() * math.sqrt(embedding.shape[1] * inputs))
        self.rate = args.q_learning_rate / math.sqrt(embedding.shape[1] * inputs)
        self.dual = args.dual_init
        self.moments = [[torch.zeros_like(w), torch.zeros_like(w)] for w in self.weights.values()]
        self.q_moments = [torch.zeros_like(self.outputs), torch.zeros_like(self.outputs)]
        self.step_number = 0
        self.losses = []
        self.advantages, self.mean_advantage = {}, 1.0  # of prompts, of which each has one completion

    def q(self, k, hidden, outputs):
        """[V] of one state."""
        x = hidden.detach()
        x = torch.cat([x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt(), torch.ones(1, dtype=x.dtype)])
        g = outputs[k] @ x * self.scale
        embedding = self.student.get_output_embeddings().weight.detach()
        return self.args.q_bound * torch.tanh(embedding @ g / self.args.q_bound)

    def states(self, prompt, completion):
        """Student's hidden state, π, μ and the word taken, at each token of a completion."""
        ids = torch.tensor([prompt + completion])
        ours = self.student(ids, output_hidden_states=True)
        theirs = self.teacher(ids).logits[0]
        for t, word in enumerate(completion):
            at = len(prompt) + t - 1
            log_pi = F.log_softmax(ours.logits[0, at] / self.args.temperature, -1)
            log_mu = F.log_softmax(theirs[at] / self.args.temperature, -1).detach()
            yield ours.hidden_states[-1][0, at], log_pi, log_mu, word

    def student_terms(self, rows, outputs):
        """The student's loss and the adversary's moment, over the rows `(prompt, completion, on_policy)` of one step."""
        args, loss, moment = self.args, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for on_policy in (True, False):
            source = [row for row in rows if row[2] == on_policy]
            tokens = sum(len(row[1]) for row in source)
            for prompt, completion, _ in source:
                terms = []
                for hidden, log_pi, log_mu, word in self.states(prompt, completion):
                    pi, mu = log_pi.exp(), log_mu.exp()
                    q = self.q(0, hidden, outputs)
                    kl = (pi * (log_pi - log_mu)).sum() if on_policy else (mu * (log_mu - log_pi)).sum()
                    gap = ((mu - pi) * q.detach()).sum()
                    moment = moment + ((mu - pi.detach()) * q).sum() / len(rows)
                    terms.append((args.kl_coef * kl + args.moment_coef * gap, log_pi[word]))
                share = len(source) / len(rows)
                weight = share / tokens
                imitated = sum(len(row[1]) for row in source if self.advantages.get(tuple(row[0]), 1.0) > 0)
                for t, (cost, logp) in enumerate(terms):
                    loss = loss + weight * cost
                    if on_policy and args.state_gradient:
                        later = sum((c.detach() for c, _ in terms[t + 1 :]), torch.zeros((), dtype=torch.float64))
                        loss = loss + weight * (logp - logp.detach()) * later
                    if args.imitation_weight and not on_policy and imitated:
                        a = self.advantages.get(tuple(prompt), 1.0) / (self.mean_advantage * imitated)
                        loss = loss + share * args.imitation_weight * a * self.token_loss(completion[t], logp)
        return loss, moment

    def token_loss(self, word, logp):
        """ℓ_q, with q rising over the first half of the steps, but −log π of the end token."""
        q = self.args.imitation_q * min(1.0, (self.step_number - 1) / STEPS / 0.5)
        return -logp if q == 0 or word == EOS else (1 - logp.exp() ** q) / q

    def nll(self, k, pairs, outputs, baseline):
        """Mean negative log-likelihood of pairs `(prompt, chosen, rejected, p)` under the reward that Q number k induces."""
        total = torch.zeros((), dtype=torch.float64)
        for prompt, *responses, p in pairs:
            rewards = []
            for response in responses:
                reward = torch.zeros((), dtype=torch.float64)
                for hidden, log_pi, log_mu, word in self.states(prompt, response):
                    b = (log_mu if baseline == "teacher" else log_pi).exp().detach()
                    q = self.q(k, hidden, outputs)
                    reward = reward + q[word] - (b * q).sum()
                rewards.append(reward)
            z = rewards[0] - rewards[1]
            total = total - p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)
        return total / len(pairs)

    def step(self, rows, pairs):
        args = self.args
        self.step_number += 1
        outputs = self.outputs.clone().requires_grad_()
        loss, moment = self.student_terms(rows, outputs)
        gradients = torch.autograd.grad(loss, list(self.weights.values()), retain_graph=True)
        q_loss = -moment
        if pairs:
            violation = -args.confidence_radius
            baselines = [("teacher", args.lmbda), ("student", 1 - args.lmbda)]
            for k, (baseline, weight) in enumerate([b for b in baselines if b[1] > 0]):
                held = self.nll(0, pairs, outputs, baseline)
                twin = self.nll(1 + k, pairs, outputs, baseline)
                q_loss = q_loss + self.dual * weight * held + twin
                violation += weight * (held.item() - twin.item())
        (q_gradient,) = torch.autograd.grad(q_loss, outputs)
        self.adam(self.outputs, q_gradient, self.q_moments, self.rate)
        with torch.no_grad():
            for weight, gradient, moments in zip(self.weights.values(), gradients, self.moments, strict=True):
                self.adam(weight, gradient, moments, args.learning_rate)
        if pairs:
            self.dual = min(max(self.dual + args.dual_learning_rate * violation, 0.0), args.dual_max)
        self.losses.append(loss.item())

    def adam(self, weight, gradient, moments, rate):
        first, second = moments
        first.mul_(0.9).add_(0.1 * gradient)
        second.mul_(0.999).add_(0.001 * gradient**2)
        corrected = first / (1 - 0.9**self.step_number), second / (1 - 0.999**self.step_number)
        weight.sub_(rate * corrected[0] / (corrected[1].sqrt() + 1e-8))


def recorded(trainer, reference, with_pairs):
    """Trains, and lets the reference follow on the same rows and pairs."""
    score, draw = trainer._generate_and_score_completions, trainer.adversary.pairs and trainer.adversary.pairs.draw
    batches, pairs = [], []

    def rows_of(batch):
        for ids, mask, completion, kept, on_policy in zip(
            *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "on_policy")),
            strict=True,
        ):
            yield ids[mask.bool()].tolist(), completion[kept.bool()].tolist(), on_policy

    def scored(inputs):
        batch = score(inputs)
        batches.append(list(rows_of(batch)))
        return batch

    def drawn():
        found = draw()
        for batch in found:
            ids, attended, completed = (batch[n] for n in ("input_ids", "attention_mask", "completion_mask"))
            texts = [
                (row[: (a - c).sum()].tolist(), row[c.bool()].tolist())
                for row, a, c in zip(ids, attended, completed, strict=True)
            ]
            b = len(texts) // 2
            pairs[-1:] = [
                pairs[-1] + [(*texts[i], texts[b + i][1], p) for i, p in enumerate(batch["preference"].tolist())]
            ]
        return found

    trainer._generate_and_score_completions = scored
    if with_pairs:
        trainer.adversary.pairs.draw = lambda: (pairs.append([]), drawn())[1]
    found = train(trainer)
    assert len(batches) == STEPS
    for step in range(STEPS):
        reference.step(batches[step], pairs[step] if with_pairs else [])
    return found


def advantages_of(preferences) -> tuple[dict[tuple, float], float]:
    """a(p, 0.05) of each prompt's completion, and their mean over tokens."""
    tokenizer = make_tokenizer()
    weights = {1.0: 1.0, 0.5: math.sqrt(1 - math.exp(-2 * 0.05)), 0.2: 0.0}
    known = {row["prompt"]: weights[row["preference"]] for row in preferences}
    found, total, tokens = {}, 0.0, 0
    for row in ROWS:
        a = known.get(row["prompt"], 1.0)
        found[tuple(tokenizer(row["prompt"])["input_ids"])] = a
        if a > 0:
            total, tokens = total + a * (len(row["completion"]) + 1), tokens + len(row["completion"]) + 1
    return found, total / tokens


@pytest.mark.parametrize(
    ("lmbda", "with_pairs", "more"),
    [
        (1.0, False, {}),
        (0.0, False, {"imitation_weight": 0.3, "imitation_q": 0.0}),
        (1.0, True, {"state_gradient": True}),
        (0.0, True, {"temperature": 0.7}),
        (0.5, True, {"moment_coef": 2.0, "kl_coef": 0.5}),
        (0.5, True, {"imitation_weight": 0.3, "imitation_q": 0.7, "imitation_radius": 0.05}),
    ],
    ids=[
        *("MM-KD on-policy", "MM-KD off-policy", "on-policy with preferences", "off-policy with preferences", "mixed"),
        "imitation by preferences",
    ],
)
def test_alternating_updates_equal_a_plain_loop(tiny_dir, teacher_dir, settings, lmbda, with_pairs, more):
    args = MMPbKDConfig(**settings, lmbda=lmbda, q_warmup_steps=0, q_learning_rate=0.5, dual_learning_rate=2.0, **more)
    preferences = [{**row, "preference": [1.0, 0.5, 0.2][i % 3]} for i, row in enumerate(PAIRS)]
    trainer = MMPbKDTrainer(
        model=double(tiny_dir),
        teacher_model=double(teacher_dir),
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        preference_dataset=Dataset.from_list(preferences) if with_pairs else None,
    )
    reference = Reference(double(tiny_dir), double(teacher_dir), trainer, args)
    if args.imitation_weight and with_pairs:
        reference.advantages, reference.mean_advantage = advantages_of(preferences)
        assert 0 < reference.mean_advantage < 1
        assert set(reference.advantages.values()) > {0.0, 1.0}
    found = recorded(trainer, reference, with_pairs)
    same(found, (reference.losses, reference.weights), 1e-7)
    torch.testing.assert_close(trainer.adversary.q.outputs.detach(), reference.outputs, rtol=0, atol=1e-7)
    assert reference.outputs.abs().max() > 1e-3
    if with_pairs:
        assert trainer.dual.value == pytest.approx(reference.dual, abs=1e-7)
        assert trainer.dual.value != args.dual_init
