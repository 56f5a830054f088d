"""Samples to calibrate and evaluate with: where they lie, how they are read, and what makes images inputs."""
