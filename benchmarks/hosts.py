"""Linux network namespaces as hosts: each with its own address, between them a link of given delay and rate.

The kernel's netem makes the link where there is one; else a relay in this file does, which hands packets between TUN
devices when they are due. Needs root and iproute2. Standard library alone: the relay runs this file as a script.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from types import TracebackType

PREFIX = "coterie-"
SUBNET = "10.77.0."
DEVICE = "eth0"
PR_SET_PDEATHSIG = 1
TUNSETIFF, IFF_TUN, IFF_NO_PI, CLONE_NEWNET = 0x400454CA, 0x1, 0x1000, 0x40000000
MTU = 9000


class Hosts:
    """`count` hosts for the length of a `with` block, and none afterwards, however it ends."""

    def __init__(self, count: int, delay_ms: float = 1.0, gbit: float = 1.0) -> None:
        if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
            raise ValueError("network namespaces need root and iproute2 (ip and tc): run without --netns")
        self.count, self.delay_ms, self.gbit = count, delay_ms, gbit
        self.names = [f"{PREFIX}{os.getpid()}-{n}" for n in range(count)]
        self.link = ""
        """What makes the link: netem, or relay."""
        self._relay: subprocess.Popen[str] | None = None

    def address(self, host: int) -> str:
        """Of a host's DEVICE."""
        return f"{SUBNET}{host + 1}"

    def command(self, host: int, words: list[str]) -> list[str]:
        """The command line that runs these words on a host."""
        return ["ip", "netns", "exec", self.names[host], *words]

    def __enter__(self) -> Hosts:
        sweep()
        self._before = signal.signal(signal.SIGTERM, _leave)
        try:
            for name in self.names:
                _run("ip", "netns", "add", name)
                _run("ip", "-n", name, "link", "set", "lo", "up")
            if has_netem(self.names[0]):
                self.link = "netem"
                self._wire()
            else:
                self.link = "relay"
                self._start_relay()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the relay and removes the namespaces, with all devices in them."""
        signal.signal(signal.SIGTERM, self._before)
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        for name in _existing():
            if name.startswith(f"{PREFIX}{os.getpid()}-"):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _wire(self) -> None:
        """A pair of virtual devices from each host to a bridge, which has a namespace of its own."""
        switch = f"{PREFIX}{os.getpid()}-switch"
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for host, name in enumerate(self.names):
            pair = ["name", DEVICE, "netns", name, "type", "veth", "peer", "name", f"port{host}", "netns", switch]
            _run("ip", "link", "add", *pair)
            _run("ip", "-n", switch, "link", "set", f"port{host}", "master", "bridge", "up")
            self._raise(host)
            limits = ["delay", f"{self.delay_ms}ms", "rate", f"{self.gbit * 1000:.0f}mbit", "limit", "100000"]
            _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", "netem", *limits)

    def _start_relay(self) -> None:
        words = [sys.executable, __file__, str(self.delay_ms / 1e3), str(self.gbit * 125e6), *self.names]
        self._relay = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self._relay.stdout is not None
        if self._relay.stdout.readline().strip() != "ready":
            raise ValueError("the relay between the namespaces did not start: /dev/net/tun is needed")
        for host, name in enumerate(self.names):
            _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(MTU), "txqueuelen", "10000")
            self._raise(host)

    def _raise(self, host: int) -> None:
        _run("ip", "-n", self.names[host], "addr", "add", f"{self.address(host)}/24", "dev", DEVICE)
        _run("ip", "-n", self.names[host], "link", "set", DEVICE, "up")


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # so that the `with` block ends as always


def has_netem(namespace: str) -> bool:
    """Whether the kernel has the queue that delays packets."""
    words = ["tc", "-n", namespace, "qdisc", "add", "dev", "lo", "root", "netem", "delay", "1ms"]
    if subprocess.run(words, check=False, capture_output=True).returncode:
        return False
    _run("tc", "-n", namespace, "qdisc", "del", "dev", "lo", "root")
    return True


def sweep() -> None:
    """Removes what processes left that were killed."""
    for name in _existing():
        owner = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and owner.isdecimal() and not os.path.exists(f"/proc/{owner}"):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def relay(delay: float, rate: float, namespaces: list[str]) -> None:
    """Hands packets from host to host. Each leaves its host at `rate` bytes per second, and arrives `delay` seconds
    later. Ends when it is killed, or the process that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    devices = [_open_device(name) for name in namespaces]
    print("ready", flush=True)
    under_way: list[tuple[float, int, int, bytes]] = []
    free, number = [0.0] * len(devices), 0
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select(devices, [], [], wait)[0]:
            packet = os.read(device, MTU + 100)
            source = devices.index(device)
            target = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1
            if 0 <= target < len(devices):
                free[source] = max(free[source], time.monotonic()) + len(packet) / rate
                number += 1  # of packets that are due together the first goes first
                heapq.heappush(under_way, (free[source] + delay, number, target, packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(under_way)
            os.write(devices[target], packet)


def _open_device(namespace: str) -> int:
    """A new TUN device in the namespace, where this process then is."""
    with open(f"/run/netns/{namespace}") as home:
        if ctypes.CDLL(None, use_errno=True).setns(home.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), IFF_TUN | IFF_NO_PI))
    return device


def _existing() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], check=False, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.split()]


def _run(*words: str) -> None:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(words)}: {done.stderr.strip() or done.returncode}")


if __name__ == "__main__":
    relay(float(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
