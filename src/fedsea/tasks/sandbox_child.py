"""The process that `fedsea.tasks.sandbox` starts: gives up all but computing and reading files, then runs a program.

A script of its own, with the standard library and nothing else. Linux's seccomp holds it: a system call that is not in
`ALLOWED` fails with EPERM, for good. So no file is written, changed or removed, no process or thread is started, no
other process gets a signal, and there is no socket.
"""

import ctypes
import json
import os
import resource
import struct
import sys
from collections.abc import Iterable

# Numbers of system calls on x86-64 and on ARM64 (asm/unistd.h), None where a machine has none.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "close": (3, 57),
    "lseek": (8, 62), "dup": (32, 23), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "statx": (332, 291),
    "newfstatat": (262, 79), "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439),
    "readlink": (89, None), "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17),
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "brk": (12, 214),
    "madvise": (28, 233), "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getrusage": (98, 165),
    "getrandom": (318, 278), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "uname": (63, 160), "sysinfo": (99, 179),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
OPENS = {"open": (2, None, 1), "openat": (257, 56, 2)}  # allowed for reading; the last is which argument has the flags
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp calls them (linux/audit.h)
OPENS_TO_WRITE = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC

# Of classic BPF (linux/bpf_common.h) and seccomp (linux/seccomp.h).
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
KILL, ALLOW, REFUSE = 0x80000000, 0x7FFF0000, 0x00050001  # the last with EPERM
NUMBER_AT, MACHINE_AT, ARGUMENTS_AT = 0, 4, 16
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2


class _Filter(ctypes.Structure):
    """Linux's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def main() -> None:
    """Read a program, limits and a token from standard input; write the token to standard output if it runs through."""
    given = json.loads(sys.stdin.buffer.read())
    token = given["token"].encode()
    result, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
    try:
        for stream in range(3):
            os.dup2(nothing, stream)
        limit(given["cpu_seconds"], given["memory_bytes"])
        give_up_system_calls()
    except BaseException as error:
        os.write(result, f"{type(error).__name__}: {error}".encode())
        raise
    try:
        exec(given["program"], {})
    except BaseException:  # SystemExit too: the program has not come to its end
        os._exit(1)
    os.write(result, token)
    os._exit(0)  # at once: what the program has left for the exit is not run


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Bound what this process may use; no limit can be raised again, and none is over what holds already."""
    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: 1000,  # standard output is a file
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def give_up_system_calls() -> None:
    """Leave this process the allowed system calls only. OSError if the kernel cannot do that."""
    code = b"".join(_filter(os.uname().machine))
    _prctl(PR_SET_PDEATHSIG, 9)  # killed as its parent ends, however that ends
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    filter_ = _Filter(len(code) // 8, code)
    _prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.addressof(filter_))


def _filter(machine: str) -> Iterable[bytes]:
    if machine not in MACHINES:
        raise OSError(f"the system calls of a machine of the kind {machine} are not known")
    column = list(MACHINES).index(machine)
    yield _instruction(LOAD, MACHINE_AT)
    yield _instruction(IF_EQUAL, MACHINES[machine], skip_if=1)
    yield _instruction(RETURN, KILL)
    yield _instruction(LOAD, NUMBER_AT)
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            yield _instruction(IF_EQUAL, number, skip_else=1)
            yield _instruction(RETURN, ALLOW)
    for *both, flags in OPENS.values():
        if (number := both[column]) is not None:
            yield _instruction(IF_EQUAL, number, skip_else=4)
            yield _instruction(LOAD, ARGUMENTS_AT + 8 * flags)
            yield _instruction(IF_ANY_BIT, OPENS_TO_WRITE, skip_if=1)
            yield _instruction(RETURN, ALLOW)
            yield _instruction(RETURN, REFUSE)
    yield _instruction(RETURN, REFUSE)


def _instruction(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    """Linux's `struct sock_filter`; a comparison skips as many instructions."""
    return struct.pack("=HBBI", code, skip_if, skip_else, value)


def _prctl(option: int, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    padded = (*arguments, 0, 0, 0, 0)[:4]
    if libc.prctl(option, *map(ctypes.c_ulong, padded)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main()
