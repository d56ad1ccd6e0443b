"""What the AMD GPUs are: supported or not, under which name they run, how much memory, which of several."""

from __future__ import annotations

from .amd_cards import (
    OFFICIAL,
    UNOFFICIAL,
    UNSUPPORTED,
    gfx_of_override,
    same_family,
)
from .amd_kernels import Kernels, system_kernels, torch_kernels
from .amd_topology import AmdGpu, amd_gpus, useful_gpus
from .finding import Finding, absent, failure, ok, warning
from .system import System, gib

OVERRIDE = "HSA_OVERRIDE_GFX_VERSION"
VISIBLE = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
# SD1.5 in fp16: 2.1 GB of weights, the rest for activations and the decoder at 512x512.
MEMORY_NEED = 4 * 2**30


def check_gfx(system: System) -> list[Finding]:
    """D-AMD-GFX: each GPU with its gfx name and how AMD's packages treat it."""
    findings = []
    for gpu in useful_gpus(system):
        where = (f"GPU {gpu.index}: {gpu.source}",)
        card = gpu.card
        if card is None:
            text = f"{gpu.gfx} is not in Kiln's table of AMD GPUs"
            fix = ["Look for it in AMD's page 'Compatibility matrix', and report it."]
            findings.append(warning("D-AMD-GFX", text, where, fix))
        elif card.support == OFFICIAL:
            findings.append(ok("D-AMD-GFX", f"{gpu.title}, {card.architecture}: supported by AMD", *where))
        elif card.support == UNOFFICIAL:
            tried = "and starts it in a test" if card.tested else "but does not test it"
            text = f"{gpu.title}, {card.architecture}: AMD builds for it {tried}, without support"
            fix = [
                "Take torch with ROCm (docs/amd.md, section 2); MIGraphX is not built for this GPU by AMD."
            ]
            findings.append(warning("D-AMD-GFX", text, where, fix))
        else:
            text = f"{gpu.title}, {card.architecture}: no current ROCm has code for it"
            fix = ["pip install 'kiln-diffusion[cpu]'", "kiln generate PROMPT --backend openvino"]
            findings.append(failure("D-AMD-GFX", text, where, fix))
    return findings or [absent("D-AMD-GFX", "there is no AMD GPU to name")]


def check_override(system: System) -> list[Finding]:
    """D-AMD-OVR: HSA_OVERRIDE_GFX_VERSION is set exactly if it is needed, and to what helps."""
    gpus = [gpu for gpu in useful_gpus(system) if gpu.card is None or gpu.card.support != UNSUPPORTED]
    if not gpus:
        return [absent("D-AMD-OVR", "there is no AMD GPU to override")]
    value = system.environment.get(OVERRIDE, "")
    kernels = [k for k in (torch_kernels(system), system_kernels(system)) if k]
    # It acts on all GPUs at once; the first is the one that is used.
    return [_set_override(gpus[0], value, kernels) if value else _unset_override(gpus[0], kernels)]


def _set_override(gpu: AmdGpu, value: str, kernels: list[Kernels]) -> Finding:
    stands_for = gfx_of_override(value)
    evidence = [f"{OVERRIDE}={value}", f"{gpu.gfx}: {gpu.source}", *map(_listing, kernels)]
    unset = [f"unset {OVERRIDE}", "Look for it in ~/.bashrc, ~/.profile, /etc/environment and service files."]
    if not stands_for:
        return failure("D-AMD-OVR", f"{OVERRIDE} is no version like 10.3.0", evidence, unset)
    if stands_for == gpu.gfx:
        return warning("D-AMD-OVR", f"the override names what the GPU is anyway, {gpu.gfx}", evidence, unset)
    native = bool(kernels) and all(gpu.gfx in k.gfx for k in kernels)
    known = gpu.card.override if gpu.card else ""
    right = [f"export {OVERRIDE}={known}"] if known and known != value and not native else unset
    if not same_family(stands_for, gpu.gfx):
        text = f"override wrong: {gpu.gfx} does not run code of {stands_for}"
        return failure("D-AMD-OVR", text, evidence, right)
    if native:
        text = f"override set but not needed: the packages have kernels for {gpu.gfx}"
        return warning("D-AMD-OVR", text, evidence, unset)
    if kernels and not any(stands_for in k.gfx for k in kernels):
        text = f"override wrong: no package has kernels for {stands_for}"
        return failure("D-AMD-OVR", text, evidence, right)
    if not known:
        text = f"no override is known to work for {gpu.gfx}; reports of others end in crashes"
        return warning("D-AMD-OVR", text, evidence, unset)
    if not kernels:
        text = f"override set; whether {gpu.gfx} needs it depends on packages that are not there yet"
        return warning("D-AMD-OVR", text, evidence, unset)
    return ok("D-AMD-OVR", f"{gpu.gfx} runs as {stands_for}, as it has to with these packages", *evidence)


