"""How a message declares its tensors: what they are called, of which dtype, in which encoding, and how long that is."""

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
"""The encodings that lose precision, and the dtypes that they make smaller."""
ENCODED = frozenset({"hidden", "grad"})
"""The tensors that may travel in fewer bytes."""
INT8_BLOCK = 64
"""The values that share one peak in the encoding int8."""
TensorName = Literal["hidden", "positions", "mask", "grad", "digests", "logits", "ids", "factors", "factor_grads"]


class TensorSpec(Strict):
    """One tensor of the frame's payload, in the order of declaration, each starting at a multiple of 16 bytes.

    `dtype` is what it is for the computation, `encoding` how it travels.
    """

    name: TensorName
    dtype: DType
    shape: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_DIMENSION)], ...], Field(max_length=4, strict=False)]
    encoding: Encoding = "raw"

    @model_validator(mode="after")
    def _encoding_fits(self) -> TensorSpec:
        if self.encoding != "raw" and (
            self.name not in ENCODED or self.dtype not in LOSSY[self.encoding] or not self.shape
        ):
            raise ValueError("an encoding that does not fit the tensor")
        return self

    @property
    def num_peaks(self) -> int:
        """How many blocks int8 cuts it into."""
        return math.prod(self.shape[:-1]) * -(-self.shape[-1] // INT8_BLOCK)

    @property
    def nbytes(self) -> int:
        """Its size on the wire."""
        match self.encoding:
            case "raw":
                return self.decoded_nbytes
            case "bfloat16":
                return math.prod(self.shape) * DTYPE_BYTES["bfloat16"]
            case "int8":
                return self.num_peaks * DTYPE_BYTES["bfloat16"] + math.prod(self.shape)

    @property
    def aligned_nbytes(self) -> int:
        """The same, up to where the next tensor starts."""
        return -(-self.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT

    @property
    def decoded_nbytes(self) -> int:
        """Its size in memory."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
