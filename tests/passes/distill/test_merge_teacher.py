import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import passes
from fxopt.checks import fingerprint
from fxopt.passes.distill import AttentionLoss, HintLoss, MergeTeacher, ResponseLoss, SimilarityLoss
from fxopt.passes.distill.losses import attention_loss, hint_loss, response_loss, similarity_loss
from tests.passes.distill.nets import Hooks, captured, extracted, images, merged, pair, twin

LABELS = torch.tensor([0, 3, 1, 4])
ALL = [
    ResponseLoss(temperature=4.0, alpha=0.7),
    HintLoss("layer1", "layer1", weight=0.1),
    AttentionLoss("layer2", "layer2", weight=10.0),
    SimilarityLoss("layer2", "layer2", weight=2.0),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A student, its teacher, inputs, and both nets in one graph with all losses; in evaluation."""

    student: nn.Module
    teacher: nn.Module
    x: torch.Tensor
    graph: fxopt.CapturedModule
    both: fxopt.CapturedModule


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    student, teacher = (net.eval() for net in pair())
    x = images()
    graph = captured(student, x)
    return Case(student, teacher, x, graph, merged(graph, teacher, x, ALL, LABELS))


@pytest.fixture
def case(shared):
    return copy.deepcopy(shared)


def test_student_outputs_are_bit_for_bit_what_they_were(case):
    with torch.no_grad():
        assert torch.equal(case.both(case.x, LABELS)["output"], case.graph(case.x))


def test_terms_and_total_are_those_of_the_eager_functions(case):
    student, teacher, x, both = case.student, case.teacher, case.x, case.both
    ours, theirs = Hooks(student, "layer1", "layer2"), Hooks(teacher, "layer1", "layer2")
    with torch.no_grad():
        out, z, target = both(x, LABELS), student(x), teacher(x)
        adapter = both.get_submodule("adapters.hint_layer1.project")
        adapted = F.conv2d(ours.values["layer1"], adapter.weight, adapter.bias)
        want = {
            "response": response_loss(z, target, LABELS, temperature=4.0, alpha=0.7),
            "hint layer1": hint_loss(adapted, theirs.values["layer1"]),
            "attention layer2": attention_loss(ours.values["layer2"], theirs.values["layer2"]),
            "similarity layer2": similarity_loss(ours.values["layer2"], theirs.values["layer2"]),
        }
    assert list(out["terms"]) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(out["terms"][name], value, rtol=0, atol=0)
    total = sum(w * want[loss.label] for w, loss in zip((1, 0.1, 10, 2), ALL, strict=True))
    torch.testing.assert_close(out["loss"], total, rtol=1e-6, atol=0)


def test_gradients_are_those_of_an_eager_loop_with_hooks(case):
    student, teacher, both = case.student, case.teacher, case.both
    x = images(8)
    labels = torch.arange(8) % 5
    both.train()
    student.train()
    student.dropout.eval()
    dropout = next(node for node in both.graph.nodes if node.name == "dropout")
    dropout.args = (dropout.args[0], 0.0, True)
    both.recompile()
    ours, theirs = Hooks(student, "layer1", "layer2"), Hooks(teacher, "layer1", "layer2")
    adapter = nn.Conv2d(4, 6, 1)
    adapter.load_state_dict(both.get_submodule("adapters.hint_layer1.project").state_dict())
    with torch.no_grad():
        target = teacher(x)
    z = student(x)
    loss = (
        response_loss(z, target, labels, temperature=4.0, alpha=0.7)
        + 0.1 * hint_loss(adapter(ours.values["layer1"]), theirs.values["layer1"])
        + 10 * attention_loss(ours.values["layer2"], theirs.values["layer2"])
        + 2 * similarity_loss(ours.values["layer2"], theirs.values["layer2"])
    )
    loss.backward()
    both(x, labels)["loss"].backward()
    want = {name: p.grad for name, p in student.named_parameters()}
    found = {name: p.grad for name, p in both.named_parameters() if p.requires_grad}
    assert found.keys() == want.keys() | {"adapters.hint_layer1.project.weight", "adapters.hint_layer1.project.bias"}
    for name, gradient in want.items():  # sums of the terms' gradients, in another order
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["adapters.hint_layer1.project.weight"], adapter.weight.grad, rtol=1e-5, atol=1e-7)


def test_only_student_and_adapters_are_trained_and_the_user_s_teacher_keeps_its_flags(case):
    roots = {name.split(".")[0] for name, p in case.both.named_parameters() if p.requires_grad}
    assert "adapters" in roots
    assert "teacher" not in roots
    assert all(p.requires_grad for p in case.teacher.parameters())


def test_teacher_stays_in_evaluation_and_its_statistics_are_not_written(case):
    teacher, x, both = case.teacher, case.x, case.both
    before = {name: b.clone() for name, b in both.named_buffers()}
    hooks = Hooks(teacher, "layer2")
    with torch.no_grad():
        teacher(x)
    for mode in (True, False):
        both.train(mode)
        values = _values(both, x, "teacher_relu_2")
        torch.testing.assert_close(values, hooks.values["layer2"], rtol=0, atol=0)
    both.train()(x, LABELS)
    changed = {name for name, b in both.named_buffers() if not torch.equal(b, before[name])}
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def _values(gm: fxopt.CapturedModule, x: torch.Tensor, node: str) -> torch.Tensor:
    """Return what a node yields, without writing any statistics."""
    kept = []

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            found = super().run_node(n)
            if n.name == node:
                kept.append(found)
            return found

    with torch.no_grad():
        Reader(copy.deepcopy(gm)).run(x, LABELS)
    return kept[0]


def test_no_gradient_flows_through_the_teacher_into_inputs(case):
    student, teacher = case.student, case.teacher
    x = images().requires_grad_()
    both = merged(case.graph, teacher, x, [ResponseLoss()])
    both(x)["loss"].backward()
    with torch.no_grad():
        target = teacher.eval()(x)
    found = x.grad.clone()
    x.grad = None
    response_loss(student(x), target).backward()
    torch.testing.assert_close(found, x.grad, rtol=1e-5, atol=1e-8)


def test_shared_preprocessing_is_computed_once(case):
    both = case.both
    images_read = [
        node for node in both.graph.nodes if node.target is torch.ops.aten.div.Tensor and node.args[1] == 0.25
    ]
    assert len(images_read) == 1
    detached = [node for node in both.graph.nodes if node.target is torch.ops.aten.detach.default]
    assert [node.args[0] for node in detached] == images_read


def test_tap_on_a_shared_value_gives_no_gradient_as_teacher():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            return self.head(x * 2)

    x = torch.randn(4, 3, requires_grad=True)
    both = merged(captured(Scaled(), x.detach(), "x"), Scaled(), x, [HintLoss("output", "node:mul")])
    gradient = torch.autograd.grad(both(x)["loss"], x)[0]
    head = both.get_submodule("head")
    y = F.linear(x * 2, head.weight, head.bias)
    (want,) = torch.autograd.grad(F.mse_loss(y, (x * 2).detach()), x)
    torch.testing.assert_close(gradient, want)


def test_what_no_loss_reads_of_the_teacher_is_left_out(case):
    both = MergeTeacher(case.teacher, [HintLoss("layer1", "layer1")])(case.graph).gm
    assert not any(name.startswith(("teacher.head", "teacher.layer2")) for name, _ in both.named_parameters())


def test_adapters_start_alike_for_one_seed_and_differ_for_another(case):
    hint = [HintLoss("layer1", "layer1")]
    first, again, other = (
        MergeTeacher(case.teacher, hint, seed=seed)(case.graph).gm.get_parameter("adapters.hint_layer1.project.weight")
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_graph_that_goes_in_is_left_alone_and_the_random_state_too(case):
    stamp, state = fingerprint(case.graph), torch.get_rng_state()
    MergeTeacher(case.teacher, [HintLoss("layer1", "layer1")])(case.graph)
    assert fingerprint(case.graph) == stamp
    assert torch.equal(torch.get_rng_state(), state)


def test_merge_that_changes_the_student_is_rolled_back(monkeypatch):
    student, teacher = pair()
    gm = captured(student, images()).eval()
    run = MergeTeacher.run

    def spoiled(self, rw):
        first = next(node for node in rw.gm.graph.nodes if node.target is torch.ops.aten.sub.Tensor)
        rw.set_arg(first, "other", 0.25, why="to spoil it")
        run(self, rw)

    monkeypatch.setattr(MergeTeacher, "run", spoiled)
    result = fxopt.optimize(gm, passes=[MergeTeacher(teacher, [ResponseLoss()])])
    assert result.report.steps[0].status == "rolled back"
    assert result.output_names == gm.output_names
    assert result.records == {}


def test_later_passes_are_judged_on_all_outputs(case):
    def spoils_the_loss(module):
        node = next(n for n in module.graph.nodes if n.target is torch.ops.aten.mse_loss.default)
        node.args = (node.args[0], node.args[0])

    result = fxopt.optimize(case.both, passes=[spoils_the_loss])
    assert result.report.steps[0].status == "rolled back"


def test_clean_up_of_the_merged_graph_keeps_its_values(case):
    result = fxopt.optimize(case.both.train())
    assert {step.status for step in result.report.steps} <= {"changed", "unchanged"}
    assert not any(name.startswith("teacher") and p.requires_grad for name, p in result.named_parameters())


def test_merged_graph_is_saved_copied_and_pickled(case, tmp_path):
    x, both = case.x, case.both
    fxopt.save(both, tmp_path / "both.fxopt")
    with torch.no_grad():
        want = both(x, LABELS)
    for other in (fxopt.load(tmp_path / "both.fxopt"), copy.deepcopy(both)):
        with torch.no_grad():
            found = other.eval()(x, LABELS)
        assert torch.equal(found["loss"], want["loss"])
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in both.parameters()]
        assert len(list(extracted(other).graph.nodes)) == 30


def test_batches_of_other_sizes_run(case):
    for count in (1, 2, 7):
        assert case.both(images(count), torch.arange(count) % 5)["loss"].isfinite()
    with pytest.raises(fxopt.InputError, match="batch is 4 in 'image' and 3 here"):
        case.both(images(4), LABELS[:3])


def test_teacher_in_half_precision_yields_close_targets(case):
    student, teacher, x = case.student, case.teacher, case.x
    both = merged(case.graph, teacher, x, [ResponseLoss()], half=torch.bfloat16)
    assert {p.dtype for name, p in both.named_parameters() if name.startswith("teacher")} == {torch.bfloat16}
    assert teacher.head.weight.dtype == torch.float32
    with torch.no_grad():
        found, want = both(x)["loss"], response_loss(student(x), teacher(x))
    torch.testing.assert_close(found, want, rtol=0.1, atol=1e-3)


def test_passes_run_over_the_teacher_alone(case):
    own = ["fold-batch-norm", "remove-identities"]
    both = merged(case.graph, case.teacher, case.x, [ResponseLoss()], teacher_passes=own)
    targets = [n.target for n in both.graph.nodes if n.name.startswith("teacher_")]
    assert torch.ops.aten.batch_norm.default not in targets
    assert torch.ops.aten.batch_norm.default in [n.target for n in both.graph.nodes]


def test_finer_precision_of_the_teacher_is_a_pass_of_its_own(case):
    both = merged(case.graph, case.teacher, case.x, [ResponseLoss()], teacher_passes=["cast-half{dtype=bfloat16}"])
    kept = [node.meta["val"].dtype for node in both.graph.nodes if node.name.startswith("teacher_conv")]
    assert set(kept) == {torch.bfloat16}
    assert both(case.x)["loss"].dtype == torch.float32


def test_student_in_half_precision_is_compared_in_the_teacher_s_type(case):
    student = twin(case.student).bfloat16()
    graph = captured(student, case.x.bfloat16())
    teacher = captured(case.teacher, case.x)
    both = merged(graph, teacher, case.x, [ResponseLoss(), HintLoss("layer1", "layer1")])
    x = case.x.bfloat16()
    with torch.no_grad():
        found, want = both(x)["terms"]["response"], response_loss(student(x).float(), case.teacher(x.float()))
    torch.testing.assert_close(found, want, rtol=0, atol=0)
    assert both.get_parameter("adapters.hint_layer1.project.weight").dtype == torch.float32


def test_keyword_inputs_get_keyword_labels():
    student, teacher = pair()
    x = images()
    gm = fxopt.capture(student, {"image": x}, dynamic_shapes={"image": {0: "batch"}})
    both = merged(gm, teacher, x, [ResponseLoss()], LABELS)
    assert both(image=x, labels=LABELS)["loss"].isfinite()
    assert extracted(both)(image=x).shape == (4, 5)


def test_several_samples_take_a_list_of_labels():
    student, teacher = pair()
    gm = fxopt.capture(student, [(images(2),), (images(4),)])
    both = merged(gm, teacher, images(), [ResponseLoss()], [LABELS[:2], LABELS])
    assert [sample.args[1].shape for sample in both.samples] == [(2,), (4,)]


def test_cached_teacher_leaves_the_graph_and_gives_the_same_loss(case):
    losses = ALL[:2]
    data = images(12)
    gm = case.graph
    merge = MergeTeacher(case.teacher, losses, LABELS, cached=True)
    cache = merge.teacher_outputs(gm, [(data[:4], LABELS), (data[4:], LABELS)])
    assert {name: tuple(t.shape) for name, t in cache.items()} == {"output": (12, 5), "layer1": (12, 6, 8, 8)}
    both = fxopt.optimize(gm, passes=[merge], strict=True)
    assert not any(name.startswith("teacher") for name in both.state_dict())
    rows = torch.tensor([3, 7, 0])
    labels = torch.tensor([1, 2, 3])
    found = both(data[rows], labels, {name: t[rows] for name, t in cache.items()})
    want = case.both(data[rows], labels)["terms"]
    for name, term in found["terms"].items():
        torch.testing.assert_close(term, want[name], rtol=1e-5, atol=1e-7)
    assert len(list(extracted(both).graph.nodes)) == len(list(gm.graph.nodes))


def test_passes_of_distillation_are_registered():
    assert {MergeTeacher, passes.ExtractStudent} <= set(passes.PASSES)
