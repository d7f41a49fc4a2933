"""Namespaces as hosts: their link delays, and nothing of them stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coterie.benchmarks import hosts, plan_hosts
from coterie.benchmarks.alltoall import main

ECHO = """
import socket
with socket.create_server((sys.argv[1], 5000)) as server:
    print("ready", flush=True)
    one, _ = server.accept()
    while word := one.recv(1):
        one.sendall(word)
"""
CALL = """
import socket, time
with socket.create_connection((sys.argv[1], 5000)) as one:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    best = 1e9
    for _ in range(5):
        begin = time.monotonic()
        one.sendall(b"x")
        one.recv(1)
        best = min(best, time.monotonic() - begin)
print(best)
"""


def _python(text: str, *words: str) -> list[str]:
    return [sys.executable, "-c", f"import sys{text}", *words]


def _can_make_hosts() -> bool:
    try:
        hosts.Hosts(1)
        return Path("/dev/net/tun").exists() or Path("/sys/module/sch_netem").exists()
    except ValueError:
        return False


@pytest.mark.skipif(not _can_make_hosts(), reason="needs root, iproute2 and TUN devices")
def test_hosts_are_a_delay_apart_and_leave_nothing_behind() -> None:
    with hosts.Hosts(2, delay_ms=20) as two:
        names = two.names
        words = two.command(0, _python(ECHO, two.address(0)))
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                assert server.stdout.readline() == "ready\n"
                call = two.command(1, _python(CALL, two.address(0)))
                taken = float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
            finally:
                server.kill()
    assert taken > 0.04  # there and back
    assert not set(names) & set(hosts._existing())


@pytest.mark.skipif(not _can_make_hosts(), reason="needs root, iproute2 and TUN devices")
def test_hosts_go_when_their_block_fails_or_their_process_was_killed() -> None:
    with pytest.raises(ZeroDivisionError), hosts.Hosts(1) as one:
        raise ZeroDivisionError
    assert not set(one.names) & set(hosts._existing())
    left = f"{hosts.PREFIX}{2**22 + 1}-0"  # beyond the greatest process id
    subprocess.run(["ip", "netns", "add", left], check=True)
    hosts.sweep()
    assert left not in hosts._existing()


def test_hosts_need_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="need root and iproute2"):
        main(quick=True, netns=True)
    with pytest.raises(ValueError, match="need root and iproute2"):
        plan_hosts.main(quick=True)
