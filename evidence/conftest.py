"""For all tests of the evidence: Triton's interpreter where there is no GPU, and one seed."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train_toy.py

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
