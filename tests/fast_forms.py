"""Backbones in their fast and their plain form, a step of them, and what a forward pass keeps."""

import torch
from torch.autograd.graph import saved_tensors_hooks

from mona_mm import PeftBackbone
from mona_mm.hosts.window_attention import FastWindowAttention


def backbone_pair(host, **options):
    """The fast and the stock backbone with the same weights, and the same not-zero values of the method."""
    models = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = PeftBackbone(base=host, fast=fast, **options)
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.1)
        models.append(model)
    return models


def step(model, size=(50, 70), batch=2):
    torch.manual_seed(1)
    device = next(model.parameters()).device
    outs = list(model(torch.randn(batch, 3, *size).to(device)))
    if any(out.requires_grad for out in outs):
        weights = [
            torch.randn(out.shape).to(device) / 30 for out in outs
        ]  # behind a LayerNorm squares would add up to a constant
        sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True)).backward()
    return [*(o.detach() for o in outs), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def kept(model, *args) -> dict[int, int]:
    """Bytes of every storage that the forward keeps for the backward pass, parameters and masks aside."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        model(*args)
    masks = [m._masks[2] for m in model.modules() if isinstance(m, FastWindowAttention) and m._masks]
    for tensor in [*model.parameters(), *sum(masks, [])]:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return storages
