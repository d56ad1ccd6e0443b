"""The adapter families in float64 numpy, written from the formulas and not from the code that is tested.

``new_weight(W, tensors, strength)`` takes the tensors of one module by their names, without the stem; it
checks nothing.
"""

from __future__ import annotations

import numpy as np


def new_weight(weight, tensors, strength=1.0, stem="lora_unet_x", peft=False):
    w, t = np.asarray(weight, np.float64), {k: np.asarray(v).astype(np.float64) for k, v in tensors.items()}
    if "oft_R.weight" in t:
        return rotated_inputs(w, t, tensors, strength, peft)
    if "oft_blocks" in t or "oft_diag" in t:
        return rotated_outputs(w, t, strength, stem)
    if "on_input" in t:
        return scaled_features(w, t, strength)
    if "a1.weight" in t:
        return w + strength * glora(w, t)
    if "set_weight" in t:
        return w + strength * (t["set_weight"].reshape(w.shape) - w)
    change = additive(w, t)
    lengths = next((v for k, v in t.items() if k.startswith(("dora_scale", "lora_magnitude"))), None)
    if lengths is None:
        return w + strength * change
    outputs = "dora_scale" not in t or lengths.shape[0] != 1
    if lengths.ndim == 1 and "dora_scale" in t:
        outputs = len(lengths) == w.shape[0] != w.shape[1]
    direction = w + change
    axes = tuple(axis for axis in range(w.ndim) if axis != (0 if outputs else 1))
    shape = [-1 if axis == (0 if outputs else 1) else 1 for axis in range(w.ndim)]
    norm = np.sqrt((direction**2).sum(axes, keepdims=True))
    return w + strength * (direction * lengths.reshape(shape) / norm - w)


def factor(t, rank):
    return float(t["scale"]) if "scale" in t else (float(t["alpha"]) / rank if "alpha" in t else 1.0)


def additive(w, t):
    change, scale = np.zeros(w.size), 1.0
    if "lora_down.weight" in t:
        down, up = t["lora_down.weight"], t["lora_up.weight"]
        scale = factor(t, down.shape[0])
        up = up.reshape(up.shape[0], -1)
        if "lora_mid.weight" in t:
            product = np.einsum("oa,abkl,bi->oikl", up, t["lora_mid.weight"], down.reshape(down.shape[0], -1))
        else:
            product = up @ down.reshape(down.shape[0], -1)
        change = change + product.ravel()
    if "hada_w1_a" in t:
        scale = factor(t, t["hada_w1_b"].shape[0])
        change = change + (half(t, 1) * half(t, 2)).ravel()
    if any(k.startswith("lokr_") for k in t):
        scale = kron_scale(t)
        one = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
        two = t["lokr_w2"] if "lokr_w2" in t else kron_second(t)
        change = change + np.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two).ravel()
    if "bias_values" in t:
        sparse = np.zeros([int(n) for n in t["bias_size"]])
        np.add.at(sparse, tuple(t["bias_indices"].astype(int)), t["bias_values"])
        change = change + sparse.ravel()
    for name in ("diff", "w_norm"):
        change = change + (t[name].ravel() if name in t else 0)
    return scale * change.reshape(w.shape)


def tucker(core, left, right):
    return np.einsum("ijkl,ip,jr->prkl", core, left, right)


def half(t, n):
    left, right = t[f"hada_w{n}_a"], t[f"hada_w{n}_b"]
    return tucker(t[f"hada_t{n}"], left, right) if f"hada_t{n}" in t else left @ right.reshape(len(right), -1)


def kron_second(t):
    left, right = t["lokr_w2_a"], t["lokr_w2_b"]
    if "lokr_t2" in t:
        return tucker(t["lokr_t2"], left, right)
    return (left @ right.reshape(len(right), -1)).reshape(len(left), *right.shape[1:])


def kron_scale(t):
    ranked = t.get("lokr_w2_b", t.get("lokr_w1_b"))
    return 1.0 if ranked is None else factor(t, ranked.shape[0])


def scaled_features(w, t, strength):
    shape = [-1 if axis == int(t["on_input"]) else 1 for axis in range(w.ndim)]
    return w * (1 + strength * t["weight"].reshape(shape))


def glora(w, t):
    names = ("a1", "a2", "b1", "b2") if t["b1.weight"].shape[0] == w.shape[0] else ("a2", "a1", "b2", "b1")
    a, b, c, d = (t[f"{name}.weight"] for name in names)
    a, b, c = (v.reshape(v.shape[:2]) for v in (a, b, c))
    if "bm.weight" in t:
        beside = np.einsum("oa,abkl,bi->oikl", c, t["bm.weight"], d.reshape(d.shape[:2]))
    else:
        beside = (c @ d.reshape(len(d), -1)).reshape(w.shape)
    return factor(t, a.shape[1]) * (np.einsum("oi...,ij->oj...", w, a @ b) + beside)


def cayley(blocks, limit):
    q = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.sqrt((q**2).sum())
    q = q * (limit / norm) if limit is not None and norm > limit else q
    identity = np.eye(blocks.shape[-1])
    return (identity + q) @ np.linalg.inv(identity - q)


def rotated_outputs(w, t, strength, stem):
    rescale = t["rescale"].reshape(-1, *(1,) * (w.ndim - 1)) if "rescale" in t else 1.0
    if "oft_diag" in t:
        r, identity = t["oft_diag"], np.eye(t["oft_diag"].shape[-1])
        r = r if np.allclose(r @ r.swapaxes(1, 2), identity, atol=0.3) else r + identity
    else:
        alpha = float(t.get("alpha", -1.0))
        limited = alpha > 0 or (alpha == 0 and stem.startswith("oft_unet_"))
        r = cayley(t["oft_blocks"], alpha * w.shape[0] if limited else None)
    if r.ndim == 3:
        turned = np.einsum("knm,kn...->km...", r, w.reshape(*r.shape[:2], *w.shape[1:])).reshape(w.shape)
        return w + strength * (turned * rescale - w)
    out, b = w.reshape(len(w), -1), r.shape[-1]
    for i, stage in enumerate(r):
        stage, j = strength * stage + (1 - strength) * np.eye(b), 2**i * b // 2
        order = np.arange(len(w)).reshape(-1, 2, j).swapaxes(1, 2).ravel()
        turned = np.einsum("bij,bjc->bic", stage, out[order].reshape(-1, b, out.shape[1])).reshape(out.shape)
        out = np.empty_like(out)
        out[order] = turned
    return out.reshape(w.shape) * (1 + strength * (rescale - 1))


def rotated_inputs(w, t, raw, strength, peft):
    vectors = t["oft_R.weight"]
    b = round((1 + np.sqrt(1 + 8 * vectors.shape[1])) / 2)
    if "oft_R.scaled_oft" in t:
        flag = np.asarray(raw["oft_R.scaled_oft"]).dtype == np.bool_
        vectors = vectors / (2 * np.sqrt(b - 1) if flag else np.sqrt(vectors.shape[1]))
    q = np.zeros((len(vectors), b, b))
    q[:, *np.triu_indices(b, 1)] = vectors
    q = q - q.swapaxes(1, 2)
    r = np.eye(b) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    r = np.eye(b) + strength * (r - np.eye(b))
    r = r.swapaxes(1, 2) if w.ndim == 2 or peft else r
    flat = w.reshape(len(w), -1, b)
    return np.einsum("ork,rkc->orc", flat, np.broadcast_to(r, (flat.shape[1], b, b))).reshape(w.shape)
