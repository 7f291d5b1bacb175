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


class OddHosts(TwoHosts):
    """Two hosts that reach one another over eth0, the default route's interface, and have others that lead nowhere.

    `address` is the form of eth0's address, `{host}` for 1 and 2; `others` makes the interfaces. They come after eth0, since
    libfabric lists the newest first.
    """

    def __init__(self, address="10.77.0.{host}/24", gateway="10.77.0.254", others=""):
        super().__init__(links=1)
        family = "-6" if ":" in address else "-4"
        for host, space in enumerate(self.spaces, start=1):
            # Without duplicate detection, an IPv6 address is there at once.
            no_wait = "nodad" if ":" in address else ""
            space.run(
                f"ip address flush dev eth0 scope global; ip address add {address.format(host=host)} dev eth0 {no_wait}; "
                f"ip {family} route add default via {gateway} dev eth0; {others}"
            )


# A container engine: its bridge, with the address that it has on every host, and a container's pair with nothing but a link-local
# address, which comes up by itself.
CONTAINERS = """
ip link add docker0 type bridge; ip address add 172.17.0.1/16 dev docker0; ip link set docker0 up
ip link add cali0 type veth peer name inside; ip link set cali0 up; ip link set inside up
for try in $(seq 500); do ip -6 address show dev cali0 scope link -tentative | grep -q fe80 && exit; sleep 0.01; done; exit 1
"""

# A tunnel that is up, with an address that no peer has a route to.
TUNNEL = """
ip link add tun0 type veth peer name gone; ip address add 10.8.0.2/32 peer 10.8.0.1 dev tun0; ip link set tun0 up; ip link set gone up
"""
