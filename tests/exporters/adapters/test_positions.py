"""The numbers of cloneofsimo/lora's modules, against a walk through diffusers' own modules.

That trainer visits a model's modules in the order in which torch holds them: below each module of certain
classes it takes the linear layers, in its extended form the convolutions too. diffusers' blocks are still
registered in the order of that time, but for one: the feed-forward part of a transformer block stood between
the two attentions then.
"""

from __future__ import annotations

import numpy as np
import pytest

from kiln.errors import AdapterError
from kiln.exporters.adapters.base import AdapterRef
from kiln.exporters.adapters.keys import positional_order
from kiln.exporters.adapters.plan import plan_bake

torch = pytest.importorskip("torch")
PLAIN, GEGLU = {"Attention"}, {"Attention", "GEGLU"}
CASES = {
    "attentions": (PLAIN, False),
    "with GEGLU": (GEGLU, False),
    "extended": (GEGLU | {"ResnetBlock2D"}, True),
    "extended without GEGLU": (PLAIN | {"ResnetBlock2D"}, True),
}


def in_old_order(block):
    """The transformer blocks with their parts registered as in 2022."""
    for module in block.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            parts = dict(module._modules)
            module._modules.clear()
            module._modules.update((n, parts[n]) for n in ("attn1", "ff", "attn2", "norm1", "norm2", "norm3"))


def walked(model, classes, convolutions):
    """Paths of the layers in the order in which the trainer meets them."""
    wanted = (torch.nn.Linear, torch.nn.Conv2d) if convolutions else (torch.nn.Linear,)
    names = {module: name for name, module in model.named_modules()}
    return [
        names[layer]
        for ancestor in model.modules()
        if type(ancestor).__name__ in classes
        for layer in ancestor.modules()
        if isinstance(layer, wanted)
    ]


@pytest.fixture
def unet(tiny):
    import copy

    model = copy.deepcopy(tiny.unet)
    in_old_order(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_order_is_that_of_the_walk(tiny, unet, case):
    expected = walked(unet, *CASES[case])
    modules = [name.removesuffix(".weight") for name in tiny.tensors["unet"] if name.endswith(".weight")]
    assert len(set(expected)) == len(expected) > 100
    assert positional_order("unet", modules, len(expected)) == expected
    assert positional_order("unet", modules, len(expected) - 1) == []


def test_the_order_of_the_text_encoder_is_that_of_the_walk(tiny):
    """As transformers registers CLIP's attention: k, v, q, out."""
    expected = walked(tiny.text_encoder, {"CLIPAttention"}, False)
    modules = [name.removesuffix(".weight") for name in tiny.tensors["text_encoder"] if "weight" in name]
    assert positional_order("text_encoder", modules, len(expected)) == expected


def numbered(order, tensors, rank=2):
    """Factors for every layer of an order, under their numbers; and the changes they make."""
    rng = np.random.default_rng(0)
    state, changes = {}, {}
    for number, path in enumerate(order):
        shape = tensors[f"{path}.weight"].shape
        down = rng.normal(size=(rank, *shape[1:])).astype(np.float32)
        up = rng.normal(size=(shape[0], rank, *(1,) * (len(shape) - 2))).astype(np.float32)
        state |= {f"unet:{number}:down": down, f"unet:{number}:up": up}
        product = up.reshape(len(up), -1) @ down.reshape(rank, -1)
        changes[f"{path}.weight"] = product.reshape(shape)
    return state, changes


@pytest.mark.parametrize("container", ["safetensors", "pt"])
def test_an_extended_list_is_applied(tiny, unet, save, tmp_path, container):
    order = walked(unet, *CASES["extended"])
    tensors = tiny.tensors["unet"]
    state, changes = numbered(order, tensors)
    if container == "pt":
        path = tmp_path / "extended.pt"
        pairs = [state[f"unet:{n}:{part}"] for n in range(len(order)) for part in ("up", "down")]
        torch.save([torch.from_numpy(value) for value in pairs], path)
    else:
        path = save(state)
    with plan_bake(tiny.shapes, [AdapterRef(path)]) as plan:
        (report,) = plan.reports
        assert report.matched_modules == {"unet": len(order)}
        assert report.unmatched_keys == ()
        for name, change in changes.items():
            baked = plan.bake("unet", name, tensors[name])
            np.testing.assert_allclose(baked, tensors[name] + change, atol=1e-5, err_msg=name)


def test_two_layers_in_each_others_place_are_seen(tiny, unet, save):
    """Two of another shape are an error; two of the same shape change each other's weight."""
    order = walked(unet, *CASES["extended"])
    state, changes = numbered(order, tiny.tensors["unet"])
    first, second = (order.index(f"mid_block.resnets.0.{name}") for name in ("conv1", "conv2"))
    swapped = dict(state)
    for part in ("up", "down"):
        keys = f"unet:{first}:{part}", f"unet:{second}:{part}"
        swapped[keys[0]], swapped[keys[1]] = state[keys[1]], state[keys[0]]
    name = "mid_block.resnets.0.conv1.weight"
    with plan_bake(tiny.shapes, [AdapterRef(save(swapped))]) as plan:
        baked = plan.bake("unet", name, tiny.tensors["unet"][name])
    assert not np.allclose(baked, tiny.tensors["unet"][name] + changes[name], atol=1e-5)
    moved = order.index("mid_block.resnets.0.time_emb_proj")
    for part in ("up", "down"):
        swapped[f"unet:{moved}:{part}"] = state[f"unet:{first}:{part}"]
    with pytest.raises(AdapterError, match="does not fit"):
        plan_bake(tiny.shapes, [AdapterRef(save(swapped))])
