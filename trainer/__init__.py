"""The training program, `python -m trainer`."""

import logging

# transformers imports torchao if it is installed. torchao then logs each of its CUDA kernels that
# this machine cannot load, and torch logs how torchao registers its types.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
