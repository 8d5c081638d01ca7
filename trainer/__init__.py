"""python -m trainer."""

import logging

# transformers imports torchao where it is installed; that tells of each of its CUDA kernels that
# this machine cannot load, and torch of how torchao registers its types.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
