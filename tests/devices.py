"""Run the tests of the loss on another device than that of the tensors they make."""

from __future__ import annotations

import functools

import torch
from torch.utils._pytree import tree_map_only

import genscl_loss
from genscl_loss import functional, module


def run_losses_on(device: torch.device) -> None:
    """Move the tensors of every call of the loss to a device, and the result back; gradients find their own way.

    Before test modules import the names.
    """
    loss = functional.gen_supcon_loss

    def there(x: torch.Tensor) -> torch.Tensor:
        return x.to(device) if x.device.type == "cpu" else x

    @functools.wraps(loss)
    def moved(*args, **kwargs):
        args, kwargs = tree_map_only(torch.Tensor, there, (args, kwargs))
        result = loss(*args, **kwargs)
        return result.cpu() if result.device.type == device.type else result

    for owner in (genscl_loss, functional, module):
        owner.gen_supcon_loss = moved
