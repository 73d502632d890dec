import copy

import pytest
import torch
from torch import nn

import fxopt
from fxopt import passes
from fxopt.export import to_onnx
from fxopt.passes.distill import CustomLoss, HintLoss, MergeTeacher, ResponseLoss
from fxopt.passes.distill.student_record import differences, listing
from tests.passes.distill.nets import captured, extracted, images, merged, pair

LABELS = torch.tensor([0, 3, 1, 4])
LOSSES = [ResponseLoss(), HintLoss("layer1", "layer1")]


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    student, teacher = pair()
    x = images()
    graph = captured(student, x)
    return graph, merged(graph, teacher, x, LOSSES, LABELS), x


@pytest.fixture
def case(shared):
    return copy.deepcopy(shared)


def test_the_student_comes_out_node_for_node(case):
    graph, both, _ = case
    small = extracted(both)
    assert list(differences(listing(graph), listing(small))) == []
    assert (small.inputs, small.output_names, small.dims) == (graph.inputs, graph.output_names, graph.dims)
    assert small.state_dict().keys() == graph.state_dict().keys()
    assert small.records == {"passes": ["merge-teacher", "extract-student"]}
    assert "node for node, the graph that went in (30 nodes)" in str(small.report)


def test_trained_weights_come_out(case, tmp_path):
    _, both, x = case
    before = both.get_parameter("head.weight").detach().clone()
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], 0.1)
    both.train()
    for _ in range(2):
        optimizer.zero_grad()
        both(x, LABELS)["loss"].backward()
        optimizer.step()
    both.eval()
    small = extracted(both)
    assert not torch.equal(small.get_parameter("head.weight"), before)
    with torch.no_grad():
        assert torch.equal(small(x), both(x, LABELS)["output"])
    to_onnx(small, tmp_path / "small.onnx")


@pytest.mark.parametrize("training", [True, False])
def test_the_proof_does_not_depend_on_the_mode(case, training):
    _, both, _ = case
    assert "node for node" in str(extracted(both.train(training)).report)


def test_the_record_survives_a_file(case, tmp_path):
    _, both, _ = case
    fxopt.save(both, tmp_path / "both.fxopt")
    assert "node for node" in str(extracted(fxopt.load(tmp_path / "both.fxopt")).report)


def test_the_report_names_passes_that_changed_the_student(case):
    _, both, x = case
    both.eval()
    changed = fxopt.optimize(both, passes=["freeze-mode", "fold-batch-norm"], strict=True)
    small = extracted(changed)
    said = str(small.report)
    assert "changed since the teacher was merged, by freeze-mode and fold-batch-norm" in said
    with torch.no_grad():
        torch.testing.assert_close(small(x), both(x, LABELS)["output"], rtol=1e-4, atol=1e-5)


def test_student_that_reads_an_adapter_is_not_taken_out(case):
    _, both, _ = case

    def mix(module):
        output = module.graph.output_node()
        results = list(output.args[0])
        adapter = next(n for n in module.graph.nodes if n.op == "get_attr" and n.target.startswith("adapters"))
        with module.graph.inserting_before(output):
            zero = module.graph.call_function(torch.ops.aten.sum.default, (adapter,))
            zero = module.graph.call_function(torch.ops.aten.mul.Tensor, (zero, 0.0))
            results[0] = module.graph.call_function(torch.ops.aten.add.Tensor, (results[0], zero))
        output.args = (tuple(results),)

    mixed = fxopt.optimize(both, passes=[mix], strict=True)
    with pytest.raises(fxopt.PassError, match="the student cannot be taken out: it reads what came with the teacher"):
        extracted(mixed)


def test_graph_without_a_teacher_is_refused(case):
    with pytest.raises(fxopt.PassError, match="has no teacher to take the student from"):
        extracted(case[0])


def test_second_teacher_is_refused(case):
    _, both, _ = case
    with pytest.raises(fxopt.PassError, match="has a teacher already"):
        merged(both, pair()[1], images(), LOSSES)


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 3)

    def forward(self, x, *, scale):
        y = self.body(x) * scale
        return {"logits": y, "extra": (y.sum(1), None)}


def test_structures_of_inputs_and_outputs_come_back():
    x, scale = torch.randn(4, 3), torch.tensor(2.0)
    sample = fxopt.Sample((x,), {"scale": scale})
    graph = fxopt.capture(Many(), sample, dynamic_shapes={"x": {0: "batch"}, "scale": None})
    loss = ResponseLoss(student="logits", teacher="logits")
    both = merged(graph, Many(), x, [loss], torch.tensor([0, 1, 2, 0]))
    out = both(x, scale=scale, labels=torch.tensor([0, 1, 2, 0]))
    assert out["output"].keys() == {"logits", "extra"}
    small = extracted(both)
    found = small(x, scale=scale)
    assert found["extra"][1] is None
    torch.testing.assert_close(found["logits"], graph(x, scale=scale)["logits"], rtol=0, atol=0)
    assert small.output_names == graph.output_names


def test_loss_with_a_state_of_its_own_leaves_no_trace():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("centre", torch.zeros(5))

        def forward(self, student, teacher):
            self.centre.mul_(0.9).add_(0.1 * teacher.mean(0))
            return (student - teacher - self.centre).square().mean()

    student, teacher = pair()
    x = images()
    graph = captured(student, x)
    both = merged(graph, teacher, x, [CustomLoss(function=Centred())])
    both(x)
    assert both.get_buffer("adapters.Centred_output.function.centre").abs().sum() > 0
    assert list(differences(listing(graph), listing(extracted(both)))) == []


def test_one_call_makes_a_student_with_weights_of_its_own():
    net = pair()[0].eval()
    x = images()
    both = passes.distilled_student(
        net, [passes.Prune(0.5)], (x,), dynamic_shapes={"image": {0: "batch"}}, losses=[ResponseLoss()], labels=LABELS
    )
    assert [step.status for step in both.report.steps] == ["changed", "changed"]
    own = {p.data_ptr() for name, p in both.named_parameters() if not name.startswith("teacher")}
    assert not own & {p.data_ptr() for p in net.parameters()}
    assert {p.data_ptr() for name, p in both.named_parameters() if name.startswith("teacher")} <= {
        p.data_ptr() for p in net.parameters()
    }
    assert isinstance(MergeTeacher(net, [ResponseLoss()]), passes.MergeTeacher)


def test_another_net_may_be_the_teacher():
    net, teacher = (each.eval() for each in pair())
    x = images()
    both = passes.distilled_student(
        net, [], (x,), dynamic_shapes={"image": {0: "batch"}}, losses=[ResponseLoss()], labels=LABELS, teacher=teacher
    )
    direct = merged(captured(net, x), teacher, x, [ResponseLoss()], labels=LABELS)
    assert torch.equal(both.eval()(x, LABELS)["loss"], direct.eval()(x, LABELS)["loss"])
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert {p.data_ptr() for name, p in both.named_parameters() if name.startswith("teacher")} <= theirs
