"""Bad input to the command line, and what each gets: ``python -m tests.tools.bad_inputs`` prints the table."""

import contextlib
import dataclasses
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator

import torch
from torch import nn
from typer.testing import CliRunner

import fxopt
from fxopt.export import to_onnx
from fxopt.tools.cli import app

FAILED, USAGE = 1, 2

MODELS = """
import torch
from torch import nn

number = 3

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x).relu()

class NeedsWidth(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, 3)

class Raises(Net):
    def forward(self, x):
        raise RuntimeError("the tank is empty")

class Text(Net):
    def forward(self, x):
        return "a text"

class Branch(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return x

class Fixed(Net):
    def forward(self, x):
        return self.linear(x.reshape(2, 4))

class WritesInput(Net):
    def forward(self, x):
        x.add_(1)
        return self.linear(x)

class Random(Net):
    def forward(self, x):
        return self.linear(x), torch.cholesky_inverse(x.T @ x + torch.eye(4))

class TwoInputs(Net):
    def forward(self, x, y):
        return self.linear(x + y)

def broken():
    net = Net()
    with torch.no_grad():
        net.linear.weight[1, 2] = float("nan")
    return net

class Exits(Net):
    def forward(self, x):
        raise SystemExit(0)

class Nothing(Net):
    def forward(self, x):
        self.linear(x)

class Diverged(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.full((3,), float("nan")))

def of_width(width):
    return Net()

def raising_factory():
    raise KeyError("weights.bin")

def makes_text():
    return "no model"
"""


class Net(nn.Module):
    """The net of ``models.py``, to write files from."""

    def __init__(self, inputs: int = 1) -> None:
        super().__init__()
        self.inputs = inputs
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x if y is None else x + y).relu()


@dataclasses.dataclass(frozen=True)
class BadInput:
    """One wrong command.

    Attributes:
        title: What is wrong.
        command: Arguments as a shell would split them.
        status: The exit status it must have.
        message: Text that stderr must hold.
    """

    title: str
    command: str
    status: int
    message: str


_NET = "optimize models.py:Net -o out.onnx --inputs"
_OK = "--inputs 'f32[batch,4]' -o out.onnx"

