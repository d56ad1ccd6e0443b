"""Which package checks which family and dialect, as docs/adapters.md says it; the tests are what is asked.

    python tests/exporters/adapters/oracle_table.py        writes the tables of docs/adapters.md anew

A test module that compares with a package says in ``CHECKED`` which cases of cases.py it does that for.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "adapters.md"
BEGIN, END = "<!-- begin {} -->", "<!-- end {} -->"
# Test module -> the package that it compares with.
MODULES = {
    "test_against_lycoris": "lycoris",
    "test_against_peft": "PEFT",
    "test_against_peft_parts": "PEFT",
    "test_against_invokeai": "InvokeAI",
    "test_against_torch": "torch",
}
NETWORKS = "test_against_lycoris_networks"
DISAGREEMENTS = "test_known_disagreements"


@dataclass(frozen=True)
class Family:
    """A row: the cases of a family, where packages are wrong, and why a case has fewer than two of them."""

    title: str
    cases: tuple[str, ...]
    disagreements: tuple[str, ...] = ()
    fewer: Mapping[str, str] = field(default_factory=dict)


FAMILIES = (
    Family(
        "LoRA, LoCon",
        ("LoRA", "LoRA without alpha", "LoRA linear as 1x1", "LoRA 1x1 as linear", "LoCon", "CP"),
        (
            "test_diffusers_mixes_up_ranks_without_alpha",
            "test_diffusers_gives_modules_without_alpha_that_of_the_others",
        ),
    ),
    Family(
        "LoRA with a stored scale",
        ("LoRA with scale",),
        fewer={"LoRA with scale": "only stable-diffusion-webui, which is no package, reads the key"},
    ),
    Family(
        "LoHa",
        ("LoHa", "LoHa without alpha", "LoHa conv", "LoHa 1x1", "LoHa Tucker"),
        (
            "test_lycoris_merges_loha_and_lokr_with_the_square_of_their_scale",
            "test_lycoris_cannot_make_some_modules_from_a_file",
        ),
    ),
    Family(
        "LoKr",
        (
            *("LoKr", "LoKr both factored", "LoKr first factored", "LoKr both whole", "LoKr larger first"),
            *("LoKr conv", "LoKr conv factored", "LoKr conv factored with a kernel", "LoKr of 2023"),
            "LoKr Tucker",
        ),
        (
            "test_lycoris_merges_loha_and_lokr_with_the_square_of_their_scale",
            "test_lycoris_cannot_load_the_first_lokr_files",
            "test_lycoris_divides_a_tucker_lokr_by_its_width",
        ),
        {"LoKr conv factored with a kernel": "InvokeAI and PEFT multiply matrices only"},
    ),
    Family(
        "IA3",
        (
            *("IA3 on the inputs", "IA3 on the outputs"),
            *("IA3 conv on the inputs", "IA3 conv on the outputs"),
        ),
        ("test_lycoris_cannot_make_some_modules_from_a_file",),
    ),
    Family(
        "GLoRA",
        ("GLoRA", "GLoRA conv", "GLoRA 1x1", "GLoRA CP", "GLoRA old"),
        (
            "test_peft_multiplies_the_weight_by_glora_elementwise",
            "test_lycoris_cannot_make_a_glora_in_cp_form",
        ),
    ),
    Family("differences of weights and norms", ("difference", "difference conv", "norm")),
    Family(
        "set weight", ("set",), fewer={"set": "besides InvokeAI only ComfyUI, which is no package, reads it"}
    ),
    Family(
        "sparse remainder",
        ("sparse beside a LoRA", "sparse conv"),
        fewer=dict.fromkeys(
            ("sparse beside a LoRA", "sparse conv"),
            "lycoris writes it and reads it not; InvokeAI takes it for a bias",
        ),
    ),
    Family(
        "DoRA over LoRA",
        (
            *("DoRA of the inputs", "DoRA of the outputs"),
            *("DoRA conv of the inputs", "DoRA conv of the outputs"),
            *("DoRA as a vector of the outputs", "DoRA as a vector of the inputs"),
            *("DoRA of PEFT", "DoRA of PEFT conv"),
        ),
        (
            "test_lycoris_cannot_make_some_modules_from_a_file",
            "test_diffusers_drops_the_lengths_of_dora",
        ),
    ),
    Family(
        "DoRA over LoHa and LoKr",
        (
            *("DoRA over LoHa", "DoRA over LoHa of the inputs"),
            *("DoRA over LoKr", "DoRA over LoKr of the outputs"),
        ),
    ),
    Family(
        "OFT of LyCORIS and kohya",
        (
            *("OFT", "OFT with alpha 0", "OFT constrained", "OFT conv with rescale", "OFT of kohya"),
            *("OFT of kohya with alpha 0", "old OFT", "first OFT"),
        ),
        (
            "test_lycoris_leaves_rescale_at_full_strength",
            "test_lycoris_cannot_make_some_modules_from_a_file",
        ),
        {"OFT of kohya with alpha 0": "clamped to no rotation: what is checked is the weight itself"},
    ),
    Family(
        "OFT of OneTrainer",
        (
            *("OFT of OneTrainer", "OFT of OneTrainer conv", "OFT of OneTrainer shared"),
            *("OFT of OneTrainer scaled", "OFT of OneTrainer scaled at first"),
        ),
        fewer=dict.fromkeys(
            (
                *("OFT of OneTrainer", "OFT of OneTrainer conv", "OFT of OneTrainer shared"),
                *("OFT of OneTrainer scaled", "OFT of OneTrainer scaled at first"),
            ),
            "OneTrainer is no package; PEFT has the same series, not the scaling",
        ),
    ),
    Family(
        "OFT of PEFT",
        ("OFT of PEFT", "OFT of PEFT conv"),
        fewer=dict.fromkeys(("OFT of PEFT", "OFT of PEFT conv"), "PEFT alone writes and reads it"),
    ),
    Family("BOFT", ("BOFT", "BOFT constrained", "BOFT conv with rescale")),
)


@dataclass(frozen=True)
class Dialect:
    """A row: how a dialect's keys look, and the tests that compare them with something."""

    title: str
    example: str
    oracle: str
    tests: tuple[str, ...]


