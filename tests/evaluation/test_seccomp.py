"""The filter of system calls: its numbers, its decisions on both architectures, and the kernel's answer."""

import errno
import os
import platform
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.evaluation.seccomp import ALLOW, ARCHITECTURES, DENIED, ERROR, KILL, NEW_NAMESPACE, seccomp_filter

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
REFUSED = ERROR | errno.EPERM
ALLOWED = {  # name: numbers
    "read": (0, 63), "openat": (257, 56), "execve": (59, 221), "wait4": (61, 260), "mmap": (9, 222), "futex": (202, 98),
    "kill": (62, 129), "socket": (41, 198), "exit_group": (231, 94), "rt_sigaction": (13, 134), "prlimit64": (302, 261),
}  # fmt: skip


def decide(machine: str, number: int, argument: int = 0, audit: int | None = None) -> int:
    """What the kernel does with the filter: the instructions that it uses, by their definition."""
    program = seccomp_filter(machine)
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    data = struct.pack(
        "<IIQ6Q", number, ARCHITECTURES[machine].audit if audit is None else audit, 0, argument, *[0] * 5
    )
    accumulator, at = 0, 0
    while True:
        code, yes, no, constant = steps[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x15:
            at += yes if accumulator == constant else no
        elif code == 0x45:
            at += yes if accumulator & constant else no
        else:
            assert code == 0x06
            return constant


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_numbers_are_those_of_the_kernels_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"{HEADERS[machine]} is not installed")
    found = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    column = list(ARCHITECTURES).index(machine)
    ours = {name: pair[column] for name, pair in {**DENIED, **ALLOWED}.items() if pair[column] is not None}
    known = {name: number for name, number in ours.items() if name in found}  # older headers lack the newest calls
    assert len(known) > len(ours) - 4
    assert known == {name: int(found[name]) for name in known}
    assert ARCHITECTURES[machine].clone == int(found["clone"]) and int(found.get("clone3", 435)) == 435


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_each_denied_call_is_refused_and_ordinary_ones_pass(machine: str) -> None:
    column = list(ARCHITECTURES).index(machine)
    for name, numbers in DENIED.items():
        if numbers[column] is not None:
            assert decide(machine, numbers[column]) == REFUSED, name
    for name, numbers in ALLOWED.items():
        assert decide(machine, numbers[column]) == ALLOW, name


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_clone_makes_processes_and_threads_but_no_namespace(machine: str) -> None:
    clone, threads, fork = ARCHITECTURES[machine].clone, 0x003D0F00, 0x01200011
    assert decide(machine, clone, threads) == decide(machine, clone, fork) == ALLOW
    for bit in range(17, 31):
        if NEW_NAMESPACE >> bit & 1:
            assert decide(machine, clone, fork | 1 << bit) == REFUSED
    assert bin(NEW_NAMESPACE).count("1") == 7
    assert decide(machine, 435) == ERROR | errno.ENOSYS


def test_calls_of_another_architecture_do_not_get_through() -> None:
    i386, x32 = 0x40000003, 0x40000000
    assert decide("x86_64", 26, audit=i386) == KILL  # ptrace of i386
    assert decide("x86_64", x32 | 521) == REFUSED and decide("x86_64", x32) == REFUSED  # ptrace and read of x32
    assert decide("aarch64", 0, audit=ARCHITECTURES["x86_64"].audit) == KILL


def test_a_machine_that_is_not_known_is_an_error_in_words() -> None:
    with pytest.raises(ValueError, match=r"'riscv64'; there are x86_64, aarch64"):
        seccomp_filter("riscv64")


INSIDE = """
import ctypes, os, struct, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
program = ctypes.create_string_buffer(bytes.fromhex(sys.argv[1]))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(program.raw) // 8, ctypes.addressof(program)))) == 0
def answer(call, *arguments):
    ctypes.set_errno(0)
    return call(*arguments) == -1 and ctypes.get_errno()
print(answer(libc.unshare, 0x10000000), answer(libc.ptrace, 0, 0, 0, 0), answer(libc.personality, 0xFFFFFFFF))
threads = [threading.Thread(target=lambda: None) for _ in range(3)]
[t.start() for t in threads], [t.join() for t in threads]
print(os.spawnlp(os.P_WAIT, "true", "true"), os.system("exit 3") >> 8)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
def test_the_kernel_takes_the_filter_and_programs_still_run() -> None:
    if platform.machine() not in ARCHITECTURES:
        pytest.skip(f"no filter for {platform.machine()}")
    command = [sys.executable, "-c", INSIDE, seccomp_filter(os.uname().machine).hex()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == [str(errno.EPERM)] * 3 + ["0", "3"], done.stderr
