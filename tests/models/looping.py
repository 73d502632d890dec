"""Nets whose Python code loops as often as the values of tensors say."""

import torch
from torch import Tensor, nn


class WhileLoop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            x = x * 0.5
        return x + 1


class CountedWhile(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        count, total = 0, 0
        while total < 5 and count < 20:
            total = total + x.abs().mean()
            count += 1
        return x * count, torch.as_tensor(total)


class ForRange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(int(x.abs().max() * 2)):
            x = x * 0.9 + i
        return x


class ForRangeFromTo(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(1, n.item() + 1, 2):
            out = out + x / i
        return out


class WriteByIndex(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        out = torch.zeros(x.shape[0], 8)
        state = x.mean(1)
        for i in range(int(n)):
            state = torch.tanh(state + x[:, i])
            out[:, i] = state
        return out


class BreakContinue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(10, 10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if x[0, 0] > 1:
                continue
            x = layer(x).tanh()
            if x.mean() > 0.1:
                break
        return x


class ReturnFromLoop(BreakContinue):
    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if x.mean() > 0.05:
                return x + number
        return x * 2


class WhileTrue(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while True:
            x = x * 0.5
            steps += 1
            if x.norm() < 1:
                break
            if steps > 6:
                return x - 1
        return x + steps


class Halting(nn.Module):
    """Adaptive computation time: repeat a cell until it says that it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt = nn.GRUCell(10, 10), nn.Linear(10, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state, halted, steps = torch.zeros_like(x), torch.zeros(x.shape[0]), torch.zeros(())
        while halted.min() < 0.99 and steps < 8:
            state = self.cell(x, state)
            halted = halted + torch.sigmoid(self.halt(state)).squeeze(1)
            steps = steps + 1
        return state, steps


class Beam(nn.Module):
    """Greedy decoding of one sequence into a buffer, until the end token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(12, 10), nn.GRUCell(10, 10), nn.Linear(10, 12)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        state = x
        tokens = torch.zeros(x.shape[0], 8, dtype=torch.int64)
        token = torch.ones(x.shape[0], dtype=torch.int64)
        length = 0
        while length < 8:
            state = self.cell(self.embed(token), state)
            token = self.head(state).argmax(-1)
            tokens[:, length] = token
            length += 1
            if (token < 2).any():
                break
        return tokens, torch.tensor(length)


class NestedLoops(nn.Module):
    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for i in range(int(n)):
            while x.abs().max() > 2:
                x = x / 2
            if x.sum() > 0:
                x = x + i
            else:
                x = x * 3
        return x


class LoopMany(nn.Module):
    """Newton's iteration with a tuple that goes from turn to turn."""

    def forward(self, x: Tensor) -> Tensor:
        target = x.abs().sum() + 1
        guess, error = target / 2, target
        while error > 1e-3:
            guess, error = (guess + target / guess) / 2, (guess * guess - target).abs() / target
        return x / guess


class OverRows(nn.Module):
    """Loops over a dynamic size, and branches inside."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        total, taken = torch.zeros(x.shape[1]), 0
        for i in range(x.shape[0]):
            if x[i].sum() > 0:
                total = total + x[i]
                taken += 1
        return total, taken
