"""Network namespaces: a host with only its loopback interface, or with some Ethernet links."""

import os
import subprocess

# Without root a namespace needs a user namespace around it.
_USER = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
_ENTER_USER = [] if os.geteuid() == 0 else ["--user", "--preserve-credentials"]


class Namespace:
    """Lives as long as this object; its holder ends when our end of the pipe closes, so none outlives the tests."""

    def __init__(self):
        self.holder = subprocess.Popen(
            ["unshare", "--net", *_USER, "sh", "-c", "echo ready; exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        if self.holder.stdout.readline() != "ready\n":
            raise RuntimeError("cannot make a network namespace: run as root, or allow user namespaces")
        self.run("ip link set lo up")

    def enter(self):
        """The command line that runs what follows it inside."""
        return ["nsenter", "--target", str(self.holder.pid), "--net", *_ENTER_USER]

    def run(self, script):
        subprocess.run([*self.enter(), "sh", "-ec", script], check=True)

    def wait_for_link(self, link):
        """The kernel raises a link some time after `ip link set up` returns; until then libfabric does not list it."""
        self.run(
            f"for try in $(seq 500); do ip link show dev eth{link} | grep -q 'state UP' && exit; sleep 0.01; done; "
            f"echo eth{link} does not come up >&2; exit 1"
        )

    def close(self):
        self.holder.stdin.close()
        self.holder.wait(timeout=10)


class LoopbackOnly:
    """A host whose only interface is lo: all agents share it."""

    links = 0

    def __init__(self):
        self.spaces = [Namespace()]

    def space(self, index):
        return self.spaces[index % len(self.spaces)]

    def close(self):
        for space in self.spaces:
            space.close()


class OneHost(LoopbackOnly):
    """One host with `links` Ethernet interfaces: eth0 10.77.0.1, eth1 10.77.1.1, ..."""

    def __init__(self, links=1):
        super().__init__()
        self.links = links
        for link in range(links):
            self.spaces[0].run(
                f"ip link add eth{link} type veth peer name far{link}; "
                f"ip address add 10.77.{link}.1/24 dev eth{link}; ip link set eth{link} up; ip link set far{link} up"
            )
            self.spaces[0].wait_for_link(link)


class TwoHosts(LoopbackOnly):
    """Two hosts joined by `links` Ethernet links; host h has 10.77.<link>.<h+1>. Agents are placed in turn."""

    def __init__(self, links=1):
        self.spaces = [Namespace(), Namespace()]
        self.links = links
        other = self.spaces[1].holder.pid
        for link in range(links):
            self.spaces[0].run(
                f"ip link add eth{link} type veth peer name eth{link} netns {other}; "
                f"ip address add 10.77.{link}.1/24 dev eth{link}; ip link set eth{link} up"
            )
            self.spaces[1].run(f"ip address add 10.77.{link}.2/24 dev eth{link}; ip link set eth{link} up")
            for space in self.spaces:
                space.wait_for_link(link)
