"""The runner's side of an engine: options and environment that every engine has, its process, commands and answers."""

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent

BLOCK_TOKENS = 32
START_DEADLINE_S = 300
ANSWER_DEADLINE_S = 180
QUIT_DEADLINE_S = 60

# vLLM's; what depends on the machine is with its place (cpus.py, gpu/place.py).
OPTIONS = {
    "dtype": "float32", "enforce_eager": True, "block_size": BLOCK_TOKENS, "max_num_seqs": 32, "enable_prefix_caching": False,
    "disable_log_stats": False, "seed": 1,
}
# For an engine of two workers (tensor parallel). vLLM's own all-reduce takes a GPU for each.
TWO_WORKERS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "disable_custom_all_reduce": True}
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
}


class Dead(Exception):
    """The engine's process ended by itself."""


class Silent(Exception):
    """The engine gave no answer within its deadline."""


def kv_config(connector, role, backend, policy="fail", device="cpu"):
    return {
        "kv_connector": connector, "kv_role": role, "kv_buffer_device": device, "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"backends": [backend]},
    }


class Engine:
    """A process with an engine; make several before `ready` on each, and they start side by side."""

    def __init__(self, place, name, folder, kv=None, plugin="ours", side_port=5600, enter=(), settings=None, options=None,
                 held=False, flags=()):
        self.name, self.log, self.pid = name, folder / f"{name}.log", None
        self.text, self.numbers, self.answers = b"", 0, {}
        reading, writing = os.pipe()
        options = place.options | (options or {}) | ({"kv_transfer_config": kv} if kv else {})
        command = [
            *enter, str(place.python), str(HERE / "engine.py"), "--answers", str(writing), "--options", json.dumps(options),
            *(["--leave-hard"] if "UCX" in json.dumps(kv) else []), *(["--held"] if held else []), *flags,
        ]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command, env=place.environment(plugin, side_port) | (settings or {}), stdin=subprocess.PIPE, stdout=output,
                stderr=output, pass_fds=[writing], cwd=folder,
            )
        os.close(writing)
        self.reading = reading

    def go(self):
        """Lets an engine that was started `held` begin: it has imported vLLM and done nothing else."""
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return self

    def ready(self):
        if not self.pid:
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
                status, last = self.process.wait(30), self.log_text().strip().rpartition("\n")[2]
                raise Dead(f"{self.name}: ended with {status}: {last[:200]}; its log: {self.log}")
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

    def transfers(self):
        return self.wait(self.send("transfers"))["transfers"]

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
        """Asks for an orderly end; `ended` tells its exit status, None if it did not come."""
        self.send("quit")
        return self

    def ended(self):
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
