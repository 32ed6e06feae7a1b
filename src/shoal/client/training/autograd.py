"""Where PyTorch's gradients leave for the swarm, and come back."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from shoal.client.call_inputs import on_cpu
from shoal.client.runtime import Runtime
from shoal.client.training.gradients import Gradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.errors import UnsupportedOperation
from shoal.model.peft.peft_layers import ClientAdapter


@dataclass(frozen=True)
class PassCall:
    """A forward pass: what is to be computed, and with what of the caller's."""

    runtime: Runtime
    passes: RemotePasses
    plan: PassPlan
    tuned: Sequence[ClientAdapter]
    positions: torch.Tensor | None
    mask: torch.Tensor | None


class SwarmFunction(torch.autograd.Function):
    """A forward pass through the swarm whose backward pass goes through it too."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: torch.Tensor, work: PassCall, *parameters: torch.Tensor) -> torch.Tensor:
        output, pieces = work.runtime.run(work.passes.forward(work.plan, on_cpu(hidden_BTD), work.positions, work.mask))
        ctx.work, ctx.pieces = work, pieces
        ctx.save_for_backward(hidden_BTD, *parameters)  # the pieces may share the memory of the former
        return output.to(hidden_BTD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if any has been changed since
        (grad,) = grads
        work: PassCall = ctx.work
        pieces: list[list[MicrobatchPiece]] = ctx.pieces
        found: Gradients = work.runtime.run(work.passes.backward(work.plan, pieces, on_cpu(grad)))
        inputs = None if found.inputs_BTD is None else found.inputs_BTD.to(grad.device)
        factors = [
            gradient
            for each in work.tuned
            for gradient in (
                each.gradients(found.factors[each.block])
                if each.block in found.factors
                else [None] * len(each.parameters)
            )
        ]
        return inputs, None, *factors


class NoGradient(torch.autograd.Function):
    """Marks what came out of a session: servers keep a cache there and nothing to differentiate."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise UnsupportedOperation(
            "gradients do not flow through an inference session", hint="call the model with use_cache=False"
        )
