"""A plan, or a float model alone -> the quantized ONNX model."""
