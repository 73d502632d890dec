"""Attention, recurrence, embeddings and the plain MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.base import Example, Net


class Mlp(Net):
    """Linear, GELU and a linear without bias: the smallest net with a matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 12))


class Attention(nn.Module):
    """Self-attention with query, key and value in one linear of [3 * heads * width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, s, d = x.shape
        q, k, v = self.qkv(x).reshape(n, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, s, d))


class MiniViT(Net):
    """Patch embedding, class token, positions, one pre-norm block with qkv in one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.attention, self.mlp = nn.Conv2d(3, 16, 4, 4), Attention(16, 4), nn.Linear(16, 16)
        self.norm1, self.norm2, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 10)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        x = x + self.attention(self.norm1(x))
        return self.head((x + F.gelu(self.mlp(self.norm2(x))))[:, 0])

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 3, 8, 8))


class MaskedEncoder(Net):
    """Token encoder with a padding mask and a causal mask; length varies; padded rows of attention are finite."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.norm = nn.Embedding(30, 16, padding_idx=0), Attention(16, 2), nn.LayerNorm(16)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        x = self.embed(ids)
        return self.norm(x + self.attention(x, causal & mask[:, None, None, :].bool())) * mask[..., None]

    def example(self, batch: int = 2) -> Example:
        mask = torch.ones(batch, 6, dtype=torch.int64)
        mask[-1, 4:] = 0
        axes = {0: "batch", 1: "length"}
        return self._batched(torch.randint(1, 30, (batch, 6)) * mask, mask, ids=axes, mask=axes)


class TiedLm(Net):
    """Language model whose output layer is the embedding's own weight, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mid(self.embed(ids))))

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randint(0, 20, (batch, 5)), ids={0: "batch", 1: "length"})


class RecurrentNet(Net):
    """Base of the recurrent nets on f32[batch, length, 5]: a linear on all steps, and the last hidden state."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size * (1 + rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        steps, state = self.rnn(x)
        return self.head(steps), state[0] if isinstance(state, tuple) else state

    def example(self, batch: int = 2) -> Example:
        return self._batched(torch.randn(batch, 7, 5), x={0: "batch", 1: "length"})


class LstmNet(RecurrentNet):
    """Two-layer bidirectional LSTM with dropout between its layers."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM(5, 6, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2))


class GruNet(RecurrentNet):
    """One-layer GRU without biases."""

    def __init__(self) -> None:
        super().__init__(nn.GRU(5, 6, batch_first=True, bias=False))


class FrameworkEncoder(Net):
    """torch's own TransformerEncoder, with its padding mask and, in eval mode, its fused fast path."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)

    def example(self, batch: int = 2) -> Example:
        padding = torch.zeros(batch, 5, dtype=torch.bool)
        padding[-1, 3:] = True
        axes = {0: "batch", 1: "length"}
        return self._batched(torch.randn(batch, 5, 8), padding, x=axes, padding=axes)


class Dlrm(Net):
    """Recommendation net: dense features, one bag by offsets and one of fixed size, pairwise products.

    The number of ids is a dimension of its own: bags may be empty, and their sizes vary.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sums, self.means = nn.EmbeddingBag(50, 8, mode="sum"), nn.EmbeddingBag(40, 8, mode="mean")
        self.dense, self.top = nn.Linear(13, 8), nn.Linear(8 + 3, 1)

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor, genres: Tensor) -> Tensor:
        x = F.relu(self.dense(dense))
        features = torch.stack([x, self.sums(ids, offsets), self.means(genres)], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        rows, columns = torch.tril_indices(3, 3, offset=-1)
        return torch.sigmoid(self.top(torch.cat([x, products[:, rows, columns]], dim=1))).squeeze(1)

    def example(self, batch: int = 2) -> Example:
        offsets = torch.arange(batch) * 2
        offsets[-1] = 2 * batch - 1 if batch > 1 else 0
        return self._batched(
            torch.randn(batch, 13),
            torch.randint(0, 50, (2 * batch + 1,)),
            offsets,
            torch.randint(0, 40, (batch, 4)),
            dense={0: "batch"},
            ids={0: "ids"},
            offsets={0: "batch"},
            genres={0: "batch"},
        )
