"""What a fresh process does in tests/bench/test_inference.py; it imports nothing heavy."""

from fedsea_bench.processes import process_memory


def hold(*, mib: int) -> int:
    """The process's memory peak, in bytes, after holding some memory."""
    held = bytearray(b"x") * (mib << 20)
    peak = process_memory("VmHWM")
    del held
    return peak
