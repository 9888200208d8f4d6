"""Sharing one model's blocks among workers (FSDP): parameters, gradients and optimiser states, each worker a part.

torch's `fully_shard`, which accelerate's FSDP2 plugin calls too; called here block by block, because a block may only
just have been read from disk. While a block runs its parameters are whole on every worker, then parts again.
"""

from collections.abc import Iterator

from torch import Tensor, nn

from elastic_sparsity.adapters import elastic_linears


def shard_block_(block: nn.Module, num_workers: int, device_type: str) -> None:
    """Leaves each worker its part of a block; the dense teacher's weights are shared out too.

    Averaging gradients over the workers is part of it. Weights of a `Conv1D` are transposed views, which torch refuses.
    """
    from torch.distributed.device_mesh import init_device_mesh  # only where there is a process group
    from torch.distributed.fsdp import fully_shard

    for _, linear in elastic_linears(block):
        dense: Tensor = linear.dense
        del linear.dense
        # A parameter is shared out, a plain tensor is not.
        linear.dense = nn.Parameter(dense.contiguous(), requires_grad=False)
        linear.weight = nn.Parameter(linear.weight.detach().contiguous(), requires_grad=linear.weight.requires_grad)
    fully_shard(block, mesh=init_device_mesh(device_type, (num_workers,)))


def whole_tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all parameters of a sharded block but the teacher's, gathered one by one on every worker."""
    for name, parameter in block.named_parameters():
        if not name.endswith(".dense"):
            yield name, parameter.detach().full_tensor()  # type: ignore[attr-defined]