DIALECTS = (
    Dialect(
        "kohya, diffusers' names",
        "`lora_unet_down_blocks_0_[…]_attn1_to_q.lora_down.weight`",
        "diffusers; key lists of real SD1 files",
        (
            "test_against_diffusers::test_baked_weights_are_those_of_fuse_lora",
            "test_real_keys::test_every_key_of_a_real_list_is_applied",
        ),
    ),
    Dialect(
        "kohya, LDM names",
        "`lora_unet_input_blocks_1_1_[…]_attn1_to_q.lora_down.weight`",
        "diffusers and its converter of checkpoints; InvokeAI; the key list of a real SDXL file",
        (
            "test_against_diffusers::test_ldm_names_are_those_of_fuse_lora",
            "test_against_diffusers::test_all_ldm_names_are_those_of_the_single_file_converter",
            "test_against_invokeai::test_the_names_of_sdxl",
            "test_real_keys::test_every_key_of_a_real_list_is_applied",
        ),
    ),
    Dialect(
        "LyCORIS's own",
        "`lycoris_down_blocks_0_[…]_attn1_to_q.hada_w1_a`",
        "lycoris, as writer and reader, 19 kinds of network; real LoKr files",
        (
            "test_against_lycoris_networks::test_a_whole_unet_is_what_lycoris_merges",
            "test_real_files::test_a_real_lokr_is_the_reference",
        ),
    ),
    Dialect(
        "diffusers before 0.17",
        "`down_blocks.0.[…].attn1.processor.to_q_lora.down.weight`",
        "diffusers' `load_attn_procs`; a real file",
        (
            "test_against_diffusers::test_bare_attention_processors_are_those_of_load_attn_procs",
            "test_real_files::test_every_module_is_applied",
        ),
    ),
    Dialect(
        "diffusers 0.17 to 0.20",
        "`unet.down_blocks.0.[…].attn1.processor.to_q_lora.down.weight`",
        "diffusers",
        ("test_against_diffusers::test_baked_weights_are_those_of_fuse_lora",),
    ),
    Dialect(
        "diffusers from 0.21 on",
        "`unet.down_blocks.0.[…].attn1.to_q.lora.down.weight`",
        "diffusers; a real file",
        (
            "test_against_diffusers::test_baked_weights_are_those_of_fuse_lora",
            "test_real_files::test_every_module_is_applied",
        ),
    ),
    Dialect(
        "PEFT in a diffusers file",
        "`unet.down_blocks.0.[…].attn1.to_q.lora_A.weight`",
        "diffusers, with alphas in the metadata too",
        (
            "test_against_diffusers::test_baked_weights_are_those_of_fuse_lora",
            "test_against_diffusers::test_alpha_in_the_metadata_of_diffusers",
        ),
    ),
    Dialect(
        "PEFT's folder",
        "`base_model.model.[…].q_proj.lora_A.weight` and `adapter_config.json`",
        "PEFT, 19 configurations; a real folder",
        (
            "test_against_diffusers::test_a_peft_folder_is_that_of_merge_and_unload",
            "test_against_peft::test_a_folder_is_that_of_merge_and_unload",
            "test_real_files::test_every_module_is_applied",
        ),
    ),
    Dialect(
        "cloneofsimo's numbers",
        "`unet:12:up`, or a list of matrices in a `.pt`",
        "a walk through diffusers' and transformers' modules, extended lists too; real short lists",
        (
            "test_positions::test_the_order_is_that_of_the_walk",
            "test_positions::test_the_order_of_the_text_encoder_is_that_of_the_walk",
            "test_positions::test_an_extended_list_is_applied",
            "test_real_files::test_every_module_is_applied",
        ),
    ),
    Dialect(
        "ComfyUI, OneTrainer, NTC",
        "`diffusion_model.input_blocks.1.1.[…].attn1.to_q.lora_up.weight` and others",
        "none that is a package: each spelling is held against the layer that it names",
        (
            "test_names::test_every_spelling_of_one_module",
            "test_names::test_more_spellings_of_one_module",
            "test_names::test_spellings_of_the_text_encoders_of_sdxl",
            "test_names::test_names_of_the_unet_of_sdxl_in_both_dialects",
        ),
    ),
)


