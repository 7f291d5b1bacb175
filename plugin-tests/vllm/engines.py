"""The runner's side of an engine: where vLLM is, the environment and options of an engine's process, commands and answers."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "e2e"))

from bed.places import Host  # noqa: E402

import model  # noqa: E402
import setup  # noqa: E402

BLOCK_TOKENS = 32
# Keys and values of one block, in float32.
BLOCK_BYTES = 2 * model.LAYERS * model.KV_HEADS * model.HEAD_DIM * BLOCK_TOKENS * 4
START_DEADLINE_S = 300
ANSWER_DEADLINE_S = 180
QUIT_DEADLINE_S = 60

OPTIONS = {
    "model": str(setup.MODEL), "tokenizer": str(setup.MODEL), "dtype": "float32", "enforce_eager": True,
    "max_model_len": model.POSITIONS, "block_size": BLOCK_TOKENS, "kv_cache_memory_bytes": 256 * BLOCK_BYTES,
    "max_num_seqs": 32, "enable_prefix_caching": False, "disable_log_stats": False, "seed": 1,
}


class Dead(Exception):
    """The engine's process ended by itself."""


class Silent(Exception):
    """The engine gave no answer within its deadline."""


def kv_config(connector, role, backend, policy="fail"):
    return {
        "kv_connector": connector, "kv_role": role, "kv_buffer_device": "cpu", "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"backends": [backend]},
    }


def environment(plugin, side_port):
    """What an engine's process runs with: `ours` as an operator would have it, in a folder with NIXL's other plugins."""
    settings = Host(plugin=plugin).environment()
    settings.pop("PYTHONDONTWRITEBYTECODE", None)
    settings |= {
        "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_port),
    }
    if plugin == "ours":
        settings["NIXL_PLUGIN_DIR"] = str(setup.PLUGINS)
    if plugin == "stock":
        # The newest NIXL whose own plugin runs on a libfabric that can be installed here, and the CUDA runtime it is linked to.
        settings["PYTHONPATH"] = str(setup.STOCK)
        settings["LD_LIBRARY_PATH"] += f":{setup.cuda_runtime()}"
    return settings


class Engine:
    """A process with an engine; use `start` on several before `ready` on each, and they start side by side."""

    def __init__(self, name, folder, kv=None, plugin="ours", side_port=5600, enter=()):
        self.name, self.log = name, folder / f"{name}.log"
        self.text, self.numbers, self.answers = b"", 0, {}
        reading, writing = os.pipe()
        options = OPTIONS | ({"kv_transfer_config": kv} if kv else {})
        command = [
            *enter, str(setup.PYTHON), str(HERE / "engine.py"), "--answers", str(writing), "--options", json.dumps(options),
            *(["--leave-hard"] if "UCX" in json.dumps(kv) else []),
        ]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command, env=environment(plugin, side_port), stdin=subprocess.PIPE, stdout=output, stderr=output,
                pass_fds=[writing], cwd=folder,
            )
        os.close(writing)
        self.reading = reading

    def ready(self):
        self.pid = self.wait(0, START_DEADLINE_S)["pid"]
        return self

    # Commands

    def send(self, do, **fields):
        self.numbers += 1
        try:
            self.process.stdin.write((json.dumps({"id": self.numbers, "do": do, **fields}) + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `wait` finds out and says it
        return self.numbers

    def wait(self, number, deadline=ANSWER_DEADLINE_S):
        end = time.monotonic() + deadline
        while number not in self.answers:
            if not select.select([self.reading], [], [], max(0, end - time.monotonic()))[0]:
                raise Silent(f"{self.name}: no answer in {deadline} s; its log: {self.log}")
            read = os.read(self.reading, 1 << 16)
            if not read:
                raise Dead(f"{self.name}: ended with {self.process.wait(30)}; its log: {self.log}")
            *lines, self.text = (self.text + read).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self.answers[answer["id"]] = answer
        return self.answers.pop(number)

    def begin(self, prompt, tokens=16, kv=None):
        return self.send("generate", prompt=prompt, tokens=tokens, kv=kv)

    def generate(self, prompt, tokens=16, kv=None, deadline=ANSWER_DEADLINE_S):
        return self.wait(self.begin(prompt, tokens, kv), deadline)

    def prefill(self, prompt):
        """The transfer parameters that a router hands on to the decoder."""
        return self.wait(self.begin_prefill(prompt))["kv"]

    def begin_prefill(self, prompt):
        return self.begin(prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False})

    def metrics(self):
        return self.wait(self.send("metrics"))["metrics"]

    def blocks_return(self, deadline):
        """Whether all blocks are free in time; a request makes the engine look at its notifications, as any request does."""
        end = time.monotonic() + deadline
        while True:
            self.generate([5, 6, 7], tokens=1)
            count = self.wait(self.send("blocks"))
            if count["free"] == count["all"]:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.1)

    # What the process shows

    def files(self):
        """The files that its address space maps."""
        maps = Path(f"/proc/{self.pid}/maps").read_text().splitlines()
        return {fields[5] for fields in (line.split(maxsplit=5) for line in maps) if len(fields) == 6 and fields[5].startswith("/")}

    def log_text(self):
        return self.log.read_text(errors="replace")

    # Its end

    def stop(self):
        """Stands still, with its connections open, until it is killed."""
        os.kill(self.pid, signal.SIGSTOP)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(30)

    def quit(self):
        """The exit status of an orderly end."""
        self.send("quit")
        try:
            return self.process.wait(QUIT_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return None

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        os.close(self.reading)
        self.process.stdin.close()
