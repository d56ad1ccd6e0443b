"""The rows of docs/adapters.md: families with their cases, dialects with the tests that compare names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """A row: the cases of a family, where packages are wrong, and what about a case no package says."""

    title: str
    cases: tuple[str, ...]
    disagreements: tuple[str, ...] = ()
    unsaid: Mapping[str, str] = field(default_factory=dict)


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
        unsaid={"LoRA with scale": "that it replaces alpha: read in the webui and stable-diffusion.cpp"},
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
    Family("set weight", ("set",), unsaid={"set": "a strength: InvokeAI sets it whole, as ComfyUI does"}),
    Family(
        "sparse remainder",
        ("sparse beside a LoRA", "sparse conv"),
        ("test_lycoris_forgets_the_sparse_remainder",),
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
        {"OFT of kohya with alpha 0": "that kohya's 0 constrains and LyCORIS's does not: read in both"},
    ),
    Family(
        "OFT of OneTrainer",
        (
            *("OFT of OneTrainer", "OFT of OneTrainer conv", "OFT of OneTrainer shared"),
            *("OFT of OneTrainer scaled", "OFT of OneTrainer scaled at first"),
        ),
        unsaid={
            "OFT of OneTrainer conv": "which way the kernel turns: read in OneTrainer",
            "OFT of OneTrainer scaled": "the divisor: read in OneTrainer",
            "OFT of OneTrainer scaled at first": "the divisor: read in OneTrainer",
        },
    ),
    Family("OFT of PEFT", ("OFT of PEFT", "OFT of PEFT conv")),
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
        "diffusers; InvokeAI; key lists of real SD1 files",
        (
            "test_against_diffusers::test_baked_weights_are_those_of_fuse_lora",
            "test_against_invokeai::test_the_names_of_onetrainer",
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
        "lycoris, as writer and reader, 19 kinds of network; sd-mecha's names (by hand); real LoKr files",
        (
            "test_against_sd_mecha::test_every_layer_is_found",
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
        "ComfyUI",
        "`diffusion_model.input_blocks.1.1.[…].attn1.to_q.lora_up.weight`, "
        "`text_encoders.clip_l.transformer.[…]`",
        "diffusers' converters of checkpoints, and its `fuse_lora` of the same tensors; InvokeAI's LDM names",
        (
            "test_comfyui_names::test_every_layer_of_a_unet",
            "test_comfyui_names::test_every_layer_of_a_text_encoder",
            "test_comfyui_names::test_a_file_of_comfyui_is_baked_as_diffusers_fuses_it",
            "test_against_invokeai::test_the_names_of_onetrainer",
        ),
    ),
    Dialect(
        "OneTrainer",
        "`unet.input_blocks.4.1.[…].attn1.to_q.lora_up.weight`, `lora_unet.down_blocks.1.[…]`",
        "the converter of the Open Model Initiative, with which it saves, in InvokeAI; "
        "each spelling is held against the layer that it names",
        (
            "test_against_invokeai::test_the_names_of_onetrainer",
            "test_names::test_more_spellings_of_one_module",
            "test_names::test_spellings_of_the_text_encoders_of_sdxl",
        ),
    ),
    Dialect(
        "NTC's sliders",
        "`diffusion_model_input_blocks_1_1_[…]_attn1_to_q.lora_up.weight`",
        "none that is a package (SD.Next reads it): the spelling is held against the layer that it names",
        ("test_names::test_every_spelling_of_one_module",),
    ),
)
