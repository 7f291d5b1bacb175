"""Random work on agents of every fabric, with random faults, until it is stopped: `make soak`.

Each round draws everything from its seed: fabric, devices, libfabric, progress threads, order, faults, transfers, and what
happens to whom. A failure prints the seed and the command that replays it, and ends the soak.

    target/venv/bin/python plugin-tests/soak.py [--seed FIRST] [--rounds COUNT] [--plugin ours]

The order in which processes run is the machine's: a replay repeats the choices, not the clock.
"""

import argparse
import itertools
import random
import shutil
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "e2e"))

from bed.agent import Agent, Refused
from bed.networks import TwoHosts
from bed.places import LIBFABRIC_VERSIONS, TARGET, Host
from bed.softefa import SoftEfa

MIB = 1 << 20
REGION = 6 * MIB
STEPS = 60
WAIT_S = 60
# With how many devices a host may be there: software EFA devices under libfabric's two fabrics, and of a kind that cannot write;
# Ethernet links; processes of one host that reach each other's memory.
FABRICS = {
    "efa": [1, 2, 4, 4, 8],
    "efa-direct": [1, 2, 4, 4, 8],
    "efa on p4d": [1, 2, 4],
    "tcp": [1, 2],
    "one host": [1, 2],
}
EFA_LIBFABRICS = ["2.5.1", "2.4.0"]
# Faults that delay and disorder, and fail nothing.
MILD = ["", "reorder_us=800 hold_pct=60", "ack_delay_us=200 jitter_us=200", "rnr_pct=15", "gbps=8", "shuffle=0 hold_pct=0"]
# Faults that may end a transfer to or from host h{victim} in an error.
HARSH = [
    "host=h{victim} op=write pct=5 status=7",
    "host=h{victim} op=read pct=5 status=13",
    "dst=h{victim} drop_pct=20 unreachable_ms=200",
    "host=h{victim} dead=1",
]


