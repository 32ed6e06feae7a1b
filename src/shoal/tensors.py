"""How a message declares its tensors: their names, dtypes, shapes and encodings, and the bytes that they take."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from shoal.strict import Strict

MAX_DIMENSION = 1 << 26
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "uint8": 1}
TENSOR_ALIGNMENT = 16

DType = Literal["float32", "bfloat16", "float16", "int64", "uint8"]
Encoding = Literal["raw", "bfloat16", "int8"]
LOSSY: dict[Encoding, frozenset[DType]] = {
    "bfloat16": frozenset({"float32"}),
    "int8": frozenset({"float32", "bfloat16", "float16"}),
}
"""The encodings that lose precision, each with the dtypes that it may be used for."""
ENCODED = frozenset({"hidden", "grad"})
"""The names of tensors that may be sent in a lossy encoding."""
PACKABLE: dict[DType, frozenset[Encoding]] = {
    "float32": frozenset({"raw", "bfloat16"}),
    "bfloat16": frozenset({"raw"}),
    "float16": frozenset({"raw"}),
}
"""The dtypes whose tensors may be packed without loss, each with the encodings in which they may."""
PACKED = "packed"
"""What servers announce, beside their encodings, that unpack tensors."""
INT8_BLOCK = 64
"""The number of values with a common scale (their peak) in the int8 encoding."""
TensorName = Literal[
    "hidden",
    "positions",
    "mask",
    "grad",
    "digests",
    "logits",
    "ids",
    "factors",
    "factor_grads",
    "filler",
    "content",
]


class TensorSpec(Strict):
    """One tensor of a frame's payload. Tensors are in the order of declaration, aligned to 16 bytes.

    `dtype` is that of the computation, `encoding` the form in which the tensor is sent. A tensor whose numbers are
    packed (`shoal.net.wire.packing`) takes `packed` bytes.
    """

    name: TensorName
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_DIMENSION)], ...], Field(max_length=4, strict=False)]
    encoding: Encoding = "raw"
    packed: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _encoding_fits(self) -> TensorSpec:
        if self.encoding != "raw" and (
            self.name not in ENCODED or self.dtype not in LOSSY[self.encoding] or not self.shape
        ):
            raise ValueError("this encoding cannot be used for this tensor")
        return self

    @model_validator(mode="after")
    def _packed_fits(self) -> TensorSpec:
        if self.packed is None:
            return self
        if not self.can_pack:
            raise ValueError("this tensor cannot be packed")
        if not self.encoded_nbytes - math.prod(self.shape) < self.packed < self.encoded_nbytes:
            raise ValueError("a packed tensor has more than its bytes but one of each value, and less than all")
        return self

    @property
    def can_pack(self) -> bool:
        """Whether its numbers may be packed."""
        return self.encoding in PACKABLE.get(self.dtype, ())

    @property
    def encoded_dtype(self) -> DType:
        """The dtype of the numbers that are sent, of a tensor that may be packed."""
        return "bfloat16" if self.encoding == "bfloat16" else self.dtype

    @property
    def num_peaks(self) -> int:
        """The number of scales in the int8 encoding."""
        return math.prod(self.shape[:-1]) * -(-self.shape[-1] // INT8_BLOCK)

    @property
    def nbytes(self) -> int:
        """The size on the wire, in bytes."""
        return self.encoded_nbytes if self.packed is None else self.packed

    @property
    def encoded_nbytes(self) -> int:
        """The size before it is packed, in bytes."""
        match self.encoding:
            case "raw":
                return self.decoded_nbytes
            case "bfloat16":
                return math.prod(self.shape) * DTYPE_BYTES["bfloat16"]
            case "int8":
                return self.num_peaks * DTYPE_BYTES["bfloat16"] + math.prod(self.shape)

    @property
    def aligned_nbytes(self) -> int:
        """The size on the wire with padding, up to the start of the next tensor."""
        return -(-self.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT

    @property
    def decoded_nbytes(self) -> int:
        """The size in memory after decoding, in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
