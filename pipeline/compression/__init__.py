"""Makes a network smaller while it can still be trained: pruning, distillation, and the training loop of both.

The PyTorch side of edgeship: these modules import torch, and are imported only when a recipe asks for training.
"""
