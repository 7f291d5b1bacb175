"""vLLM's API server as an operator runs it: a front end, an engine and a worker, each in a process of its own.

It is asked over a Unix socket: the tests stand outside the network namespace that it runs in.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import setup
from cpus import CPUS
from engines import START_DEADLINE_S, Dead, Silent

ANSWER_DEADLINE_S = 180
END_DEADLINE_S = 60


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def arguments(options):
    """The engines' options as command line options."""
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is False and name.startswith(("enable_", "disable_")):
            if name.startswith("enable_"):
                yield "--no-" + flag[2:]
        elif value is True:
            yield flag
        else:
            yield from (flag, str(value))


class Server:
    def __init__(self, name, folder, kv, side_port, enter=(), plugin="ours", options=CPUS.options):
        self.name, self.log = name, folder / f"{name}.log"
        self.place = tempfile.TemporaryDirectory(prefix="vllm-")  # a socket's path is limited to 107 bytes
        self.socket = f"{self.place.name}/http"
        settings = CPUS.environment(plugin, side_port) | {"VLLM_HOST_IP": "127.0.0.1"}
        del settings["VLLM_ENABLE_V1_MULTIPROCESSING"]
        command = [
            *enter, str(setup.PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--uds", self.socket, *arguments(options),
            "--served-model-name", "tiny", "--kv-transfer-config", json.dumps(kv),
        ]
        with open(self.log, "wb") as output:
            self.process = subprocess.Popen(
                command, env=settings, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder, start_new_session=True)

    def ready(self):
        end = time.monotonic() + START_DEADLINE_S
        while True:
            try:
                if self.ask("GET", "/health", deadline=5)[0] == 200:
                    return self
            except OSError:
                pass
            if self.process.poll() is not None:
                raise Dead(f"{self.name}: ended with {self.process.returncode}; its log: {self.log}")
            if time.monotonic() > end:
                raise Silent(f"{self.name}: not ready in {START_DEADLINE_S} s; its log: {self.log}")
            time.sleep(0.5)

    def ask(self, method, path, body=None, deadline=ANSWER_DEADLINE_S):
        """Status and text of the answer."""
        connection = UnixConnection(self.socket, deadline)
        try:
            connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def complete(self, prompt, tokens=16, kv=None):
        """The token ids, or None with an error of the server, and the transfer parameters."""
        status, text = self.ask("POST", "/v1/completions", {
            "model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        } | ({"kv_transfer_params": kv} if kv else {}))
        if status != 200:
            return None, None
        fields = json.loads(text)
        return fields["choices"][0]["token_ids"], fields.get("kv_transfer_params")

    def prefill(self, prompt):
        return self.complete(prompt, 1, {"do_remote_decode": True, "do_remote_prefill": False})[1]

    def metric(self, name):
        lines = [line for line in self.ask("GET", "/metrics")[1].splitlines() if line.startswith(f"{name}{{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def maps(self, file):
        """The processes of this server that have mapped the file."""
        found = []
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                if os.getsid(int(process.name)) == self.process.pid and str(file) in (process / "maps").read_text():
                    found.append(int(process.name))
            except OSError:
                pass  # it ended meanwhile
        return found

    def kill(self):
        """kill -9 of all its processes: it leads a group of its own."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def quit(self):
        """The exit status of an orderly end."""
        self.process.terminate()
        try:
            return self.process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return None

    def close(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(30)
        self.place.cleanup()