def _unset_override(gpu: AmdGpu, kernels: list[Kernels]) -> Finding:
    evidence = [f"{OVERRIDE} is not set", *map(_listing, kernels)]
    lacking = [k for k in kernels if gpu.gfx not in k.gfx]
    if not lacking:
        return ok("D-AMD-OVR", f"no override is set, and {gpu.gfx} needs none as far as is known", *evidence)
    known = gpu.card.override if gpu.card else ""
    helps = gfx_of_override(known) if known else ""
    missing = " and ".join(k.package for k in lacking)
    if helps and all(helps in k.gfx for k in lacking):
        text = f"override needed: {missing} has no kernels for {gpu.gfx}"
        fix = [f"export {OVERRIDE}={known}", f"Better: packages built for {gpu.gfx}, docs/amd.md, section 2."]
        return failure("D-AMD-OVR", text, evidence, fix)
    text = f"{missing} has no kernels for {gpu.gfx}, and no override helps"
    fix = [f"Install packages built for {gpu.gfx}: docs/amd.md, section 2."]
    return failure("D-AMD-OVR", text, evidence, fix)


def _listing(kernels: Kernels) -> str:
    return f"{kernels.package} has kernels for {', '.join(sorted(kernels.gfx))} ({kernels.folder})"


def check_memory(system: System) -> list[Finding]:
    """D-AMD-VRAM: enough memory for Stable Diffusion 1.5; an integrated GPU also uses the machine's."""
    findings = []
    for gpu in useful_gpus(system):
        if gpu.vram is None:
            findings.append(absent("D-AMD-VRAM", f"{gpu.gfx} does not say how much memory it has"))
            continue
        total = gpu.vram + (gpu.gtt or 0 if gpu.integrated else 0)
        free = total - (gpu.vram_used or 0)
        evidence = [f"GPU {gpu.index}: VRAM {gib(gpu.vram)}, in use {gib(gpu.vram_used or 0)}"]
        if gpu.integrated:
            evidence.append(f"it also uses up to {gib(gpu.gtt or 0)} of the machine's memory (GTT)")
        if total < MEMORY_NEED:
            text = f"{gpu.gfx} has {gib(total)}; Stable Diffusion 1.5 in fp16 wants {gib(MEMORY_NEED)}"
            fix = ["kiln generate PROMPT -W 384 -H 384 --batch-size 1", *_bios(gpu)]
            findings.append(warning("D-AMD-VRAM", text, evidence, fix))
        elif free < MEMORY_NEED:
            text = f"{gpu.gfx} has {gib(free)} free of {gib(total)}"
            fix = [
                "Close programs that use the GPU; this shows them: sudo fuser -v /dev/kfd /dev/dri/render*."
            ]
            findings.append(warning("D-AMD-VRAM", text, evidence, fix))
        else:
            findings.append(ok("D-AMD-VRAM", f"{gpu.gfx} has {gib(free)} free of {gib(total)}", *evidence))
    return findings or [absent("D-AMD-VRAM", "there is no AMD GPU with memory to count")]


def _bios(gpu: AmdGpu) -> list[str]:
    return ["Set a larger 'UMA frame buffer' in the firmware setup."] if gpu.integrated else []


def check_several(system: System) -> list[Finding]:
    """D-AMD-IGPU: of a card and the processor's graphics, the card is the one that is used."""
    gpus = amd_gpus(system)
    cards, integrated = ([g for g in gpus if g.integrated is kind] for kind in (False, True))
    if not cards or not integrated:
        return [absent("D-AMD-IGPU", "there are not a card and integrated graphics of AMD")]
    want = ",".join(str(gpu.index) for gpu in cards)
    evidence = [f"GPU {gpu.index}: {gpu.title}" for gpu in gpus]
    set_to = {name: system.environment[name] for name in VISIBLE if name in system.environment}
    evidence += [f"{name}={value}" for name, value in set_to.items()]
    shown = next(iter(set_to.values()), None)
    fix = [f"export HIP_VISIBLE_DEVICES={want}"]
    if shown is None:
        text = "integrated graphics beside a card: ROCm uses both and may take the wrong one, or crash"
        return [warning("D-AMD-IGPU", text, evidence, fix)]
    indices = {part.strip() for part in shown.split(",")}
    if indices & {str(gpu.index) for gpu in integrated}:
        text = "the integrated graphics are among the visible devices"
        return [warning("D-AMD-IGPU", text, evidence, fix)]
    return [ok("D-AMD-IGPU", "the integrated graphics are hidden from ROCm", *evidence)]
