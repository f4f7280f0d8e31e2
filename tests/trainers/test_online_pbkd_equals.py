"""Special cases of `OnlinePbKDTrainer`, and its reward model and imitation against plain loops."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from trl import RLOOConfig, RLOOTrainer

from tests.conftest import make_model, make_tokenizer
from tests.trainers.online_cases import PAIRS, PROMPTS, ROWS, SHORT, digits, equal, logs_of, make, weights_of
from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer
from trl_kd.losses.dual import DualVariable
from trl_kd.rewards.reward_model import ADVERSARY, MLE, RewardModel, from_student
from trl_kd.trainers.online_pbkd.learner import RewardLearner
from trl_kd.trainers.online_pbkd.pool import PairPool


OURS = ("rm_", "dual_", "confidence_", "adversary", "reward_bound", "imitation_weight")
LOGGED = ("loss", "grad_norm", "reward", "kl", "entropy", "completions/mean_length")


def length(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": 2,
            "steps_per_generation": 4,
        },
        {"beta": 0.0, "reward_weights": [0.5]},
    ],
    ids=["plain", "reused generations", "weights"],
)
def test_off_is_rloo(tiny_dir, settings, more):
    """Losses and weights, to the bit, step by step."""
    shared = {name: value for name, value in (SHORT | more).items() if not name.startswith(OURS)}
    steps = []

    class Stepping:
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            steps[-1].append(loss.item())
            return loss

    found = []
    for trainer_class in (RLOOTrainer, None):
        steps.append([])
        if trainer_class is not None:
            trainer = type("Plain", (Stepping, trainer_class), {})(
                model=tiny_dir,
                reward_funcs=length,
                args=RLOOConfig(**{**settings, **shared}),
                train_dataset=Dataset.from_list(ROWS),
            )
        else:
            ours = type("Ours", (Stepping, OnlinePbKDTrainer), {})
            trainer = make(tiny_dir, settings, adversary="off", reward_funcs=length, trainer=ours, **more)
        trainer.train()
        found.append((weights_of(trainer.model), [[log.get(name) for name in LOGGED] for log in logs_of(trainer)]))
    assert equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert steps[0] == steps[1]
    assert len(steps[0]) >= 3


def test_a_plain_config_is_taken(tiny_dir, settings):
    shared = {name: value for name, value in SHORT.items() if not name.startswith(OURS)}
    args = RLOOConfig(**{**settings, **shared, "gradient_accumulation_steps": 2})
    rows = Dataset.from_list([{"prompt": f"{number}+1=", "completion": "1"} for number in range(600)])
    trainer = OnlinePbKDTrainer(tiny_dir, length, args, rows, preference_function=digits)
    assert trainer.args.steps_per_generation == 2
    assert trainer.args.adversary == "pbkd"


# ---- The reward model ----------------------------------------------------------------------------------------------------


def learner_of(tmp_path, pairs=PAIRS, **more) -> RewardLearner:
    args = OnlinePbKDConfig(str(tmp_path), use_cpu=True, bf16=False, **{**SHORT, "rm_batch_size": 20, **more})
    model = RewardModel(from_student(make_model()), args.reward_bound, args.rm_lora_r, 0)
    generator = torch.Generator().manual_seed(0)
    for head in (model.heads.mle, model.heads.adversary):
        head.weight.data.normal_(generator=generator)
    pool = PairPool(0.0, 0)
    pool.add([{"chosen_finish_reason": None, "preference": 1.0, **pair} for pair in pairs])
    dual = DualVariable(args.dual_init, args.dual_learning_rate, args.dual_max, radius=args.confidence_radius)
    return RewardLearner(model, pool, dual, make_tokenizer(), Accelerator(cpu=True), args)


LABELS = [1.0, 0.5, 0.7, 1.0, 0.0]
MODES = {
    "pbkd": {"dual_init": 2.0, "dual_max": 10.0, "confidence_radius": 0.1},
    "pbkd, λ = 0": {"dual_init": 0.0, "dual_learning_rate": 0.0, "confidence_radius": 0.1},
    "mle": {"adversary": "mle"},
    "ζ = 0": {"confidence_radius": 0.0},
    "discriminator": {"adversary": "discriminator"},
}


@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_a_plain_loop(tmp_path, mode):
    """Four steps of both heads, backbone and λ, with one forward a text and autograd on the whole objective."""
    more = MODES[mode]
    pairs = [{**pair, "preference": LABELS[i % 5]} for i, pair in enumerate(PAIRS)]
    learner = learner_of(tmp_path, pairs, **more)
    theirs = [learner.encode(f"{i}+1=", "77", "stop") for i in range(3)]
    ours = [learner.encode(f"{i}+1=", "4" * (j + 1), "stop" if j else "length") for i in range(3) for j in range(2)]

    reference = learner_of(tmp_path, pairs, **more).model
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    dual = learner.dual.value
    tokenizer = learner.tokenizer
    heads, body = reference.heads, reference.model.model

    def reward(ids, head, through):
        features = body(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        layer = heads.mle if head == MLE else heads.adversary
        return 5 * torch.tanh(layer(features if through else features.detach())[0] / 5)

    def tokens(pair, side):
        return [*tokenizer(pair["prompt"])["input_ids"], *tokenizer(pair[side])["input_ids"], 1]

    uses = more.get("adversary") != "discriminator"
    adversarial = learner.head == ADVERSARY
    for _ in range(4):
        seen = learner.step(theirs, ours)
        through = dual == 0 or not uses
        objective, nlls = torch.zeros(()), {}
        for head in (MLE, ADVERSARY) if uses else ():
            nll = torch.zeros(())
            for pair in pairs:
                p = pair["preference"]
                z = reward(tokens(pair, "chosen"), head, True) - reward(tokens(pair, "rejected"), head, True)
                if head == ADVERSARY:
                    z = reward(tokens(pair, "chosen"), head, through) - reward(tokens(pair, "rejected"), head, through)
                nll = nll - p * torch.log(torch.sigmoid(z)) - (1 - p) * torch.log(torch.sigmoid(-z))
            nlls[head] = nll / len(pairs)
            objective = objective + (1 if head == MLE else dual * adversarial) * nlls[head]
        if adversarial:
            gap = sum(reward(ids, ADVERSARY, through) for ids in theirs) / len(theirs)
            gap = gap - sum(reward(ids, ADVERSARY, through) for ids in ours) / len(ours)
            objective = objective - gap
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        for (name, a), (_, b) in zip(learner.model.named_parameters(), reference.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4, msg=f"{mode}: {name}")
        if adversarial and uses:
            violation = (nlls[ADVERSARY] - nlls[MLE]).item() - 0.1
            assert seen["violation"] == pytest.approx(violation, abs=1e-5)
            dual = min(max(dual + learner.dual.learning_rate * violation, 0.0), learner.dual.maximum)
            assert learner.dual.value == pytest.approx(dual, abs=1e-5)
            assert seen["rm_nll_adv"] - seen["rm_nll_mle"] == pytest.approx(violation + 0.1, abs=1e-5)
        else:
            assert learner.dual.history == []


def test_what_does_not_learn_stays(tmp_path):
    for mode, still in (("mle", "adversary"), ("discriminator", "mle")):
        learner = learner_of(tmp_path, adversary=mode)
        before = getattr(learner.model.heads, still).weight.clone()
        rows = [learner.encode("1+1=", text, "stop") for text in ("2", "33")]
        learner.step(rows[:1], rows[1:])
        assert torch.equal(getattr(learner.model.heads, still).weight, before)


def test_the_radius_of_theory_shrinks_as_pairs_come(tmp_path):
    learner = learner_of(tmp_path, confidence_radius=0.1)
    learner._args.confidence_radius = "theory"
    first = learner.step([], [])
    learner.pool.add([{"chosen_finish_reason": None, "preference": 1.0, **pair} for pair in PAIRS] * 50)
    second = learner.step([], [])
    radii = [s["rm_nll_adv"] - s["rm_nll_mle"] - s["violation"] for s in (first, second)]
    assert radii == pytest.approx([math.log(n / 0.05) / n for n in (20, 1020)], abs=1e-6)


# ---- Imitation -----------------------------------------------------------------------------------------------------------


def gradients_of(trainer) -> dict[str, torch.Tensor]:
    """Those of the first optimizer step."""
    caught: dict[str, torch.Tensor] = {}
    step = trainer.create_optimizer

    def create(*args, **kwargs):
        optimizer = step(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda *_: caught.update({n: p.grad.clone() for n, p in trainer.model.named_parameters()})
        )
        return optimizer

    trainer.create_optimizer = create
    trainer.train()
    return caught


class CountingForwards(OnlinePbKDTrainer):
    forwards = 0

    def _compute_loss(self, model, inputs):
        hook = self.model.model.register_forward_hook(lambda *args: setattr(self, "forwards", self.forwards + 1))
        try:
            return super()._compute_loss(model, inputs)
        finally:
            hook.remove()


@pytest.mark.parametrize("q", [0.0, 0.6])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_imitation_is_a_mean_over_the_tokens_of_answers(tiny_dir, settings, q, micro_batches):
    """The gradient of a whole optimizer step, over micro-batches and rows in random order; and one forward for each. Where
    all answers have the weight 1, q = 0 is the plain mean of −log π."""
    advantages = {} if q == 0 else {ROWS[0]["prompt"]: 0.25, ROWS[1]["prompt"]: 0.0}

    class Weighed(CountingForwards):
        def _weighed_groups(self):
            found = super()._weighed_groups()  # nothing is known of the answers
            assert all(advantage == 1 for _, advantage in found)
            return [(group, advantages.get(group.row.prompt, 1.0)) for group, _ in found]

    rows = [{**row, "completion": row["completion"] if i != 2 else None} for i, row in enumerate(ROWS)]
    settings |= {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 1}
    batch = {"per_device_train_batch_size": 16 // micro_batches, "gradient_accumulation_steps": micro_batches}
    imitated = {"imitation_weight": 0.3, "imitation_q": q, "imitation_q_warmup": 0.0}
    gradients = []
    for own in ({"imitation_weight": 0.0}, imitated):
        plain = {"adversary": "off", "reward_funcs": length, "trainer": Weighed}
        trainer = make(tiny_dir, settings, rows, **plain, **batch, **own)
        gradients.append(gradients_of(trainer))
        assert trainer.forwards == micro_batches
    model, tokenizer = make_model(), make_tokenizer()
    total, nll, tokens = torch.zeros(()), 0.0, 0
    for row in rows:
        a = advantages.get(row["prompt"], 1.0)
        if row["completion"] is None or a == 0:
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*prompt, *tokenizer(row["completion"])["input_ids"], 1]
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for t in range(len(prompt), len(ids)):
            logp = logps[t - 1, ids[t]]
            total = total + a * (-logp if q == 0 or ids[t] == 1 else (1 - logp.exp() ** q) / q)
            nll, tokens = nll - logp.item(), tokens + 1
    (total / tokens).backward()
    for name, p in model.named_parameters():
        difference = gradients[1][name] - gradients[0][name]
        torch.testing.assert_close(difference, 0.3 * p.grad, atol=2e-6, rtol=1e-4, msg=name)
    logged = logs_of(trainer)[0]
    assert logged["pbkd/imitation"] == pytest.approx(total.item() / tokens, rel=1e-5)
    assert logged["pbkd/teacher_nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert "pbkd/advantage" not in logged


def test_prompts_without_a_column_need_a_teacher(tiny_dir, settings):
    with pytest.raises(ValueError, match="no column 'completion' with the teacher's answers"):
        make(tiny_dir, settings, PROMPTS, preference_function=digits)
