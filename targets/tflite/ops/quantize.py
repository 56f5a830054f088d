"""QUANTIZE and DEQUANTIZE where the graph passes between real numbers and integers.

QUANTIZE from float rounds half away from zero in TFLite's reference kernel and half to even in XNNPACK's: one step on
ties.
"""

from __future__ import annotations

from edgeship.targets.tflite.graph import DEQUANTIZE, QUANTIZE
from edgeship.targets.tflite.layout_rules import POINTWISE
from edgeship.targets.tflite.op import Op
from edgeship.targets.tflite.ops.unary import unary

OPS = (Op(QUANTIZE, unary("QUANTIZE"), POINTWISE), Op(DEQUANTIZE, unary("DEQUANTIZE"), POINTWISE))
