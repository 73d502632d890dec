"""Nets whose Python code branches on the values of tensors."""

import math

import torch
from torch import Tensor, nn


class Textbook(nn.Module):
    """Scale down what is long, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.norm().item() > 1:
            x = x / x.norm()
        return self.fc(x)


class TwoLayers(nn.Module):
    """A base for nets with two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)


class IfElse(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            y = self.first(x).relu()
        else:
            y = self.second(x).tanh()
        return y * 2


class Elif(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        score = x.mean().item()
        if score > 0.5:
            return self.first(x)
        elif score > 0:
            return self.second(x)
        elif score > -0.5:
            x = self.first(self.second(x))
        else:
            x = x * 0.5
        return x.relu()


class EarlyReturn(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if (x > -0.5).all():
            return x
        x = self.second(x)
        if x.abs().max() < 0.4:
            return x + 1
        return torch.sigmoid(x)


class NestedMayReturn(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = self.first(x)
            if x[0, 0] > 0:
                return x
            x = x * 2
        return self.second(x)


class Logic(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        total, peak = x.sum(), x.max().item()
        if (total > 0 and peak < 5) or not (x[0, 0] > 0):
            x = self.first(x)
        return x if total < -1 or (total > 1 and peak > 1) else self.second(x)


class Chained(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        if -1 < x.mean().item() * 10 < 1:
            return self.first(x)
        return self.second(x)


class ScalarMath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.abs().max())
        steps = int(scale) + 1
        if steps % 2 == 0 and math.sqrt(scale) > 1.2:
            x = x / scale
        bounded = min(max(scale, 0.5), 2.0)
        return x * bounded + steps // 2 - abs(-steps)


class Asserted(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all(), "x must be finite"
        if x.abs().max() > 1e6:
            raise ValueError("x is too large")
        if x.sum() > 0:
            return self.first(x)
        return self.second(x)


class Router(nn.Module):
    """A mixture of experts that runs only the expert it picks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(10, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 10)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.gate(x).mean(0).argmax().item()
        out = x
        for number, expert in enumerate(self.experts):
            if choice == number:
                out = expert(x)
        return out + x


def helper_scaled(x: Tensor, limit: float = 1.0) -> Tensor:
    size = x.norm()
    if size > limit:
        return x / size
    return x


class InHelper(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        return helper_scaled(self.second(helper_scaled(self.first(x), limit=2.0)))


class Gate(nn.Module):
    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.fc = threshold, nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > self.threshold:
            x = self.fc(x)
        return x


class Scaler(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std() if x.std() > 1 else x


class InSubmodules(nn.Module):
    """Three submodules of two classes branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Gate(0.0), Scaler(), Gate(-0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class OneSideDefines(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        busy = x.sum() > 0
        if busy:
            extra = self.first(x)
            note = extra.sum()
        else:
            other = x + 1
        if busy:
            y = extra * note
        else:
            y = self.second(other)
        return y


class InPlace(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        row = y[0]
        if y.sum() > 0:
            y[:, 0] = 0
            row += 1
        else:
            y.mul_(2)
        return y + row


class Appends(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        best = {"score": x.sum()}
        if x.mean() > 0:
            found.append(self.first(x))
            best["score"] = found[-1].sum()
        else:
            found.append(self.second(x))
        return torch.stack(found).sum(0) * best["score"]


class SetsAttribute(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        if x.mean() > 0:
            self.last = self.first(x)
        return self.last * 2


class Counter(TwoLayers):
    """A buffer counts how often a side was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taken", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            self.taken += 1
            x = self.first(x)
        return x + self.taken


class Dropped(TwoLayers):
    """Dropout and batch norm on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(10), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            return self.drop(self.norm(self.first(x)))
        return self.second(x)


class Listed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        low, middle, high = x.mean(0)[:3].tolist()
        if low < middle and middle < high:
            return x * low
        return x + max(low, middle, high)


class BoolOf(TwoLayers):
    def forward(self, x: Tensor, flag: Tensor) -> Tensor:
        use = bool(flag)
        if use:
            x = self.first(x)
        if not use or x.sum() > 0:
            x = x + 1
        return x


class Comparisons(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x[0, 0].item(), x[0, 1].item(), x[0, 2].item()
        if a < b < c or (a > b and b > c):
            return self.first(x)
        return x * (a if a > b else b)


class Closure(TwoLayers):
    def forward(self, x: Tensor) -> Tensor:
        limit = x.mean()

        def pick(a: Tensor, b: Tensor) -> Tensor:
            return a if limit > 0 else b

        return pick(self.first(x), self.second(x))


class Inherited(Gate):
    def __init__(self) -> None:
        super().__init__(0.0)
        self.__scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 1:
            x = super().forward(x)
        return x * self.__scale


class SizeBranch(TwoLayers):
    """Decides on the number of rows, which is dynamic, and then on a value as well."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            x = self.first(x)
        if x.size(0) % 2 == 0 and x.sum() > 0:
            return x * 2
        return x


class CountedSlice(nn.Module):
    """Slices by a number of elements, then decides on that number."""

    def forward(self, x: Tensor) -> Tensor:
        count = int((x > 0).sum())
        chosen = x.flatten()[:count]
        if count > 12:
            return chosen.sum()
        return x.flatten().topk(min(count, 3) + 1).values.sum() - chosen.sum()


class Walrus(nn.Module):
    """Binds a name inside a test, and asks two tensors whether they are close."""

    def forward(self, x: Tensor) -> Tensor:
        if (total := x.sum()) > 0 and total < 50:
            x = x * total
        if torch.allclose(x, x.round(), atol=0.4):
            return x.round()
        return x


class NormOnOneSide(TwoLayers):
    """Batch norm on one side only: in training that side also counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.first(x)
        return self.norm(self.second(x))