def load(name: str) -> Any:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"kiln_tests_oracles_{name}", HERE / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def packages() -> dict[str, list[str]]:
    """Case -> the packages that check it, in the order of ``MODULES``."""
    found: dict[str, list[str]] = {}
    for module, package in MODULES.items():
        for case in load(module).CHECKED:
            if package not in found.setdefault(case, []):
                found[case].append(package)
    return found


def tests_of(module: str) -> dict[str, str]:
    """Names of the tests of a module, and the first line of what each says of itself."""
    tree = ast.parse((HERE / f"{module}.py").read_text(encoding="utf-8"))
    return {
        node.name: (ast.get_docstring(node) or "").split("\n")[0]
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def words(test: str) -> str:
    """What the name of a test says."""
    return test.removeprefix("test_").replace("_", " ")


def family_table(checked: Mapping[str, Sequence[str]]) -> str:
    """Rows of families by form."""
    lines = ["| family | form | checked against | fewer than two, because |", "|---|---|---|---|"]
    for family in FAMILIES:
        for index, case in enumerate(family.cases):
            title = family.title if index == 0 else ""
            names = ", ".join(["float64 reference", *checked.get(case, ())])
            lines.append(f"| {title} | {case} | {names} | {family.fewer.get(case, '')} |")
    return "\n".join(lines)


def dialect_table() -> str:
    """Rows of dialects."""
    lines = ["| dialect | a key | checked against |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {d.title} | {d.example} | {d.oracle} |" for d in DIALECTS)])


def disagreement_list() -> str:
    """Where packages are wrong, as the tests that show it say, with the families that it concerns."""
    concerned: dict[str, list[str]] = {}
    for family in FAMILIES:
        for name in family.disagreements:
            concerned.setdefault(name, []).append(family.title)
    lines = []
    for name, text in tests_of(DISAGREEMENTS).items():
        families = f" ({'; '.join(concerned[name])})" if name in concerned else ""
        lines.append(f"* **{words(name)}**{families}." + (f" {text}" if text else ""))
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its generated parts made anew."""
    parts = {
        "families": family_table(packages()),
        "dialects": dialect_table(),
        "disagreements": disagreement_list(),
    }
    for name, text in parts.items():
        begin, end = BEGIN.format(name), END.format(name)
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{text}\n{end}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
