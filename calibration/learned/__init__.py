"""Quantized graphs that learn: an ONNX graph as a torch module, with fake quantization where the plan rounds.

The only place of calibration that may import torch, and nothing imports it before torch is needed.
"""
