"""A KV cache whose rows come and go: texts of different lengths, aligned at their last token.

Rows that are shorter have padding on their left, so every row writes its next token in the same place and a pass is one
batch. When the longest row leaves, the padding that nobody needs any more goes with it. Buffers have room to grow, so
a token is written in place instead of copying the whole cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Positions of spare room in a new buffer."""


class RowLayer(DynamicLayer):
    """Keys and values of one layer, [row, head, pos, d_head], within larger buffers."""

    length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        n = key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self._adopt(_buffer(key_states, n + ROOM), _buffer(value_states, n + ROOM), 0)
            self.is_initialized = True
        if self.length + n > self._keys.shape[-2]:
            room = n + max(ROOM, self.length // 4)
            self._adopt(*(_grown(b, self.length, room) for b in (self._keys, self._values)), self.length)
        self._keys[:, :, self.length : self.length + n] = key_states
        self._values[:, :, self.length : self.length + n] = value_states
        self._adopt(self._keys, self._values, self.length + n)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def select(self, rows: Sequence[int], drop: int) -> None:
        """Keep some rows, in this order, without their first `drop` positions, which are padding in all of them."""
        index = torch.tensor(rows, device=self._keys.device)
        parts = [b[:, :, drop : self.length].index_select(0, index) for b in (self._keys, self._values)]
        room = max(ROOM, self.length // 4)
        self._adopt(*(_grown(part, part.shape[-2], room) for part in parts), self.length - drop)

    def join(self, others: Sequence[tuple[RowLayer, Sequence[int]]]) -> None:
        """Add rows of other layers behind the present ones."""
        if not self.is_initialized:
            first = others[0][0]
            self.dtype, self.device = first.dtype, first.device
            self._adopt(first._keys[:0, :, :0], first._values[:0, :, :0], 0)
            self.is_initialized = True
        length = max(self.length, *(other.length for other, _ in others))
        keys, values = (
            _stacked(
                [(own, self.length, range(own.shape[0])), *((name(o), o.length, rows) for o, rows in others)], length
            )
            for own, name in ((self._keys, lambda o: o._keys), (self._values, lambda o: o._values))
        )
        self._adopt(keys, values, length)

    def _adopt(self, keys: Tensor, values: Tensor, length: int) -> None:
        self._keys, self._values, self.length = keys, values, length
        self.keys, self.values = keys[:, :, :length], values[:, :, :length]


class RowCache(Cache):
    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RowLayer)

    def select(self, rows: Sequence[int], drop: int = 0) -> None:
        for layer in self._rows():
            layer.select(rows, drop)

    def join(self, others: Sequence[tuple[RowCache, Sequence[int]]]) -> None:
        """Add rows of other caches, a cache's row as often as it is named. A cache that holds one row in some layers,
        because its rows were alike so far, is read as if it held it in every place."""
        for n in range(len(others[0][0].layers)):
            if len(self.layers) <= n:
                self.layers.append(RowLayer())
            layer = self.layers[n]
            assert isinstance(layer, RowLayer)
            layer.join([(other._rows()[n], rows) for other, rows in others])

    def _rows(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]


def _buffer(like: Tensor, capacity: int) -> Tensor:
    # Zeros, not whatever is in memory: padding is masked, but NaN times zero is NaN.
    return like.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])


def _grown(buffer: Tensor, length: int, room: int) -> Tensor:
    grown = _buffer(buffer, length + room)
    grown[:, :, :length] = buffer[:, :, :length]
    return grown


def _stacked(parts: Sequence[tuple[Tensor, int, Sequence[int]]], length: int) -> Tensor:
    """Rows of several buffers in one, each ending at `length`."""
    n_rows = sum(len(rows) for _, _, rows in parts)
    like = parts[-1][0]
    whole = like.new_zeros(n_rows, like.shape[1], length + max(ROOM, length // 4), like.shape[3])
    at = 0
    for buffer, own, rows in parts:
        if len(rows):
            shared = buffer.shape[0] == 1
            index = torch.tensor([0 if shared else row for row in rows], device=buffer.device)
            whole[at : at + len(rows), :, length - own : length] = buffer[:, :, :own].index_select(0, index)
        at += len(rows)
    return whole
