"""The processor: which instructions it has for Stable Diffusion, and how much of it this process may use."""

from __future__ import annotations

from ..cpu import cgroup_quota, describe_cpu
from .finding import Finding, absent, ok, warning
from .system import System

# What each instruction set is good for here; the order is that of worth.
ISA = (
    ("amx_bf16", "bf16 in tiles (AMX)"),
    ("amx_int8", "int8 in tiles (AMX)"),
    ("amx_fp16", "fp16 in tiles (AMX)"),
    ("avx512_bf16", "bf16 (AVX-512)"),
    ("avx512_fp16", "fp16 (AVX-512)"),
    ("avx512_vnni", "int8 (VNNI, AVX-512)"),
    ("avx_vnni", "int8 (VNNI, AVX2)"),
    ("avx512f", "fp32, 16 at once"),
    ("avx2", "fp32, 8 at once"),
    ("fma", "multiply and add in one"),
    ("f16c", "fp16 storage"),
    ("sve", "vectors of any length (Arm)"),
    ("bf16", "bf16 (Arm)"),
    ("asimddp", "int8 (Arm)"),
    ("asimd", "fp32, 4 at once (Arm)"),
)


def check_isa(system: System) -> list[Finding]:
    """D-CPU: which instructions there are, and which precision they favour."""
    cpu = describe_cpu(system.root)
    have = set(cpu.flags)
    evidence = [f"{'yes' if flag in have else 'no ':3} {flag:12} {use}" for flag, use in _table(have)]
    x86 = system.fields("/proc/cpuinfo", ":").get("flags", "")
    if not have and not x86:
        return [absent("D-CPU", f"{cpu.name}: /proc/cpuinfo names no instruction set Kiln knows")]
    if have & {"asimd", "sve"}:
        return [ok("D-CPU", f"{cpu.name}: {_best(have)}", *evidence)]
    if "avx2" not in have:
        text = f"{cpu.name} has no AVX2: expect minutes for each step of Stable Diffusion 1.5"
        fix = ["kiln generate PROMPT -W 256 -H 256 --steps 8"]
        if "hypervisor" in x86.split():
            fix.insert(
                0, "If this is a virtual machine, give it the host's processor type (QEMU: -cpu host)."
            )
        return [warning("D-CPU", text, evidence, fix)]
    return [ok("D-CPU", f"{cpu.name}: {_best(have)}", *evidence)]


def _table(have: set[str]) -> list[tuple[str, str]]:
    arm = bool(have & {"asimd", "sve"})
    return [row for row in ISA if row[1].endswith("(Arm)") == arm]


def _best(have: set[str]) -> str:
    """In a few words: what to compute in."""
    if have & {"amx_bf16", "avx512_bf16", "bf16"}:
        half = "bf16" + (" in tiles (AMX)" if "amx_bf16" in have else "")
    else:
        half = "no bf16, so fp32"
    if "amx_int8" in have:
        return f"{half}; int8 in tiles (AMX)"
    if have & {"avx512_vnni", "avx_vnni", "asimddp"}:
        return f"{half}; int8 has its own instructions, no tiles"
    return f"{half}; int8 without VNNI can saturate and brings little"


def check_limits(system: System) -> list[Finding]:
    """D-CPU-LIMIT: the cgroup's quota, of version 1 or 2, which engines do not all notice."""
    total = sum(line.startswith("processor") for line in system.read("/proc/cpuinfo").splitlines())
    quota = cgroup_quota(system.root)
    if quota is None:
        return [ok("D-CPU-LIMIT", f"{total} threads, no quota")]
    evidence = (f"quota {quota:.2f} processors, the machine has {total}",)
    if quota < 1:
        text = f"a quota of {quota:.2f} processors: every step stalls until the next period"
        return [warning("D-CPU-LIMIT", text, evidence, ["docker update --cpus 2 CONTAINER"])]
    threads = max(1, min(total or 1, int(quota + 0.5)))
    return [
        ok("D-CPU-LIMIT", f"a quota allows {quota:.2f} processors; Kiln starts {threads} threads", *evidence)
    ]
