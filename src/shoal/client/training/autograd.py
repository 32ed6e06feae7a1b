"""Where PyTorch's autograd calls the swarm: a forward pass, and the backward pass that follows it."""

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
    """A forward pass: the plan, the caller's adapters `tuned`, and the positions and mask [B, T] of the tokens."""

    runtime: Runtime
    passes: RemotePasses
    plan: PassPlan
    tuned: Sequence[ClientAdapter]
    positions: torch.Tensor | None
    mask: torch.Tensor | None


class SwarmFunction(torch.autograd.Function):
    """A forward pass through the swarm, whose backward pass goes through the swarm too."""

    @staticmethod
    def forward(ctx: Any, hidden_BTD: torch.Tensor, call: PassCall, *parameters: torch.Tensor) -> torch.Tensor:
        output, pieces = call.runtime.run(call.passes.forward(call.plan, on_cpu(hidden_BTD), call.positions, call.mask))
        ctx.call, ctx.pieces = call, pieces
        ctx.save_for_backward(hidden_BTD, *parameters)  # a piece may share the memory of `hidden_BTD`
        return output.to(hidden_BTD.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if one was changed in place meanwhile
        (grad,) = grads
        call: PassCall = ctx.call
        pieces: list[list[MicrobatchPiece]] = ctx.pieces
        gradients: Gradients = call.runtime.run(call.passes.backward(call.plan, pieces, on_cpu(grad)))
        inputs = None if gradients.inputs_BTD is None else gradients.inputs_BTD.to(grad.device)
        factors = [
            own
            for each in call.tuned
            for own in (
                each.gradients(gradients.factors[each.block])
                if each.block in gradients.factors
                else [None] * len(each.parameters)
            )
        ]
        return inputs, None, *factors


class NoGradient(torch.autograd.Function):
    """Marks the outputs of a session: its servers have a cache, and nothing that a backward pass could use."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise UnsupportedOperation(
            "gradients do not flow through an inference session", hint="call the model with use_cache=False"
        )
