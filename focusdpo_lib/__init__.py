"""FocusDPO: spatially weighted Diffusion-DPO for multi-subject personalized image generation, reproduced."""

__version__ = "0.1.0"

import logging

# Where there is no GPU, bitsandbytes warns at its import, which peft does, of a CPU kernel that the kit does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
