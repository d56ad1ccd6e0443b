"""One module of every family, layout and shape of layer, with random tensors under real names."""

from __future__ import annotations

import numpy as np

LINEAR, CONV, POINT = (12, 20), (12, 20, 3, 3), (12, 20, 1, 1)
LORA = {"lora_down.weight": (4, 20), "lora_up.weight": (12, 4)}
LORA_CONV = {"lora_down.weight": (4, 20, 3, 3), "lora_up.weight": (12, 4, 1, 1)}
LOHA = {"hada_w1_a": (12, 4), "hada_w1_b": (4, 20), "hada_w2_a": (12, 4), "hada_w2_b": (4, 20)}
LOHA_CONV = {"hada_w1_a": (12, 4), "hada_w1_b": (4, 180), "hada_w2_a": (12, 4), "hada_w2_b": (4, 180)}
LOKR = {"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)}
ALPHA = {"alpha": 2.5}


def glora(kernel=(), bm=False):
    """Shapes of the new layout."""
    point = (1,) * len(kernel)
    second = (
        {"b2.weight": (4, 20, *point), "bm.weight": (4, 4, *kernel)}
        if bm
        else {"b2.weight": (4, 20, *kernel)}
    )
    return {
        "a1.weight": (20, 4, *point),
        "a2.weight": (4, 20, *point),
        "b1.weight": (12, 4, *point),
        **second,
    }


# name -> shape of the weight, and of each tensor; a number, an array or a list is taken as it is.
CASES = {
    "LoRA": (LINEAR, LORA | ALPHA),
    "LoRA without alpha": (LINEAR, LORA),
    "LoRA with scale": (LINEAR, LORA | ALPHA | {"scale": 0.25}),
    "LoRA linear as 1x1": (
        LINEAR,
        {"lora_down.weight": (4, 20, 1, 1), "lora_up.weight": (12, 4, 1, 1)} | ALPHA,
    ),
    "LoRA 1x1 as linear": (POINT, LORA | ALPHA),
    "LoCon": (CONV, LORA_CONV | ALPHA),
    "CP": (
        CONV,
        {"lora_down.weight": (4, 20, 1, 1), "lora_mid.weight": (4, 4, 3, 3), "lora_up.weight": (12, 4, 1, 1)}
        | ALPHA,
    ),
    "LoHa": (LINEAR, LOHA | ALPHA),
    "LoHa without alpha": (LINEAR, LOHA),
    "LoHa conv": (CONV, LOHA_CONV | ALPHA),
    "LoHa 1x1": (POINT, LOHA | ALPHA),
    "LoHa Tucker": (
        CONV,
        {
            "hada_t1": (4, 4, 3, 3),
            "hada_w1_a": (4, 12),
            "hada_w1_b": (4, 20),
            "hada_t2": (4, 4, 3, 3),
            "hada_w2_a": (4, 12),
            "hada_w2_b": (4, 20),
        }
        | ALPHA,
    ),
    "LoKr": (LINEAR, LOKR | ALPHA),
    "LoKr both factored": (
        LINEAR,
        {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5)} | ALPHA,
    ),
    "LoKr first factored": (LINEAR, {"lokr_w1_a": (3, 2), "lokr_w1_b": (2, 4), "lokr_w2": (4, 5)} | ALPHA),
    "LoKr both whole": (LINEAR, {"lokr_w1": (3, 4), "lokr_w2": (4, 5), "alpha": 1e10}),
    "LoKr larger first": (LINEAR, {"lokr_w1": (6, 10), "lokr_w2_a": (2, 1), "lokr_w2_b": (1, 2)} | ALPHA),
    "LoKr conv": (CONV, {"lokr_w1": (3, 4), "lokr_w2": (4, 5, 3, 3)} | ALPHA),
    "LoKr conv factored": (
        CONV,
        {"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 45)} | ALPHA,
    ),
    "LoKr conv factored with a kernel": (
        CONV,
        {"lokr_w1": (3, 4), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 5, 3, 3)} | ALPHA,
    ),
    # The first files factored the inputs times the kernel: 15 * 12 = 20 * 9, and 12 does not divide 20.
    "LoKr of 2023": (
        CONV,
        {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 12), "lokr_w2_a": (3, 2), "lokr_w2_b": (2, 15)} | ALPHA,
    ),
    "LoKr Tucker": (
        CONV,
        {"lokr_w1": (3, 4), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5)} | ALPHA,
    ),
    "IA3 on the inputs": (LINEAR, {"weight": (20,), "on_input": 1.0}),
    "IA3 on the outputs": (LINEAR, {"weight": (12,), "on_input": 0.0}),
    "IA3 conv on the inputs": (CONV, {"weight": (1, 20, 1, 1), "on_input": 1.0}),
    "IA3 conv on the outputs": (CONV, {"weight": (1, 12, 1, 1), "on_input": 0.0}),
    "GLoRA": (LINEAR, glora() | ALPHA),
    "GLoRA conv": (CONV, glora((3, 3)) | ALPHA),
    "GLoRA 1x1": (POINT, glora((1, 1)) | ALPHA),
    "GLoRA CP": (CONV, glora((3, 3), bm=True) | ALPHA),
    "GLoRA old": (
        LINEAR,
        {"a1.weight": (4, 20), "a2.weight": (20, 4), "b1.weight": (4, 20), "b2.weight": (12, 4)} | ALPHA,
    ),
    "difference": (LINEAR, {"diff": LINEAR}),
    "difference conv": (CONV, {"diff": CONV}),
    "norm": ((12,), {"w_norm": (12,)}),
    "set": (CONV, {"set_weight": CONV}),
    "sparse beside a LoRA": (
        LINEAR,
        LORA
        | ALPHA
        | {
            "bias_indices": np.array([[0, 3, 3, 11], [19, 2, 2, 0]], np.int16),
            "bias_values": (4,),
            "bias_size": np.array([12, 20], np.int16),
        },
    ),
    "sparse conv": (
        CONV,
        {
            "bias_indices": np.array([[0, 3, 11], [19, 2, 0], [0, 1, 2], [2, 1, 0]], np.int16),
            "bias_values": (3,),
            "bias_size": np.array(CONV, np.int64),
        },
    ),
    "DoRA of the inputs": (LINEAR, LORA | ALPHA | {"dora_scale": (1, 20)}),
    "DoRA of the outputs": (LINEAR, LORA | ALPHA | {"dora_scale": (12, 1)}),
    "DoRA conv of the inputs": (CONV, LORA_CONV | ALPHA | {"dora_scale": (1, 20, 1, 1)}),
    "DoRA conv of the outputs": (CONV, LORA_CONV | ALPHA | {"dora_scale": (12, 1, 1, 1)}),
    "DoRA as a vector of the outputs": (LINEAR, LORA | ALPHA | {"dora_scale": (12,)}),
    "DoRA as a vector of the inputs": (LINEAR, LORA | ALPHA | {"dora_scale": (20,)}),
    "DoRA of PEFT": (LINEAR, LORA | ALPHA | {"lora_magnitude_vector": (12,)}),
    "DoRA of PEFT conv": (CONV, LORA_CONV | ALPHA | {"lora_magnitude_vector.weight": (1, 12, 1, 1)}),
    "DoRA over LoHa": (LINEAR, LOHA | ALPHA | {"dora_scale": (12, 1)}),
    "DoRA over LoHa of the inputs": (CONV, LOHA_CONV | ALPHA | {"dora_scale": (1, 20, 1, 1)}),
    "DoRA over LoKr": (LINEAR, LOKR | ALPHA | {"dora_scale": (1, 20)}),
    "DoRA over LoKr of the outputs": (LINEAR, LOKR | ALPHA | {"dora_scale": (12, 1)}),
    "OFT": (LINEAR, {"oft_blocks": (3, 4, 4)}),
    "OFT with alpha 0": (LINEAR, {"oft_blocks": (3, 4, 4), "alpha": 0.0}),
    "OFT constrained": (LINEAR, {"oft_blocks": (3, 4, 4), "alpha": 0.05}),
    "OFT conv with rescale": (CONV, {"oft_blocks": (4, 3, 3), "rescale": (12, 1, 1, 1)}),
    "OFT of kohya": (LINEAR, {"oft_blocks": (3, 4, 4), "alpha": 0.05}),
    "OFT of kohya with alpha 0": (LINEAR, {"oft_blocks": (3, 4, 4), "alpha": 0.0}),
    "old OFT": (LINEAR, {"oft_diag": "rotation"}),
    "first OFT": (LINEAR, {"oft_diag": "rotation less one"}),
    "OFT of OneTrainer": (LINEAR, {"oft_R.weight": (5, 6)}),
    "OFT of OneTrainer conv": (CONV, {"oft_R.weight": (18, 45)}),
    "OFT of OneTrainer shared": (LINEAR, {"oft_R.weight": (1, 6)}),
    "OFT of OneTrainer scaled": (LINEAR, {"oft_R.weight": (5, 6), "oft_R.scaled_oft": np.array(True)}),
    "OFT of OneTrainer scaled at first": (LINEAR, {"oft_R.weight": (5, 6), "oft_R.scaled_oft": np.array(1)}),
    "OFT of PEFT": (LINEAR, {"oft_R.weight": (5, 6)}),
    "OFT of PEFT conv": (CONV, {"oft_R.weight": (18, 45)}),
    "BOFT": ((16, 20), {"oft_blocks": (3, 4, 4, 4)}),
    "BOFT constrained": ((16, 20), {"oft_blocks": (2, 4, 4, 4), "alpha": 0.02}),
    "BOFT conv with rescale": ((16, 20, 3, 3), {"oft_blocks": (2, 8, 2, 2), "rescale": (16, 1, 1, 1)}),
}
# Families whose change does not depend on the weight.
ADDITIVE = tuple(
    name for name in CASES if not any(word in name for word in ("DoRA", "OFT", "IA3", "GLoRA", "set"))
)


def stem_of(name):
    """The stem under which a file would have the module of a case."""
    if "kohya" in name:
        return "oft_unet_x"
    return "base_model.model.x" if name.startswith("OFT of PEFT") else "lora_unet_x"


def make(name, seed=0, dtype=np.float32):
    """Weight and tensors of a case."""
    rng = np.random.default_rng(seed)
    shape, parts = CASES[name]
    weight = rng.normal(size=shape).astype(np.float32)
    tensors = {}
    for key, part in parts.items():
        if isinstance(part, str):
            q = rng.normal(size=(3, 4, 4)) / 4
            q -= q.swapaxes(1, 2)
            turn = (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q)
            tensors[key] = (turn - np.eye(4) * (part != "rotation")).astype(dtype)
        elif isinstance(part, np.ndarray):
            tensors[key] = part
        elif isinstance(part, float):
            tensors[key] = np.array(part, np.float32)
        else:
            value = rng.normal(size=part) / 4
            lengths = key == "rescale" or key.startswith(("dora", "lora_mag"))
            tensors[key] = (np.abs(value) + 1 if lengths else value).astype(dtype)
    return weight, tensors
