"""Prints what pack.py must know of the machine with the GPU: run it there, with the Python that has PyTorch.

    python3 probe.py > machine.txt

A line for each Python package, and for Python, the C library and the GPU's architecture. The file may as well be written by
hand: a name without a version is a package of which only that it is there is known.
"""

import importlib.metadata
import platform
import re


def architecture():
    try:
        import torch
    except ImportError:
        return None
    return "".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else None


def main():
    print(f"# python {platform.python_version()}")
    print(f"# glibc {platform.libc_ver()[1]}")
    if found := architecture():
        print(f"# gpu {found}")
    packages = {
        re.sub(r"[-_.]+", "-", name).lower(): package.version
        for package in importlib.metadata.distributions() if (name := package.metadata["Name"])
    }
    for name, version in sorted(packages.items()):
        print(f"{name}=={version}")


if __name__ == "__main__":
    main()
