"""Random small nets: a few steps, each of which makes a value out of earlier ones."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.prune.nets import net

CHANNELS = 8  # of the values between the steps; every step but the last one of a path keeps it, and 4 x 4 places
Step = tuple[str, int, int]  # what it does, the number of the value that it reads, and of another one, both from behind


def _heads(y: Tensor) -> Tensor:
    """Attention among the places, in two heads."""
    query, key, value = (part.flatten(2).unflatten(1, (2, -1)).transpose(2, 3) for part in y.chunk(3, 1))
    return F.scaled_dot_product_attention(query, key, value).transpose(2, 3).reshape(y.shape[0], CHANNELS, 4, 4)


# Steps with a layer: how it is made, and what is computed with it.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "conv": (lambda: nn.Conv2d(8, 8, 1), lambda layer, x: layer(x)),
    "padded": (lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False), lambda layer, x: layer(x)),
    "reflecting": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), lambda layer, x: layer(x)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2), lambda layer, x: layer(x)),
    "depthwise": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), lambda layer, x: layer(x)[:, ::2]),
    "up": (lambda: nn.ConvTranspose2d(8, 8, 2, 2), lambda layer, x: F.max_pool2d(layer(x), 2)),
    "up by groups": (lambda: nn.ConvTranspose2d(8, 8, 3, padding=1, groups=4), lambda layer, x: layer(x)),
    "norm": (lambda: nn.BatchNorm2d(8), lambda layer, x: layer(x)),
    "layer norm": (lambda: nn.LayerNorm(8), lambda layer, x: layer(x.movedim(1, -1)).movedim(-1, 1)),
    "group norm": (lambda: nn.GroupNorm(4, 8), lambda layer, x: layer(x)),
    "linear": (lambda: nn.Linear(8, 8), lambda layer, x: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "shuffled": (lambda: nn.Conv2d(8, 32, 1), lambda layer, x: F.max_pool2d(F.pixel_shuffle(layer(x), 2), 2)),
    "gated": (lambda: nn.Conv2d(8, 16, 1), lambda layer, x: F.glu(layer(x), 1)),
    "attention": (lambda: nn.Conv2d(8, 24, 1), lambda layer, x: _heads(layer(x))),
    "excited": (lambda: nn.Conv2d(8, 8, 1), lambda layer, x: x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True)))),
    "flat": (lambda: nn.Linear(128, 8), lambda layer, x: layer(x.flatten(1)).view(-1, 8, 1, 1).expand(-1, 8, 4, 4)),
}

# Steps without one, of two values.
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, y: F.relu(x),
    "gelu": lambda x, y: F.gelu(x) * 2 - 1,
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * torch.tanh(y),
    "choose": lambda x, y: torch.where(x > y, x, 0.5 * y),
    "halves": lambda x, y: torch.cat([x.chunk(2, 1)[1], y[:, :4]], 1),
    "sum of halves": lambda x, y: sum(torch.cat([x, y], 1).split([8, 8], 1)),
    "slices": lambda x, y: torch.cat([x[:, 1:5], y[:, -4:]], 1),
    "turned round": lambda x, y: x.flip(1) + y.flip(3),
    "dealt": lambda x, y: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2) - y,
    "repeated": lambda x, y: x[:, ::2].repeat_interleave(2, 1) + y[:, :4].repeat(1, 2, 1, 1),
    "padded channels": lambda x, y: F.pad(x[:, :4], (0, 0, 0, 0, 2, 2)) + y,
    "stacked": lambda x, y: torch.stack([x, y], 1).mean(1) + torch.stack([y, x], 2).flatten(1, 2)[:, ::2],
    "largest": lambda x, y: x * y.amax((2, 3), keepdim=True),
    "products": lambda x, y: (x.flatten(2) @ y.flatten(2).transpose(1, 2) @ y.flatten(2)).view(x.shape) * 0.1,
    "einsum": lambda x, y: torch.einsum("bchw,bdhw,bdij->bcij", x, y, y) * 0.1,
    "written": lambda x, y: torch.slice_scatter(x, y[:, :3], 1, 4, 7),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of a net, and how many of its last values are returned, each through a layer of its own."""

    steps: tuple[Step, ...]
    outputs: int

    def build(self) -> nn.Module:
        """Make the net, f64, with random parameters."""
        layers = nn.ModuleDict({"first": nn.Conv2d(3, CHANNELS, 1)})
        for number, (kind, _, _) in enumerate(self.steps):
            if kind in LAYERS:
                layers[f"step{number}"] = LAYERS[kind][0]()
        for number in range(self.outputs):
            layers[f"last{number}"] = nn.Conv2d(CHANNELS, 3, 3)

        def forward(module: nn.Module, x: Tensor) -> list[Tensor]:
            values = [layers["first"](x)]
            for number, (kind, one, other) in enumerate(self.steps):
                first, second = values[-1 - one % len(values)], values[-1 - other % len(values)]
                if kind in LAYERS:
                    values.append(LAYERS[kind][1](layers[f"step{number}"], first))
                else:
                    values.append(FUNCTIONS[kind](first, second))
            return [layers[f"last{n}"](values[-1 - n % len(values)]) for n in range(self.outputs)]

        return net(forward, layers=layers).double()


STEPS = st.tuples(st.sampled_from([*LAYERS, *LAYERS, *FUNCTIONS]), st.integers(0, 2), st.integers(0, 3))
PROGRAMS = st.builds(Program, st.lists(STEPS, min_size=2, max_size=7).map(tuple), st.integers(1, 2))
