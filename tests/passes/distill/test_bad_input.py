"""What cannot be distilled, and what the error says."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.passes.distill import AttentionLoss, CustomLoss, HintLoss, MergeTeacher, ResponseLoss, SimilarityLoss
from tests.passes.distill.nets import Tagger, captured, images, pair

LABELS = torch.tensor([0, 3, 1, 4])


class Maps(nn.Module):
    """A map [batch, channels, size, size], a sequence of another rank, and class scores."""

    def __init__(self, channels: int = 4, size: int = 6, classes: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1))
        self.size, self.classes = size, classes

    def forward(self, x):
        scores = x.flatten(1)[:, : self.classes] * self.weight.sum()
        return {"map": x[:, :1, : self.size, : self.size] * self.weight, "rows": x.flatten(2), "scores": scores}


@pytest.fixture(scope="module")
def maps():
    return captured(Maps(), torch.randn(4, 2, 8, 8), "x")


@pytest.fixture(scope="module")
def student():
    return captured(pair()[0], images())


def refusal(gm: fxopt.CapturedModule, teacher: object, losses: list, labels: object = None, **options) -> str:
    with pytest.raises(fxopt.FxoptError) as caught:
        MergeTeacher(teacher, losses, labels, **options)(gm)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResponseLoss(temperature=0.0), "temperature is 0.0; wanted a number above 0"),
        (lambda: ResponseLoss(temperature=float("nan")), "temperature is nan"),
        (lambda: ResponseLoss(alpha=1.5), "alpha is 1.5; wanted a share from 0 to 1"),
        (lambda: ResponseLoss(alpha=float("nan")), "alpha is nan"),
        (lambda: HintLoss("a", "b", weight=-1.0), "weight is -1.0"),
        (lambda: MergeTeacher(None, []), "losses is empty"),
        (lambda: MergeTeacher(None, [HintLoss("a", "b"), HintLoss("a", "c")]), "two losses are called 'hint a'"),
        (lambda: MergeTeacher(None, half=torch.int8), "half is torch.int8"),
    ],
)
def test_option_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_function_that_is_no_loss_is_refused_with_the_way_to_make_it_one():
    with pytest.raises(TypeError, match=r"CustomLoss\(function=...\) makes one"):
        MergeTeacher(None, [torch.nn.functional.mse_loss])


def test_missing_teacher_is_named(student):
    assert "merge-teacher has no teacher" in refusal(student, None, [ResponseLoss()])


def test_teacher_of_other_inputs_is_refused(student):
    def two(x, y):
        return x + y

    teacher = fxopt.capture(two, (torch.randn(4, 3), torch.randn(4, 3)))
    said = refusal(student, teacher, [ResponseLoss()])
    assert "student and teacher take different inputs" in said
    assert "x: f32[4, 3], y: f32[4, 3]" in said
    assert "image: f32[batch, 3, 8, 8]" in said


def test_teacher_of_integers_is_refused(student):
    teacher = fxopt.capture(Tagger(4), (torch.randint(11, (4, 3)),))
    assert "student and teacher take different inputs" in refusal(student, teacher, [ResponseLoss()])


def test_teacher_of_one_batch_size_is_refused_for_a_student_of_many(student):
    teacher = fxopt.capture(pair()[1].eval(), (images(),))
    assert "a dynamic size instead of 4" in refusal(student, teacher, [ResponseLoss()])


def test_teacher_that_is_the_student_is_refused():
    net = pair()[0]
    said = refusal(captured(net, images()), net, [ResponseLoss()])
    assert "student and teacher share tensors" in said
    assert "passes.distilled_student" in said


def test_teacher_that_shares_what_the_student_writes_is_refused():
    net, teacher = pair(4, 4)
    teacher.norm.running_mean = net.norm.running_mean
    said = refusal(captured(net, images()), teacher, [ResponseLoss()])
    assert "'norm.running_mean' of the student is 'norm.running_mean' of the teacher" in said


def test_captured_teacher_is_not_cast(student):
    teacher = captured(pair()[1].eval(), images())
    assert "teacher_passes" in refusal(student, teacher, [ResponseLoss()], half=torch.bfloat16)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.float(), "the labels of sample 0 do not fit it|the labels fit no classes"),
        (LABELS.int(), "the labels fit no classes of the logits"),
        (LABELS[:3], "the labels of sample 0 do not fit it"),
        (torch.rand(4, 6), "the labels of sample 0 do not fit it"),
        (torch.zeros(4, 5, dtype=torch.int64), "the labels fit no classes of the logits"),
        (torch.tensor([0, 5, 1, 1]), "class indices that there are not"),
        (torch.tensor([0, -1, 1, 1]), "class indices that there are not"),
        ([LABELS, LABELS], "another number of example labels than of samples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(student, labels, message):
    import re

    assert re.search(message, refusal(student, pair()[1], [ResponseLoss()], labels))


def test_labels_of_another_type_at_run_time_are_refused(student):
    both = fxopt.optimize(student, passes=[MergeTeacher(pair()[1], [ResponseLoss()], LABELS)], strict=True)
    with pytest.raises(fxopt.InputError, match="input 'labels' does not fit the captured graph: another element type"):
        both(images(), LABELS.int())


def test_labels_that_no_loss_takes_are_refused(student):
    assert "no loss takes them" in refusal(student, pair()[1], [HintLoss("layer1", "layer1")], LABELS)


def test_loss_that_misses_its_labels_is_refused(student):
    loss = CustomLoss(function=torch.nn.functional.mse_loss, with_labels=True)
    assert "'mse_loss output' takes labels, and there are none" in refusal(student, pair()[1], [loss])


def test_unknown_value_is_refused_with_near_ones(student):
    assert "the teacher has no value 'layer9'" in refusal(student, pair()[1], [HintLoss("layer1", "layer9")])
    assert "the student has no value 'layer9'" in refusal(student, pair()[1], [HintLoss("layer9", "layer1")])


def test_values_without_a_common_shape_are_refused(maps):
    said = refusal(maps, Maps(), [HintLoss("map", "rows")])
    assert "no common shape: they differ in rank" in said
    assert "in the loss 'hint map'" in said
    said = refusal(maps, Maps(size=5), [HintLoss("map", "map", channel_axis=-1)])
    assert "axis 2 has two sizes, and does not lie behind channels" in said
    said = refusal(maps, Maps(classes=5), [ResponseLoss(student="scores", teacher="scores")])
    assert "the logits of student and teacher differ in shape" in said


def test_attention_of_rows_is_refused(maps):
    assert "an attention map needs axes" in refusal(maps, Maps(), [AttentionLoss("scores", "scores")])


def test_channel_axis_of_the_batch_is_refused(maps):
    assert "has no channels" in refusal(maps, Maps(), [HintLoss("map", "map", channel_axis=0)])


def test_similarity_needs_one_batch(maps):
    def other(x):
        return {"map": x.mean(0, keepdim=True)}

    assert "not of one batch" in refusal(maps, other, [SimilarityLoss("map", "map")])


def test_axis_of_the_classes_is_asked_for_where_it_is_not_plain():
    gm = fxopt.capture(Tagger(4), (torch.randint(11, (2, 3)),))
    said = refusal(gm, Tagger(6), [ResponseLoss()])
    assert "class_axis=1 for [batch, classes, ...], class_axis=-1" in said
    assert "has no classes" in refusal(gm, Tagger(6), [ResponseLoss(class_axis=0)])


def test_loss_that_is_no_number_is_refused(student):
    loss = CustomLoss(function=lambda s, t: s - t, name="difference")
    said = refusal(student, pair()[1], [loss])
    assert "a loss must be one floating point number" in said
    assert "in the loss 'difference'" in said


def test_loss_that_ties_the_batch_to_a_number_is_refused(student):
    loss = CustomLoss(function=lambda s, t: (s.view(4, 5) - t).square().mean(), name="tied")
    said = refusal(student, pair()[1], [loss])
    assert "a dynamic size instead of 4" in said
    assert "in the loss 'tied'" in said


def test_pass_without_its_teacher_is_refused_on_the_command_line(student):
    with pytest.raises(fxopt.PassError, match="merge-teacher has no teacher"):
        fxopt.optimize(student, passes="merge-teacher", strict=True)
    assert passes.MergeTeacher(pair()[1]).spec() == "merge-teacher{teacher=...}"
