"""vLLM on a GPU, out of the bundle that pack.py made and unpack.sh unpacked; and the ways that keys and values take there."""

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import model
from cpus import Cpus
from engines import BLOCK_TOKENS, OPTIONS, SETTINGS

KV_BLOCKS = 768


class Bundle:
    """Where engines run; see cpus.py."""

    python = sys.executable
    gpu = True
    shape = model.SHAPES["wide"]

    def __init__(self, folder, plugin=None):
        self.folder = folder
        self.plugins = folder / "plugins" / "nixl" / "plugins"
        if plugin:
            shutil.copy(plugin, self.plugins / "libplugin_LIBFABRIC.so")
        place = str(folder / "model")
        self.options = OPTIONS | {
            "model": place, "tokenizer": place, "max_model_len": self.shape.positions, "max_num_batched_tokens": self.shape.positions,
            "kv_cache_memory_bytes": KV_BLOCKS * self.shape.block_bytes(BLOCK_TOKENS),
            # Many engines share the GPU; what each takes is said above, and this is only what must be free at its start.
            "gpu_memory_utilization": 0.02,
            # Compiled on the spot by Triton: vLLM's attention libraries are not in the bundle.
            "attention_backend": "TRITON_ATTN",
        }

    def environment(self, plugin, side_port):
        settings = {key: value for key, value in os.environ.items() if not key.startswith(("NIXL_", "FI_", "UCX_", "VLLM_"))}
        settings.pop("PYTHONDONTWRITEBYTECODE", None)
        return settings | SETTINGS | {
            "PYTHONPATH": str(self.folder / "site"), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo", "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
            "NIXL_PLUGIN_DIR": str(self.plugins), "NIXL_LOG_LEVEL": "INFO",
        }

    def efa(self):
        """A software EFA device, and a libfabric with provider efa and CUDA: named by the environment, or in the bundle."""
        program = os.environ.get("SOFTEFA_ENV") or self.folder / "softefa" / "softefa-env"
        libfabric = os.environ.get("EFA_LIBFABRIC") or self.folder / "libfabric-efa"
        return Path(program), Path(libfabric)


class Rehearsal(Cpus):
    """The same program without a GPU: the vLLM of `make test-vllm`, and the ways by host memory."""

    gpu = False


@dataclass(frozen=True)
class Way:
    """How keys and values get from one engine's GPU memory into another's."""

    what: str
    backend: str = "LIBFABRIC"
    # vLLM's kv_buffer_device: with "cpu" vLLM copies between GPU and host memory itself, and NIXL is given host memory.
    kv_device: str = "cuda"
    settings: dict = field(default_factory=dict)
    provider: str = "tcp"
    # An option that our plugin must have.
    option: str = ""
    # What one of the engines says in its log when it has gone this way.
    says: str = ""
    # Only to compare with: what it does not do fails nothing.
    reference: bool = False


TCP = {"FI_PROVIDER": "tcp"}
# The hosts of the cases are one machine: else memory would go from process to process, and not over the network or the devices.
BY_NETWORK = {"NIXL_LIBFABRIC_SAME_HOST": "off"}
NETWORK = TCP | BY_NETWORK
SAME_HOST = TCP | {"NIXL_LIBFABRIC_SAME_HOST": "auto"}
# tcp takes no GPU memory, so without this none can be registered.
STAGED = {"NIXL_LIBFABRIC_VRAM_STAGING": "true"}
WAYS = {
    "staging": Way("tcp, GPU memory by vram_staging", settings=NETWORK | STAGED),
    "same-host": Way("GPU memory, this host's own way", settings=SAME_HOST | STAGED, option="same_host", says="is reached by CUDA"),
    "host": Way("tcp, vLLM's host buffers", kv_device="cpu", settings=NETWORK),
    "host-same-host": Way("vLLM's host buffers, this host's own way", kv_device="cpu", settings=SAME_HOST, option="same_host", says="is reached directly"),
    "efa": Way("software EFA devices that take GPU memory", settings=BY_NETWORK, provider="efa", says="is registered by"),
    "ucx": Way("UCX, GPU memory, transports as it chooses", backend="UCX", reference=True),
    "ucx-host": Way("UCX, vLLM's host buffers", backend="UCX", kv_device="cpu", reference=True),
    "ucx-tcp": Way("UCX, GPU memory over tcp", backend="UCX", settings={"UCX_TLS": "tcp,cuda_copy"}, reference=True),
}


def knows(place, option):
    """Whether our plugin has an option of that name."""
    return option.encode() in (place.plugins / "libplugin_LIBFABRIC.so").read_bytes()


def settings(way, place):
    """An operator's variables for this way; options that this plugin does not have are left out."""
    return {
        name: value for name, value in way.settings.items()
        if not name.startswith("NIXL_LIBFABRIC_") or knows(place, name.removeprefix("NIXL_LIBFABRIC_").lower())
    }
