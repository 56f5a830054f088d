"""Which numbers: calibration samples, quantization plans and QDQ models. Knows no target and no stage."""
