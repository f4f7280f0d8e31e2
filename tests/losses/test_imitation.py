import torch

from trl_kd.losses.imitation import CHOSEN, NO_TEACHER, REJECTED, sequence_imitation, teacher_rows


def test_each_pair_gives_the_teachers_response():
    logps = torch.tensor([-1.0, -2.0, -3.0, -10.0, -20.0, -30.0])
    side = torch.tensor([CHOSEN, REJECTED, NO_TEACHER])
    assert sequence_imitation(logps, side).tolist() == [1.0, 20.0, 0.0]


def test_gradient_reaches_the_teachers_response_alone():
    logps = torch.zeros(6, requires_grad=True)
    sequence_imitation(logps, torch.tensor([CHOSEN, REJECTED, NO_TEACHER])).sum().backward()
    assert logps.grad.tolist() == [-1.0, 0.0, 0.0, 0.0, -1.0, 0.0]


def test_rows_keep_their_shape_whoever_wrote_them():
    values = torch.arange(24).view(4, 2, 3)
    for side in ([NO_TEACHER, NO_TEACHER], [CHOSEN, REJECTED], [REJECTED, REJECTED]):
        assert teacher_rows(values, torch.tensor(side)).shape == (2, 2, 3)
    assert torch.equal(teacher_rows(values, torch.tensor([CHOSEN, REJECTED])), torch.stack([values[0], values[3]]))
