"""Puts what build.py compiled into the wheel, and gives it the platform's tag."""

import os
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledFiles(BuildHookInterface):
    def initialize(self, version, build_data):
        compiled = os.environ.get("NIXL_LIBFABRIC_COMPILED")
        if not compiled:
            raise SystemExit("the wheel is built by `make wheel`: it needs the compiled plugin in NIXL_LIBFABRIC_COMPILED")
        build_data["pure_python"] = False
        build_data["tag"] = os.environ["NIXL_LIBFABRIC_WHEEL_TAG"]
        for path in Path(compiled).rglob("*"):
            if path.is_file():
                build_data["force_include"][str(path)] = f"nixl_libfabric/{path.relative_to(compiled)}"
