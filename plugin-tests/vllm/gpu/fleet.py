"""Cases on a GPU with their engines, which start long before their case runs."""

import os
from contextlib import ExitStack
from pathlib import Path

from engines import TWO_WORKERS, Dead, Engine, Silent, kv_config
from place import knows, settings
from proofs import Case

# Of about 2 GB of host memory and 1.5 GB of GPU memory each.
ENGINES_MAX = 14
FIRST_PORT, PORTS_A_CASE = 5600, 10
REORDERED = (4, "reorder_us=500 hold_pct=50")

def gpus():
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


class GpuCase(Case):
    """One way and what is done with it. Its engines can be started long before it runs."""

    def __init__(self, name, way, part, place, table, reference, fleet, extra):
        super().__init__(name, place, table, reference, ExitStack())
        self.way, self.part, self.fleet = way, part, fleet
        self.settings = settings(way, place) | (extra if not way.reference else {})
        # Two workers of one engine on one GPU is nothing that vLLM is made for.
        self.crowded = part == "tp" and place.gpu and gpus() < 2
        self.failure = "no" if way.reference or self.crowded else "FAIL"
        self.connector = "NixlPushConnector" if part == "push" else "NixlConnector"
        self.port = FIRST_PORT + PORTS_A_CASE * fleet.claim()
        self.engines, self.hosts = {}, [[], []]

    def missing(self):
        """Why this case cannot run here, in words; empty if it can."""
        if self.way.kv_device == "cuda" and not self.place.gpu:
            return "no GPU is used here"
        if self.way.option and not knows(self.place, self.way.option):
            return f"this plugin has no option {self.way.option}"
        if self.way.provider == "efa":
            program, libfabric = self.place.efa()
            if not program.exists() or not (libfabric / "libfabric.so.1").exists():
                return "no software EFA device or no libfabric with efa and CUDA: pack.py --softefa, or SOFTEFA_ENV and EFA_LIBFABRIC"
        return ""

    def fits(self, length):
        """Tokens of a prompt that leaves room for an answer."""
        return min(length, self.place.shape.positions - 64)

    def names(self):
        return ["prefill", "decode", *(["decode-recompute", "prefill-again"] if self.part == "kill" else [])]

    def start(self):
        if self.engines or self.missing():
            return
        if self.way.provider == "efa":
            self.on_efa()
        for name in self.names():
            decode = name.startswith("decode")
            kv = kv_config(self.connector, "kv_consumer" if decode else "kv_producer", self.way.backend,
                           "recompute" if name.endswith("recompute") else "fail", self.way.kv_device)
            port = self.port + ["prefill", "decode", "decode-recompute"].index(name.removesuffix("-again"))
            self.engines[name] = self.keep(Engine(
                self.place, name, self.folder, kv, side_port=port, enter=self.hosts[decode], settings=self.settings,
                options=TWO_WORKERS if decode and self.part == "tp" else {}, held=name.endswith("again"),
                flags=["--one-gpu"] if decode and self.crowded else []))

    def on_efa(self):
        program, libfabric = self.place.efa()
        os.environ["SOFTEFA_ENV"] = str(program)
        from bed.softefa import SoftEfa

        efa = self.keep(SoftEfa(REORDERED[0]))
        efa.control(REORDERED[1])
        self.hosts = [efa.host(0).enter(), efa.host(1).enter()]
        self.settings = self.settings | {"LD_LIBRARY_PATH": f"{libfabric}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def starting(self):
        """Engines that are to become ready by themselves."""
        return [engine for name, engine in self.engines.items() if not name.endswith("again")]

    def ready(self):
        self.start()
        for engine in self.starting():
            engine.ready()


class Fleet:
    """Starts engines of the cases to come, as many as the machine may hold."""

    def __init__(self, reference):
        self.reference, self.cases, self.claimed = reference, [], 0

    def claim(self):
        self.claimed += 1
        return self.claimed - 1

    def ahead(self, index):
        """The case at `index` is next; those before it have ended."""
        self.reference.start()
        live = 1
        for case in self.cases[index:]:
            if case.missing():
                continue
            live += len(case.names())
            if live > ENGINES_MAX and case is not self.cases[index]:
                return
            case.start()

    def settle(self):
        """Waits until nothing starts any more: a start takes processors that a measurement needs."""
        for case in self.cases:
            for engine in case.starting():
                try:
                    engine.ready()
                except (Dead, Silent):
                    pass  # its own case will tell
