"""Complex numbers are written as pairs of real ones, since ONNX Runtime has no complex tensors."""

import pytest
import torch
from torch import nn

import fxopt
from fxopt.export import to_onnx
from tests.export.proof import captured, prove

X, Y = torch.randn(3, 4, 6), torch.randn(3, 4, 6)


class Rotary(nn.Module):
    """Rotary positions as complex factors (Su et al.: RoFormer, 2021)."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(16.0), 10.0 ** -torch.arange(3.0))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        pairs = torch.view_as_complex(x.unflatten(2, (3, 2)).contiguous())
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(2)


class Spectrum(nn.Module):
    """The magnitude of a transform that is a convolution with a complex kernel."""

    def __init__(self):
        super().__init__()
        self.real, self.imag = nn.Conv1d(4, 5, 3), nn.Conv1d(4, 5, 3)

    def forward(self, x):
        z = torch.complex(self.real(x), self.imag(x)).permute(0, 2, 1)
        return z.abs().clamp(min=1e-3).log10(), z.angle().cos()


def arithmetic(x, y):
    a, b = torch.complex(x, y), torch.complex(y, x + 1)
    c = a * b - 2 * a + b / (a + 3) - (b - 1j) * (2 + 0.5j)
    return torch.view_as_real(c), (a * x + y).imag, (1 - a).real, (b / y.abs().add(1)).real, (-a).imag


def conjugates(x, y):
    z = torch.complex(x, y)
    return (z * z.conj()).real, torch.view_as_real(z.conj().resolve_conj()), z.conj().imag


def powers(x, y):
    z = torch.exp(torch.complex(x, y))
    return z.abs(), torch.polar(x.abs(), y).imag


def moved(x, y):
    z = torch.complex(x, y)
    parts = torch.cat([z.transpose(-1, 1)[:, 1:3], z.permute(0, -1, 1)[:, -2:]], -2)
    one, two = parts.unsqueeze(-1).squeeze(-1).chunk(2, -1)
    stacked = torch.stack([one, two.flip(-1)], -1).reshape(z.shape[0], -1)
    return torch.view_as_real(stacked[:, 3:].unsqueeze(0).expand(2, -1, -1)), stacked.select(-1, 2).abs()


def reduced(x, y):
    z = torch.complex(x, y)
    return z.sum(-1).real, z.mean((1, -1)).imag, z.cumsum(-1).abs(), torch.view_as_real(z.sum((0, 1, 2)))


def reshaped(x, y):
    z = torch.complex(x, y)
    parts = z.flatten(1).unflatten(-1, (-1, 3)).narrow(1, 1, 4).repeat(1, 2, 1)
    return torch.view_as_real(parts * torch.tensor(0.5, dtype=torch.float64)), z.sum().abs(), z[0].mean().angle().cos()


def summed_in_another_type(x, y):
    z = torch.complex(x, y)
    wide = (
        z.sum(-1, dtype=torch.complex128),
        z.mean((1, 2), dtype=torch.complex128),
        z.cumsum(1, dtype=torch.complex128),
    )
    return *map(torch.view_as_real, wide), z.sum(dtype=torch.complex128).imag, x.sum(0, dtype=torch.complex64).real


def multiplied(x, y):
    a, b = torch.complex(x, y), torch.complex(y, x)
    return torch.view_as_real(a @ b.transpose(1, 2)), (a[0] @ torch.complex(y, y)[0].t()).abs()


def real_and_complex_together(x, y):
    z = torch.complex(x, y)
    return (
        torch.view_as_real(torch.cat([z, z.real.to(torch.complex64)], 1)),
        (z + x).imag,
        torch.complex(x, y[:1]).abs(),
    )


@pytest.mark.parametrize("model", [
    arithmetic, conjugates, powers, moved, reduced, reshaped, summed_in_another_type,
    multiplied, real_and_complex_together,
])  # fmt: skip
def test_complex_numbers_become_pairs(model):
    prove(model, X, Y)


def test_the_parts_of_a_value_are_read_once():
    def products(x, y):
        z = torch.complex(x, y)
        return (z * z).real, (z * (z + 1)).imag

    types = [node.op_type for node in prove(products, X, Y).model.graph]
    assert types.count("Gather") == 2 * 2 + 2  # parts of z and of z + 1, and one of each product


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize(("options", "shape"), [
    ({"n_fft": 64, "hop_length": 16, "window": torch.hann_window(64)}, (2, 400)),
    ({"n_fft": 60, "win_length": 41, "window": torch.hamming_window(41), "normalized": True}, (3, 333)),
    ({"n_fft": 33, "hop_length": 7, "onesided": False, "center": False, "win_length": 20}, (250,)),
])  # fmt: skip
def test_short_time_fourier_transforms_are_convolutions(options, shape):
    def spectra(x):
        z = torch.stft(x, **options, return_complex=True)
        return torch.view_as_real(z), z.abs()

    types = [node.op_type for node in prove(spectra, torch.randn(shape), dynamic=len(shape) > 1).model.graph]
    assert types.count("Conv") == 1


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_a_cast_to_real_numbers_drops_the_imaginary_part():
    prove(lambda x, y: torch.complex(x, y).to(torch.float32) * 2, X, Y)


@pytest.mark.parametrize("model", [Rotary(), Spectrum()], ids=["rotary", "spectrum"])
def test_models_that_compute_in_complex_numbers(model):
    gm = captured(model, X)
    before = str(gm.graph)
    file = prove(model, X)
    assert str(gm.graph) == before
    assert not any("COMPLEX" in str(value.dtype) for node in file.model.graph for value in node.outputs)


def test_complex_inputs_and_outputs_are_refused_with_the_way_out():
    with pytest.raises(fxopt.ExportError, match=r"(?s)takes complex numbers.*node +z.*torch.view_as_complex"):
        to_onnx(captured(lambda z: z.abs(), torch.complex(X, Y)))
    with pytest.raises(fxopt.ExportError, match=r"(?s)returns complex numbers.*torch.view_as_real"):
        to_onnx(captured(lambda x: torch.complex(x, x) * 2, X))


def test_an_operator_without_pairs_names_the_line():
    with pytest.raises(fxopt.ExportError, match=r"(?s)aten.tanh.default of complex numbers.*tanh\(\)"):
        to_onnx(captured(lambda x: torch.complex(x, x).tanh().real, X))