BAD_INPUTS = (
    # the inputs
    BadInput("wrong shape", f"{_NET} 'f32[batch,5]'", USAGE, "mat1 and mat2 shapes cannot be multiplied"),
    BadInput("wrong element type", f"{_NET} 'i64[batch,4]'", USAGE, "must have the same dtype"),
    BadInput("size 0", f"{_NET} 'f32[0,4]'", USAGE, "a tensor of size 0 holds nothing"),
    BadInput("unknown element type", f"{_NET} 'f31[batch,4]'", USAGE, "'f31' is not an element type"),
    BadInput("bracket left open", f"{_NET} 'f32[batch,4'", USAGE, "this '[' is never closed"),
    BadInput("size that is none", f"{_NET} 'f32[batch,-4]'", USAGE, "'-4' is not a size"),
    BadInput("range upside down", f"{_NET} 'i64[batch,4]{{9..3}}'", USAGE, "{9..3} holds no value"),
    BadInput("empty spec", f"{_NET} ''", USAGE, "the input spec is empty"),
    BadInput("no inputs", "optimize models.py:Net -o out.onnx", USAGE, "the model needs example inputs"),
    BadInput("too many inputs", f"{_NET} 'f32[batch,4]; f32[batch,4]'", USAGE, "too many positional arguments"),
    BadInput("too few inputs", f"optimize models.py:TwoInputs {_OK}", USAGE, "missing a required argument"),
    BadInput("input of another name", f"{_NET} 'image=f32[batch,4]'", USAGE, "0 without a name, image"),
    BadInput("missing file of inputs", f"{_NET} nowhere.npy", USAGE, "there is no file nowhere.npy"),
    BadInput("damaged file of inputs", f"{_NET} damaged.npz", USAGE, "damaged.npz is not a file of numpy arrays"),
    BadInput("file of inputs with an empty batch", f"{_NET} empty.pt", USAGE, "holds no element"),
    BadInput("axis that is not there", f"{_NET} 'f32[2,4]' --dynamic '0:2=n'", USAGE, "has no axis 2"),
    # the model
    BadInput("missing file", f"optimize nowhere.py:Net {_OK}", USAGE, "there is no file nowhere.py"),
    BadInput("missing module", f"optimize no_such_package.nets:Net {_OK}", USAGE, "there is no module"),
    BadInput("misspelt class", f"optimize models.py:Nett {_OK}", USAGE, "models.py has no 'Nett'"),
    BadInput("no class named", f"optimize models.py {_OK}", USAGE, "models.py does not say which model"),
    BadInput("class that needs arguments", f"optimize models.py:NeedsWidth {_OK}", USAGE, "needs arguments"),
    BadInput("not a model", f"optimize models.py:number {_OK}", USAGE, "not a model, but a value of type int"),
    BadInput(
        "factory of something else",
        f"optimize models.py:makes_text {_OK}",
        USAGE,
        "not a model, but a value of type str",
    ),
    BadInput("factory that raises", f"optimize models.py:raising_factory {_OK}", USAGE, "making the model fails"),
    BadInput("syntax error in the file", f"optimize syntax.py:Net {_OK}", USAGE, "importing syntax.py fails"),
    BadInput("import error in the file", f"optimize imports.py:Net {_OK}", USAGE, "importing imports.py fails"),
    BadInput("file that exits", f"optimize exits.py:Net {_OK}", USAGE, "importing exits.py fails: SystemExit"),
    BadInput("model that raises", f"optimize models.py:Raises {_OK}", USAGE, "the tank is empty"),
    BadInput("output that is no tensor", f"optimize models.py:Text {_OK}", USAGE, "neither a tensor nor a number"),
    BadInput(
        "output that is nothing", f"optimize models.py:Nothing {_OK}", USAGE, "models.py:Nothing returns no tensor"
    ),
    BadInput("model that exits", f"optimize models.py:Exits {_OK}", USAGE, "the model ends the program: SystemExit: 0"),
    BadInput("factory that needs arguments", f"optimize models.py:of_width {_OK}", USAGE, "models.py:of_width needs"),
    BadInput(
        "file of a package", f"optimize package/net.py:Net {_OK}", USAGE, "package.net:NAME from the folder above"
    ),
    BadInput("model of an unknown format", f"optimize weights.bin {_OK}", USAGE, "weights.bin is not a saved graph"),
    BadInput("buffer of NaN", f"optimize models.py:Diverged {_OK}", USAGE, "buffer 'mean' holds NaN"),
    BadInput("weights of NaN", f"optimize models.py:broken {_OK}", USAGE, "'linear.weight' holds NaN"),
    BadInput("sides of two shapes", f"optimize models.py:Branch {_OK}", USAGE, "the two sides of a branch cannot"),
    BadInput("dynamic size that the model fixes", f"optimize models.py:Fixed {_OK}", USAGE, "batch = 2"),
    BadInput(
        "write into an input", f"optimize models.py:WritesInput {_OK}", USAGE, "writes into the model's input 'x'"
    ),
    BadInput(
        "operator that ONNX lacks",
        f"optimize models.py:Random {_OK}",
        FAILED,
        "aten.cholesky_inverse.default has no ONNX translation",
    ),
    BadInput("damaged graph file", f"optimize damaged.fxopt {_OK}", USAGE, "is not a saved graph, or is damaged"),
    BadInput("foreign torch file", f"optimize weights.fxopt {_OK}", USAGE, "is a torch file, and not a saved graph"),
    BadInput(
        "damaged exported program",
        f"optimize damaged.pt2 {_OK}",
        USAGE,
        "damaged.pt2 is no .pt2 of torch.export, or is damaged",
    ),
    BadInput(
        "graph with a fixed size",
        f"optimize fixed.fxopt {_OK}",
        USAGE,
        "axis 0 of input 'x' is fixed in the saved model",
    ),
    # passes and options
    BadInput("misspelt pass", f"optimize models.py:Net -p fold-batchnorm {_OK}", USAGE, "no pass 'fold-batchnorm'"),
    BadInput(
        "misspelt option of a pass",
        f"optimize models.py:Net -p 'fold-constants{{max=1}}' {_OK}",
        USAGE,
        "has no option 'max'",
    ),
    BadInput(
        "wrong value of an option",
        f"optimize models.py:Net -p 'fold-constants{{parameters=7}}' {_OK}",
        USAGE,
        "is '7'; wanted bool",
    ),
    BadInput(
        "options left open",
        f"optimize models.py:Net -p 'fold-constants{{parameters=true' {_OK}",
        USAGE,
        "are not closed",
    ),
    BadInput("misspelt option", f"optimize models.py:Net --opest 20 {_OK}", USAGE, "No such option: --opest"),
    BadInput("option without a value", f"optimize models.py:Net {_OK} --opset", USAGE, "--opset"),
    BadInput("opset that is no number", f"optimize models.py:Net {_OK} --opset new", USAGE, "--opset"),
    BadInput("opset too old", f"optimize models.py:Net {_OK} --opset 9", USAGE, "opset 9 cannot be written"),
    BadInput("unknown kind of check", f"optimize models.py:Net {_OK} --check most", USAGE, "most"),
    BadInput("ONNX file in train mode", f"optimize models.py:Net {_OK} --train", USAGE, "which only evaluates"),
    BadInput("unknown command", "optimise models.py:Net", USAGE, "Did you mean 'optimize'?"),
    # the output
    BadInput("no output", "optimize models.py:Net --inputs 'f32[batch,4]'", USAGE, "-o"),
    BadInput("unknown format", f"{_NET} 'f32[batch,4]' -o out.tflite", USAGE, "cannot tell the format of out.tflite"),
    BadInput("folder as output", f"{_NET} 'f32[batch,4]' -o folder.onnx", USAGE, "it is a folder"),
    BadInput("output in no folder", f"{_NET} 'f32[batch,4]' -o no/out.onnx", USAGE, "there is no folder no"),
    BadInput("unwritable output", f"{_NET} 'f32[batch,4]' -o /proc/out.onnx", USAGE, "cannot write /proc/out.onnx"),
    BadInput("name too long", f"{_NET} 'f32[batch,4]' -o {'n' * 300}.onnx", USAGE, "File name too long"),
    BadInput("file as folder", f"{_NET} 'f32[batch,4]' -o models.py/out.onnx", USAGE, "there is no folder models.py"),
    BadInput("option of ONNX for a graph", f"{_NET} 'f32[batch,4]' -o o.fxopt --opset 20", USAGE, "--opset goes with"),
    # the ONNX file
    BadInput("missing ONNX file", f"validate no.onnx --against models.py:Net {_OK[:23]}", USAGE, "there is no file"),
    BadInput(
        "not an ONNX file", f"validate text.onnx --against models.py:Net {_OK[:23]}", USAGE, "does not accept the model"
    ),
    BadInput("ONNX as model", f"optimize good.onnx {_OK}", USAGE, "is an ONNX file already"),
    BadInput("ONNX with other inputs", f"validate two.onnx --against models.py:Net {_OK[:23]}", FAILED, "other inputs"),
    BadInput(
        "ONNX with other weights",
        f"validate good.onnx --against models.py:Net {_OK[:23]}",
        FAILED,
        "breaks contract ROUNDING",
    ),
)


