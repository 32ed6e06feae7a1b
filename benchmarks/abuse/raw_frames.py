"""Frames that may be anything, for attackers and for tests of what a server makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from shoal.net.wire import codec
from shoal.protocol import Close

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Raw:
    """One frame, which may be anything."""

    header: bytes
    payload: bytes = b""


def raw(kind: object, tensors: Tensors | None = None, **fields: Any) -> Raw:
    """A frame as the protocol would write it, with any fields."""
    sent: Any = tensors or {}
    declared, buffers = codec.encode(Close(), sent)
    header = {"kind": kind, **fields}
    if sent:
        header["tensors"] = json.loads(declared)["tensors"]
    return Raw(json.dumps(header).encode(), b"".join(buffers))
