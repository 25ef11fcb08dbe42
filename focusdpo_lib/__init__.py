"""FocusDPO: spatially weighted Diffusion-DPO for multi-subject personalized image generation, reproduced."""

__version__ = "0.1.0"

import logging
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder


class _Uncompiled(MetaPathFinder, Loader):
    """Imports bitsandbytes without compiling its CPU kernels.

    diffusers and peft import it wherever it is installed, and it calls `torch.compile` as it is imported: 4 s of the
    compiler in every process, for nothing that the kit uses.
    """

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name) if name == "bitsandbytes" else None
        if spec is not None:
            self.inner, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.inner.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self.inner
        before = os.environ.get("TORCHDYNAMO_DISABLE")
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        try:
            self.inner.exec_module(module)
        finally:
            del os.environ["TORCHDYNAMO_DISABLE"]
            if before is not None:
                os.environ["TORCHDYNAMO_DISABLE"] = before


# What an Apple GPU lacks is computed on the CPU; read when torch is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
sys.meta_path.insert(0, _Uncompiled())
# Where there is no GPU, it also warns of a CPU kernel that the kit does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