class Round:
    def __init__(self, seed, plugin, folder, fabrics):
        self.dice = dice = random.Random(seed)
        fabric = dice.choice(fabrics)
        self.is_efa = fabric.startswith("efa")
        self.devices = dice.choice(FABRICS[fabric])
        self.plugin, self.folder = plugin, folder
        self.agents = []
        self.texts = itertools.count()
        libfabric = dice.choice(EFA_LIBFABRICS if self.is_efa else LIBFABRIC_VERSIONS)
        self.story = [f"{fabric}, {self.devices} devices, libfabric {libfabric}"]
        self.host = Host(plugin, libfabric=libfabric, extra=(("NIXL_LIBFABRIC_SAME_HOST", "auto"),) * (fabric == "one host"))
        self.mild = dice.choice(MILD)
        if self.is_efa:
            topology = "p4d.24xlarge" if fabric.endswith("p4d") else "p5.48xlarge"
            self.network = SoftEfa(self.devices, fabric.split()[0], topology, seed)
        else:
            self.network = TwoHosts(links=self.devices)
        self.faults()
        for index in range(dice.randrange(2, 5)):
            self.agents.append(self.start(index))
        self.meet()

    def start(self, index):
        progress = self.dice.random() < 0.5
        self.story.append(f"h{index} starts, progress thread {progress}")
        name = f"h{index}"
        agent = Agent(name, self.host, self.network.space(index), self.folder / f"{name}.log")
        options = {"connect_timeout_ms": 5000} if self.plugin == "ours" else {}
        if self.is_efa and not self.network.writes:
            # Of a write that a living target failed to fetch nothing tells.
            options |= {"transfer_timeout_ms": 20_000}
        agent.create(progress_thread=progress, **options)
        agent.index = index
        agent.give, agent.take = agent.buffer(REGION, seed=index), agent.buffer(REGION)
        return agent

    def faults(self, *faults):
        """Replaces the devices' faults."""
        if self.is_efa:
            self.network.control(f"seed={self.dice.randrange(1000)}", self.mild, *faults)

    def meet(self):
        for one, other in itertools.permutations(self.agents, 2):
            one.knows(other)

    def pair(self):
        return self.dice.sample(self.agents, 2)

    def transfer(self, near, far, deadline=WAIT_S):
        """A transfer of random pieces; when it is DONE every byte is there and none elsewhere."""
        dice = self.dice
        operation, message = dice.choice(["WRITE", "READ"]), b""
        if dice.random() < 0.7:
            message = b"%d " % next(self.texts) + b"m" * dice.choice([0, 10, 9000, 100_000])
        placed, at = [], 0
        for _ in range(dice.choice([1, 1, 3, 40])):
            length = dice.choice([1, 100, 4096, 70_001, 900_000])
            at += dice.randrange(0, 5000)
            if at + length > REGION:
                break
            placed.append((at, dice.randrange(0, REGION - length), length))
            at += length
        giver, taker = (near, far) if operation == "WRITE" else (far, near)
        self.story.append(f"{operation} {near.name} with {far.name}: {len(placed)} pieces, notification of {len(message)}")
        seed = dice.randrange(1 << 30)
        giver.give.fill(seed)
        taker.take.fill()
        there = [taker.take[offset : offset + length] for offset, _, length in placed]
        here = [giver.give[start : start + length] for _, start, length in placed]
        local, remote = (here, there) if operation == "WRITE" else (there, here)
        near.transfer(operation, local, remote, far, message, deadline=deadline)
        if message:
            far.receives(message, sender=near, deadline=WAIT_S)
        taker.take.check(seed, placed)

    def word(self, near, far):
        text = b"%d" % next(self.texts) + b"w" * self.dice.choice([0, 1, 8192, 50_000])
        self.story.append(f"a word of {len(text)} bytes from {near.name} to {far.name}")
        near.call("send", far.name, text)
        far.receives(text, sender=near, deadline=WAIT_S)

    def forget(self, near, far):
        self.story.append(f"{near.name} forgets {far.name} and meets it again")
        near.call("remove_remote", far.name)
        near.knows(far)

    def pause(self, near, far):
        """One stands still while something is under way to it."""
        self.story.append(f"{far.name} stands still during a transfer from {near.name}")
        near.give.fill(7)
        handle = near.prepare("WRITE", [near.give[:]], [far.take[:]], far, b"patience")
        far.stop()
        near.call("post", handle, b"patience")
        time.sleep(self.dice.random())
        far.resume()
        assert near.call("wait", handle, WAIT_S, deadline=2 * WAIT_S) == "DONE"
        near.call("release", handle)
        far.receives(b"patience", sender=near, deadline=WAIT_S)
        far.take.check(7)

    def restart(self, near, far):
        """One is killed in the middle and starts anew; all meet the new one."""
        self.story.append(f"{far.name} is killed during a transfer from {near.name}, and starts anew")
        handle = near.prepare("WRITE", [near.give[:]], [far.take[:]], far, b"in vain")
        near.call("post", handle, b"in vain")
        far.kill()
        self.ends(near, handle)
        self.replace(far)

    def replace(self, gone):
        others = [agent for agent in self.agents if agent is not gone]
        for agent in others:
            agent.call("remove_remote", gone.name)
        again = self.start(gone.index)
        self.agents[self.agents.index(gone)] = again
        for agent in others:
            agent.knows(again), again.knows(agent)

    def ends(self, near, handle):
        try:
            state = near.call("wait", handle, WAIT_S, deadline=2 * WAIT_S)
        except Refused:
            state = "ERR"
        assert state != "PROC", "a request to a dead peer never ended"
        near.call("release", handle)

    def misery(self, near, far):
        """Faults at one host for a while. What concerns it may fail; it starts anew when they are over."""
        fault = self.dice.choice(HARSH).format(victim=far.index)
        self.story.append(f"faults: {fault}")
        self.faults(fault)
        for _ in range(3):
            handle = None
            try:
                handle = near.prepare("WRITE", [near.give[:]], [far.take[:]], far, b"perhaps")
                near.call("post", handle, b"perhaps")
            except Refused:
                pass
            else:
                self.ends(near, handle)
            bystanders = [agent for agent in self.agents if agent is not far]
            if len(bystanders) >= 3:
                # Others are not concerned.
                one, other = self.dice.sample([agent for agent in bystanders if agent is not near], 2)
                self.transfer(one, other)
        self.recover(near, far)

    def recover(self, near, far):
        """The faults at one are over; it starts anew."""
        self.faults()
        far.kill()
        near.call("receive", 1000, 0.2)
        self.replace(far)

    def lose_device(self, near, far):
        """A device of one dies, or its link goes down, for a while: everything goes over its others."""
        device = self.dice.choice(sorted(self.network.host(far.index).counters()))
        fault = f"host=h{far.index}/{device} {self.dice.choice(['dead=1', 'drop_pct=100'])} unreachable_ms=200"
        self.story.append(f"faults: {fault}")
        self.faults(fault)
        for _ in range(3):
            self.transfer(*self.dice.sample([near, far], 2))
        # Its device stays out of use until it is started anew.
        self.recover(near, far)

    def run(self):
        deeds = [self.transfer] * 12 + [self.word] * 4 + [self.forget] * 2 + [self.pause, self.restart]
        if self.is_efa:
            deeds.append(self.misery)
        # What a p4d writes is several packets, and not over for the device when one fails.
        if self.is_efa and self.devices > 1 and self.network.writes:
            deeds.append(self.lose_device)
        for _ in range(STEPS):
            self.dice.choice(deeds)(*self.pair())
        for agent in self.agents:
            left = agent.call("receive", 1, 0)
            assert left == [], f"{agent.name} has a notification too many: {left[0][1][:40]}"
            assert agent.close() == 0, f"{agent.name} ended in error"

    def clear(self):
        for agent in self.agents:
            agent.process.kill()
        self.network.close()


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=int(time.time()), help="seed of the first round")
    options.add_argument("--rounds", type=int, default=0, help="rounds; 0: until stopped")
    options.add_argument("--minutes", type=float, default=0, help="begin no round after so long; 0: until stopped")
    options.add_argument("--plugin", default="ours", choices=["ours", "stock"])
    options.add_argument("--fabrics", default=",".join(FABRICS), help="comma-separated; default: %(default)s")
    chosen = options.parse_args()
    fabrics = chosen.fabrics.split(",")
    if unknown := set(fabrics) - set(FABRICS):
        options.error(f"--fabrics knows {', '.join(FABRICS)}; not {', '.join(unknown)}")
    # Several soaks may run at a time.
    start, folder = time.monotonic(), TARGET / "soak" / str(chosen.seed)
    for number in itertools.count():
        if number == chosen.rounds > 0 or 0 < chosen.minutes * 60 < time.monotonic() - start:
            break
        seed = chosen.seed + number
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        work = None
        try:
            work = Round(seed, chosen.plugin, folder, fabrics)
            work.run()
        except Exception:
            traceback.print_exc()
            print("\nsoak: what happened:", *(work.story if work else ["the agents could not be started"]), sep="\n  ")
            print(f"soak: FAILED with seed {seed}; logs in {folder}; replay with\n"
                  f"  {sys.executable} {Path(__file__)} --plugin {chosen.plugin} --fabrics '{chosen.fabrics}' --seed {seed} --rounds 1", flush=True)
            return 1
        finally:
            if work:
                work.clear()
        print(f"soak: seed {seed} well, {work.story[0]}; {number + 1} rounds in {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
