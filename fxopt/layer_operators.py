"""ATen's operators of layers, as lists that passes and the export share."""

from __future__ import annotations

import torch

from fxopt.recurrent import RECURRENT_OPERATORS

__all__ = ["CELLS", "CONVOLUTIONS", "MAX_POOLS", "RECURRENT", "TRANSPOSED_CONVOLUTIONS"]

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding,
    aten.conv3d.default, aten.conv3d.padding,
)  # fmt: skip
"""Convolutions whose weight has its output channels along axis 0, and the input channels of a group along axis 1."""

TRANSPOSED_CONVOLUTIONS = (
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
)  # fmt: skip
"""Convolutions whose weight has its input channels along axis 0, and the output channels of a group along axis 1."""

MAX_POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
"""Pools that yield the largest value of each window, and nothing else."""

RECURRENT = tuple(RECURRENT_OPERATORS.values())
"""LSTM, GRU and RNN on padded sequences."""

CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
"""One step of one layer of these."""
