"""Cuts KV caches into chunks as a server does, independently of the client's code."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import google_crc32c
import numpy as np
from pbs_client import _messages

KvChunk = _messages._message_class("pbs.v1.KvChunk")

EPOCH = 0x1234_5678_9ABC_DEF0


@dataclass
class Cache:
    """Random K and V: arrays[layer][kind] is [heads, tokens, dim]."""

    arrays: list[dict[str, np.ndarray]]

    @classmethod
    def random(cls, layers, heads, tokens, dim, dtype=np.float32, seed=1) -> Cache:
        rng = np.random.default_rng(seed)
        shape = (heads, tokens, dim)
        return cls(
            [
                {kind: rng.standard_normal(shape).astype(dtype) for kind in "KV"}
                for _ in range(layers)
            ]
        )

    def chunks(
        self, *, tokens_per_chunk=3, layout="HND", checksums=True, first_layer=0
    ):
        """KvChunk messages of all layers; HND chunks stay inside one head."""
        for layer, arrays in enumerate(self.arrays[first_layer:], first_layer):
            digest, made = 0, []
            for kind in "KV":
                made += self._array_chunks(layer, kind, tokens_per_chunk, layout)
            for chunk in made:
                if checksums:
                    chunk.crc32c = google_crc32c.value(chunk.payload)
                    digest = google_crc32c.extend(
                        digest, struct.pack("<I", chunk.crc32c)
                    )
            if checksums:
                made[-1].layer_digest = digest
            assert arrays is self.arrays[layer]
            yield from made

    def _array_chunks(self, layer, kind, tokens_per_chunk, layout):
        array = self.arrays[layer][kind]
        heads, tokens, dim = array.shape
        if layout == "NHD":
            array = np.ascontiguousarray(array.transpose(1, 0, 2))
        data = array.tobytes()
        row = dim * array.dtype.itemsize
        rectangles = [
            (0, heads, begin) if layout == "NHD" else (head, 1, begin)
            for head in ([0] if layout == "NHD" else range(heads))
            for begin in range(0, tokens, tokens_per_chunk)
        ]
        offset = 0
        for head, head_count, begin in rectangles:
            count = min(tokens_per_chunk, tokens - begin)
            size = head_count * count * row
            yield KvChunk(
                ticket_epoch=EPOCH,
                layer=layer,
                kind=kind,
                token_begin=begin,
                token_count=count,
                head_begin=head,
                head_count=head_count,
                dtype={4: "F32", 2: "F16"}[array.dtype.itemsize],
                layout=layout,
                byte_offset=offset,
                payload=data[offset : offset + size],
            )
            offset += size