def prepare(folder: pathlib.Path) -> None:
    """Write the files that the commands name."""
    (folder / "models.py").write_text(MODELS)
    (folder / "syntax.py").write_text("class Net(:\n    pass\n")
    (folder / "imports.py").write_text("import no_such_package\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    (folder / "package").mkdir()
    (folder / "package" / "net.py").write_text("from .layers import Net\n")
    (folder / "text.onnx").write_text("no protobuf")
    (folder / "weights.bin").write_bytes(bytes(range(256)))
    (folder / "folder.onnx").mkdir()
    for name in ("damaged.npz", "damaged.fxopt", "damaged.pt2"):
        (folder / name).write_bytes(b"PK\x03\x04 cut off")
    torch.save(torch.zeros(0, 4), folder / "empty.pt")
    torch.save(Net().state_dict(), folder / "weights.fxopt")
    torch.manual_seed(1)
    x = torch.randn(2, 4)
    batch = {"x": {0: "batch"}}
    to_onnx(Net().eval(), folder / "good.onnx", example_inputs=(x,), dynamic_shapes=batch, validate=False)
    both = batch | {"y": {0: "batch"}}
    to_onnx(Net().eval(), folder / "two.onnx", example_inputs=(x, x + 1), dynamic_shapes=both, validate=False)
    fxopt.save(fxopt.capture(Net().eval(), (x,)), folder / "fixed.fxopt")


@contextlib.contextmanager
def inside(folder: pathlib.Path) -> Iterator[None]:
    """Work in a folder; undo what loading models there does to the interpreter."""
    before, path, modules = pathlib.Path.cwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in {"models", "net", "syntax", "imports", "exits"} & (set(sys.modules) - modules):
            del sys.modules[name]


def run(case: BadInput, folder: pathlib.Path) -> tuple[int, str, str]:
    """Return exit status, stdout and stderr of the command."""
    with inside(folder):
        result = CliRunner().invoke(app, shlex.split(case.command), prog_name="fxopt", env={"COLUMNS": "200"})
    return result.exit_code, result.stdout, result.stderr


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        prepare(folder)
        for number, case in enumerate(BAD_INPUTS, start=1):
            status, _, stderr = run(case, folder)
            error = stderr.strip().replace("\n", "\n   ")
            sys.stdout.write(f"{number}. {case.title}: fxopt {case.command}\n   exit status {status}\n   {error}\n\n")


if __name__ == "__main__":
    main()
