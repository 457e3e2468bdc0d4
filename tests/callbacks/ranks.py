"""One of two processes: `run_rank(folder)` of several test modules, one after the other."""

import importlib
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        print(name, flush=True)  # for the message, if it fails
        importlib.import_module(name).run_rank(folder)
