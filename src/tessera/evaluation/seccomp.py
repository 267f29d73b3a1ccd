"""The system calls that a program in the sandbox is refused: a seccomp filter, as bytes for bwrap --seccomp.

A list of what is denied, not of what is allowed: programs of any language run, and what is left out are ways to other
processes' memory, to new namespaces and mounts, to the kernel's own programs, keys and clock. Namespaces, mounts and
limits are what holds the program (sandbox.py); the filter keeps it from large, rarely needed parts of the kernel.

Refused calls fail with EPERM. clone3, whose flags lie in memory that a filter cannot read, does not exist (ENOSYS): C
libraries fall back to clone, whose flags are looked at. Calls of another architecture kill the process, those of x32
are refused. Formats: linux/filter.h, linux/seccomp.h, linux/audit.h; numbers: asm/unistd_64.h, asm-generic/unistd.h.
"""

import errno
import struct
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """audit: AUDIT_ARCH of linux/audit.h; clone: that call's number; foreign: a bit of another ABI's numbers, or 0."""

    audit: int
    clone: int
    foreign: int = 0


ARCHITECTURES = {"x86_64": Architecture(0xC000003E, 56, 0x40000000), "aarch64": Architecture(0xC00000B7, 220)}

# Name: number on x86-64, number on aarch64; None where there is no such call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # programs and events inside the kernel, and what has been a way into it
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "vmsplice": (278, 75), "personality": (135, 92),
    "modify_ldt": (154, None), "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # keys
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the machine
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "syslog": (103, 116), "iopl": (172, None), "ioperm": (173, None), "sethostname": (170, 161),
    "setdomainname": (171, 162), "settimeofday": (164, 170), "clock_settime": (227, 112), "clock_adjtime": (305, 266),
    "adjtimex": (159, 171), "vhangup": (153, 58), "lookup_dcookie": (212, 18),
}  # fmt: skip
CLONE3 = 435  # on both
# CLONE_NEWTIME 0x80 shares its bit with the exit signal of clone, where it cannot be asked for.
NEW_NAMESPACE = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

LOAD, JUMP_EQUAL, JUMP_ANY_BIT, RETURN = (
    0x20,
    0x15,
    0x45,
    0x06,
)  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JSET|K, BPF_RET|K
NUMBER, AUDIT, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's lower half
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_filter(machine: str) -> bytes:
    """The filter for a machine as os.uname() names it: struct sock_filter[], in the machine's (little) byte order.

    Raises ValueError for a machine whose numbers are not known.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(f"no filter of system calls for {machine!r}; there are {', '.join(ARCHITECTURES)}")
    architecture, column = ARCHITECTURES[machine], list(ARCHITECTURES).index(machine)
    numbers = sorted(number for pair in DENIED.values() if (number := pair[column]) is not None)
    refused = ERROR | errno.EPERM
    # Jumps skip instructions: (code, when true, when false, constant).
    steps = [(LOAD, 0, 0, AUDIT), (JUMP_EQUAL, 1, 0, architecture.audit), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if architecture.foreign:
        steps += [(JUMP_ANY_BIT, 0, 1, architecture.foreign), (RETURN, 0, 0, refused)]
    steps += [(JUMP_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, ERROR | errno.ENOSYS)]
    for number in numbers:
        steps += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, refused)]
    steps += [(JUMP_EQUAL, 0, 3, architecture.clone), (LOAD, 0, 0, FIRST_ARGUMENT)]
    steps += [(JUMP_ANY_BIT, 0, 1, NEW_NAMESPACE), (RETURN, 0, 0, refused), (RETURN, 0, 0, ALLOW)]
    return b"".join(struct.pack("<HBBI", *step) for step in steps)
