"""With this folder on PYTHONPATH a process takes its CPU for one without AVX-512, and vLLM loads its AVX2 kernels.

It must reach the engine's worker processes as well, and act before vLLM is imported: hence a `sitecustomize`. torch is
not imported for its sake; the answers are replaced when somebody does.
"""

import importlib.abc
import importlib.util
import sys


class _Amend(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname != "torch.cpu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
                setattr(module, name, lambda: False)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Amend())
