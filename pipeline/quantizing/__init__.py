"""What the quantize stage decides beyond ranges and rounding: modes, checks of the data, sensitivity, schemes."""
