"""Encodings of tensors: exactness, bytes and speed (`python -m benchmarks.wire`), and packing (`packing`)."""
