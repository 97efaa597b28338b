"""Uninstall torchvision from the running environment if, and only if, it cannot be imported.

laplace-torch requires torchvision, but what bayesdiff uses of it does not. The wheel of torchvision on
PyPI is compiled against torch with CUDA. Beside a CPU build of torch its operators do not load
("operator torchvision::nms does not exist"), and then transformers and diffusers, which import
torchvision wherever they find it, cannot be imported either. Without torchvision they can.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys


def main() -> int:
    if importlib.util.find_spec("torchvision") is None:
        return 0
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        print(f"torchvision cannot be imported ({error}): uninstalling it")
        return subprocess.call([sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", "torchvision"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
