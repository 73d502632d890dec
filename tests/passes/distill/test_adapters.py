import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.passes.distill import AttentionLoss, CustomLoss, HintLoss, MergeTeacher, ResponseLoss, SimilarityLoss
from fxopt.passes.distill.losses import response_loss
from tests.passes.distill.nets import Tagger, captured, extracted, images, merged, pair


class Features(nn.Module):
    """A value of a given shape, [batch, *shape], made of [batch, 4]; ``map`` is its name."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = shape
        self.map = nn.Linear(4, int(torch.tensor(shape).prod()))

    def forward(self, x):
        return self.map(x).view(-1, *self.shape)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def term(ours: tuple, theirs: tuple, loss) -> tuple[fxopt.CapturedModule, torch.Tensor, torch.Tensor]:
    """Return the merged graph of two nets of these shapes, and what the nets yield."""
    student, teacher = Features(*ours), Features(*theirs)
    both = merged(captured(student, X, "x"), teacher, X, [loss])
    return both, student(X), teacher(X).detach()


def hint(ours: tuple, theirs: tuple, **options):
    return term(ours, theirs, HintLoss("output", "output", **options))


def project(both: fxopt.CapturedModule) -> list[torch.Tensor]:
    return [both.get_parameter(f"adapters.hint_output.project.{name}") for name in ("weight", "bias")]


def same(found: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)


def test_channels_of_maps_get_a_convolution_of_size_1():
    both, s, t = hint((3, 4, 4), (5, 4, 4))
    same(both(X)["loss"], F.mse_loss(F.conv2d(s, *project(both)), t))
    assert project(both)[0].shape == (5, 3, 1, 1)
    assert "adapted: convolution of size 1 of 3 to 5 channels" in str(both.report)


def test_features_get_a_linear_layer():
    both, s, t = hint((6, 3), (6, 7))
    same(both(X)["loss"], F.mse_loss(F.linear(s, *project(both)), t))
    assert "linear layer of 3 to 7 features" in str(both.report)


def test_channels_of_sequences_are_told_by_an_option():
    both, s, t = hint((3, 6), (5, 6), channel_axis=1)
    same(both(X)["loss"], F.mse_loss(F.conv1d(s, *project(both)), t))


def test_larger_maps_are_averaged_before_the_channels_change():
    both, s, t = hint((3, 8, 4), (5, 4, 4))
    same(both(X)["loss"], F.mse_loss(F.conv2d(F.adaptive_avg_pool2d(s, (4, 4)), *project(both)), t))
    assert "sizes averaged, convolution" in str(both.report)


def test_smaller_maps_are_interpolated():
    both, s, t = hint((3, 4, 4), (3, 8, 6))
    want = F.interpolate(s, (8, 6), mode="bilinear", align_corners=False)
    same(both(X)["loss"], F.mse_loss(want, t))
    assert "adapted: sizes interpolated" in str(both.report)
    assert not any(name.startswith("adapters") for name, _ in both.named_parameters())


def test_equal_shapes_need_no_adapter():
    both, s, t = hint((3, 4, 4), (3, 4, 4))
    same(both(X)["loss"], F.mse_loss(s, t))
    assert "adapted" not in str(both.report)


def test_sizes_known_at_run_time_alone_are_interpolated():
    def halved(x):
        return F.avg_pool2d(x, 2)

    x = torch.randn(2, 3, 8, 8)
    shapes = {"x": {0: "batch", 2: "4<=height", 3: "4<=width"}}
    student = fxopt.capture(halved, (x,), dynamic_shapes=shapes)
    both = merged(student, nn.Identity(), x, [HintLoss("output", "output")])
    for height, width in ((8, 8), (10, 6)):
        x = torch.randn(2, 3, height, width)
        want = F.interpolate(halved(x), (height, width), mode="bilinear", align_corners=False)
        same(both(x)["loss"], F.mse_loss(want, x))


def test_adapters_learn_and_the_others_are_found_by_an_optimizer():
    both, *_ = hint((6, 3), (6, 7))
    optimizer = torch.optim.Adam([p for p in both.parameters() if p.requires_grad], 0.05)
    first = both(X)["loss"].item()
    before = [p.detach().clone() for p in project(both)]
    for _ in range(60):
        optimizer.zero_grad()
        both(X)["loss"].backward()
        optimizer.step()
    assert both(X)["loss"].item() < first / 3
    assert all(not torch.equal(a, b) for a, b in zip(before, project(both), strict=True))


def test_attention_needs_no_channels_in_common():
    both, s, t = term((3, 8, 8), (5, 4, 4), AttentionLoss("output", "output"))
    maps = [F.normalize(v.square().sum(1).flatten(1)) for v in (F.adaptive_avg_pool2d(s, (4, 4)), t)]
    same(both(X)["loss"], F.mse_loss(*maps))


def test_similarity_needs_no_shape_in_common():
    both, s, t = term((3, 8, 8), (5,), SimilarityLoss("output", "output"))
    grams = [F.normalize(v.flatten(1) @ v.flatten(1).t()) for v in (s, t)]
    same(both(X)["loss"], F.mse_loss(*grams))


@pytest.mark.parametrize(("axis", "labels"), [(-1, (2, 3)), (1, (2, 3))])
def test_classes_of_tokens_lie_where_the_option_says(axis, labels):
    class Turned(Tagger):
        def forward(self, tokens):
            return super().forward(tokens).movedim(-1, 1)

    kind = Tagger if axis == -1 else Turned
    student, teacher = kind(4), kind(6)
    tokens = torch.randint(11, (2, 3))
    given = torch.tensor([[0, -100, 3], [1, 2, -100]])
    graph = fxopt.capture(student, (tokens,), dynamic_shapes={"tokens": {0: "batch", 1: "seq"}})
    both = merged(graph, teacher, tokens, [ResponseLoss(class_axis=axis, alpha=0.5)], given)
    assert both.inputs[1].shape == ("batch", "seq")
    want = response_loss(student(tokens), teacher(tokens), given, alpha=0.5, class_axis=axis % 3)
    same(both(tokens, given)["loss"], want)
    longer = torch.randint(11, (3, 5))
    assert both(longer, torch.randint(4, (3, 5)))["loss"].isfinite()
    assert extracted(both)(longer).shape[0] == 3


def test_soft_labels_have_the_shape_of_the_logits():
    student, teacher = pair()
    soft = torch.softmax(torch.randn(4, 5), 1)
    both = merged(student.eval(), teacher.eval(), images(), [ResponseLoss(alpha=0.3)], soft)
    assert both.inputs[1].shape == ("batch", 5)
    x = both.samples[0].args[0]
    same(both(x, soft)["loss"], response_loss(student(x), teacher(x), soft, alpha=0.3))


class Weighted(nn.Module):
    """A loss with a weight that is learned, Python and labels in it."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, student, teacher, labels):
        difference = (student - teacher).square().mean(1)
        if difference.max() > 1e6:
            difference = difference / 1e6
        return self.factor * (difference * (labels > 0)).mean()


