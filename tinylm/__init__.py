"""tinylm: from raw text to an assistant, from scratch.

Pre-training, instruction fine-tuning and feedback on an ordinary computer, with autograd and
Transformer written by hand. docs/tour.md says in which order to read the source.
"""

import sys

from tinylm.errors import told_of

if sys.argv[0].endswith("tinylm") or (sys.argv[0] == "-m" and "tinylm" in sys.orig_argv):
    sys.excepthook = told_of  # the command: importing the rest takes a while

from tinylm import ops
from tinylm.backend import use
from tinylm.checkpoint import load, save
from tinylm.generate import fill, generate
from tinylm.model import ModelConfig, Transformer
from tinylm.tensor import Tensor, no_grad
from tinylm.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "ModelConfig", "Tensor", "Tokenizer", "Transformer",
    "fill", "generate", "load", "no_grad", "ops", "save", "use",
]  # fmt: skip
