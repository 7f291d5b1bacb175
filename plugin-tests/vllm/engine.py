"""One vLLM engine in one process, driven by lines of JSON: commands on standard input, answers on the descriptor of --answers.

Run by vLLM's Python. The engine runs in this very process (no engine core of its own), and its loop is the one of vLLM's
engine core: a step while there are requests, a rest of a millisecond when a step brought nothing.

    {"id": 1, "do": "generate", "prompt": [5, 17], "tokens": 16, "kv": {...}}     answered when the request has ended
    {"id": 2, "do": "metrics"}                                                    what vLLM counts of NIXL
    {"id": 3, "do": "transfers"}                                                  what NIXL told of each transfer that ended
    {"id": 4, "do": "blocks"}                                                     how many blocks are free, of how many
    {"id": 5, "do": "quit"}
"""

import argparse
import json
import os
import re
import select
import sys
import time

REST_S = 0.001
IDLE_S = 0.02


def watch_transfers():
    """A list that gets what NIXL tells vLLM of each transfer that this process has moved.

    vLLM's own metrics have it, too, but some releases lose what ends in a step that brings no token.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats

    seen, record = [], NixlKVConnectorStats.record_transfer

    def recorded(stats, told):
        if told:
            seen.append({
                "end": time.monotonic(), "seconds": told.xferDuration / 1e6, "post": told.postDuration / 1e6,
                "bytes": told.totalBytes, "descriptors": told.descCount,
            })
        record(stats, told)

    NixlKVConnectorStats.record_transfer = recorded
    return seen


def share_gpu():
    """Lets the workers of one engine, which are forked from this process, share a GPU: NCCL refuses that, gloo does not."""
    os.environ |= {"VLLM_DISABLE_PYNCCL": "1", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
                   "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    type(current_platform).dist_backend = "gloo"
    init_device = Worker.init_device

    def init_on_first(worker):
        worker.local_rank = 0
        return init_device(worker)

    Worker.init_device = init_on_first


class Engine:
    def __init__(self, options, answers):
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.answers = answers
        # Request's name -> the command's id and when it came.
        self.waiting = {}
        self.seen = watch_transfers()
        self.engine = LLMEngine.from_engine_args(EngineArgs(**options))
        self.scheduler = self.engine.engine_core.engine_core.scheduler

    def answer(self, **fields):
        os.write(self.answers, (json.dumps(fields) + "\n").encode())

    def name(self, command):
        """A decoder's requests have the names of the prefill engine's: a push pairs the two by that, but for vLLM's random suffix."""
        if remote := (command.get("kv") or {}).get("remote_request_id"):
            return re.sub(r"-[0-9a-f]{8}$", "", remote)
        return f"request-{os.getpid()}-{command['id']}"

    def generate(self, command):
        from vllm import SamplingParams

        extra = {"kv_transfer_params": command["kv"]} if command.get("kv") else None
        params = SamplingParams(
            temperature=0, max_tokens=command["tokens"], ignore_eos=True, detokenize=False, extra_args=extra)
        name = self.name(command)
        self.waiting[name] = (command["id"], time.monotonic())
        self.engine.add_request(name, {"prompt_token_ids": command["prompt"]}, params)

    def metrics(self, command):
        found = {}
        for metric in self.engine.get_metrics():
            if metric.name.startswith("vllm:nixl_"):
                histogram = hasattr(metric, "sum")
                found[metric.name] = [metric.count, metric.sum] if histogram else metric.value
        self.answer(id=command["id"], metrics=found)

    def transfers(self, command):
        self.answer(id=command["id"], transfers=self.seen)

    def blocks(self, command):
        pool = self.scheduler.kv_cache_manager.block_pool
        # One block of the pool is a placeholder and never free.
        self.answer(id=command["id"], free=pool.get_num_free_blocks(), all=pool.num_gpu_blocks - 1)

    def step(self):
        ended = False
        for output in self.engine.step():
            if not output.finished:
                continue
            ended = True
            number, since = self.waiting.pop(output.request_id)
            one = output.outputs[0]
            self.answer(
                id=number, tokens=list(one.token_ids), reason=str(one.finish_reason), kv=output.kv_transfer_params,
                seconds=time.monotonic() - since)
        if not ended:
            time.sleep(REST_S)

    def serve(self, commands):
        text = b""
        while True:
            busy = self.engine.has_unfinished_requests() or self.scheduler.has_requests()
            while select.select([commands], [], [], 0 if busy else IDLE_S)[0]:
                read = os.read(commands, 1 << 16)
                if not read:
                    return
                text += read
                busy = True
            *lines, text = text.split(b"\n")
            for line in lines:
                command = json.loads(line)
                if command["do"] == "quit":
                    self.answer(id=command["id"])
                    return
                getattr(self, command["do"])(command)
            if self.engine.has_unfinished_requests() or self.scheduler.has_requests():
                self.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--answers", type=int, required=True)
    parser.add_argument("--options", required=True, help="vLLM's engine arguments, JSON")
    parser.add_argument("--leave-hard", action="store_true", help="end without destructors, for plugins that crash in theirs")
    parser.add_argument("--held", action="store_true", help="import vLLM, then wait for a line before anything else")
    parser.add_argument("--one-gpu", action="store_true", help="all workers of this engine on the first GPU")
    arguments = parser.parse_args()
    if arguments.one_gpu:
        share_gpu()
    if arguments.held:
        import vllm.v1.engine.llm_engine  # noqa: F401

        while os.read(sys.stdin.fileno(), 1) not in (b"\n", b""):
            pass
    engine = Engine(json.loads(arguments.options), arguments.answers)
    engine.answer(id=0, pid=os.getpid())
    engine.serve(sys.stdin.fileno())
    if arguments.leave_hard:
        os._exit(0)
    engine.engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
