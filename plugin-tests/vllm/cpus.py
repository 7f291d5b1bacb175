"""vLLM on this machine's CPUs, as setup.py installs it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))

from bed.places import Host  # noqa: E402

import model  # noqa: E402
import setup  # noqa: E402
from engines import BLOCK_TOKENS, OPTIONS, SETTINGS  # noqa: E402


class Cpus:
    """Where engines run: the Python with vLLM, the model, the plugins, vLLM's options and the environment."""

    python = setup.PYTHON
    plugins = setup.PLUGINS
    shape = model.SHAPES["small"]
    kv_device = "cpu"
    options = OPTIONS | {
        "model": str(setup.MODEL), "tokenizer": str(setup.MODEL), "max_model_len": shape.positions,
        "kv_cache_memory_bytes": 256 * shape.block_bytes(BLOCK_TOKENS),
    }

    def environment(self, plugin, side_port):
        """What an engine's process runs with: `ours` as an operator would have it, in a folder with NIXL's other plugins."""
        settings = Host(plugin=plugin).environment()
        settings.pop("PYTHONDONTWRITEBYTECODE", None)
        settings |= SETTINGS | {
            "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
        }
        if plugin == "ours":
            settings["NIXL_PLUGIN_DIR"] = str(setup.PLUGINS)
        if plugin == "stock":
            # The newest NIXL whose own plugin runs on a libfabric that can be installed here, and the CUDA runtime it is linked to.
            settings["PYTHONPATH"] = str(setup.STOCK)
            settings["LD_LIBRARY_PATH"] += f":{setup.cuda_runtime()}"
        return settings


CPUS = Cpus()