def test_loss_of_one_s_own_is_captured_with_what_it_trains():
    student, teacher = (net.eval() for net in pair())
    x, labels = images(), torch.tensor([0, 3, 1, 4])
    function = Weighted()
    both = merged(student, teacher, x, [CustomLoss(function=function, with_labels=True, name="own")], labels)
    out = both(x, labels)
    same(out["terms"]["own"], function(student(x), teacher(x).detach(), labels))
    out["loss"].backward()
    assert function.factor.grad is not None
    assert both.get_parameter("adapters.own.function.factor") is function.factor


def test_teacher_with_branches_is_merged_and_never_trained():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            if x.sum() > 0:
                return self.small(x)
            return self.large(x)

    teacher, student = Branching(), nn.Linear(4, 3)
    graph = fxopt.capture(student, (X,), dynamic_shapes=({0: "batch"},))
    both = fxopt.optimize(graph, passes=[MergeTeacher(teacher, [ResponseLoss()])], strict=True)
    for x in (torch.rand(2, 4), -torch.rand(2, 4)):
        same(both(x)["loss"], response_loss(student(x), teacher(x).detach()))
    both(X)["loss"].backward()
    assert {name for name, p in both.named_parameters() if p.requires_grad} == {"weight", "bias"}
    assert "node for node" in str(extracted(both).report)


def test_loss_is_captured_on_the_values_that_it_gets():
    def of_shares(student, teacher):
        if not bool((student >= 0).all()):
            raise ValueError("shares are not below 0")
        return (teacher * (teacher / student).log()).sum(1).mean()

    class Shares(nn.Linear):
        def forward(self, x):
            return super().forward(x).softmax(1)

    student, teacher = Shares(4, 3), Shares(4, 3)
    both = merged(captured(student, X, "x"), teacher, X, [CustomLoss(function=of_shares)])
    same(both(X)["loss"], of_shares(student(X), teacher(X).detach()))
