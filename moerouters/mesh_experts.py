"""Experts on a mesh of (expert, model): spread over the one dimension, each cut over the other."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moerouters.errors import ConfigError
from moerouters.experts import GroupedExperts


class MeshExperts(GroupedExperts):
    """The experts of a rank along `expert`, of each the columns of `up` and rows of `down` of a rank along `model`.

    What forward gives are parts, to be summed over `model`. Weights are DTensors of all experts, whole: `up_eFD` is
    [E, 2, F, D] for swiglu, so that gate and up are cut alike ([E, 1, F, D] for gelu), and `down_eDF` [E, D, F]; F is
    cut in both. fully_shard over `data` cuts their first dimension further.
    """

    def __init__(self, whole: GroupedExperts, mesh: DeviceMesh) -> None:
        """From the same weights on every rank of the mesh (data, expert, model), whose dimensions have names. Raises
        ConfigError where it does not divide them."""
        nn.Module.__init__(self)
        up_eFD, down_eDF = whole.up_eFD, whole.down_eDF
        num_experts, width, expert_size = down_eDF.shape
        _, spread, self.slices = mesh.shape
        for what, size, ranks in (
            ("experts", num_experts, spread),
            ("columns of a token", width, self.slices),
            ("columns inside an expert", expert_size, self.slices),
        ):
            if size % ranks:
                raise ConfigError(
                    f"{size} {what} cannot be cut evenly for {ranks} ranks.",
                    where=str(mesh),
                    why="experts are spread over the second dimension, and cut over the third",
                    fix="take a mesh whose dimensions divide them",
                )
        self.activation, self.training, self._spread = whole.activation, whole.training, spread
        up = cut(up_eFD.detach().reshape(num_experts, -1, expert_size, width), mesh)
        self.up_eFD = nn.Parameter(up, requires_grad=up_eFD.requires_grad)
        self.down_eDF = nn.Parameter(cut(down_eDF.detach(), mesh), requires_grad=down_eDF.requires_grad)

    @property
    def num_experts(self) -> int:
        return self.up_eFD.shape[0] // self._spread

    def here(self) -> tuple[Tensor, Tensor]:
        return cast(DTensor, self.up_eFD).to_local().flatten(1, 2), cast(DTensor, self.down_eDF).to_local()


def cut(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """[E, ., F, .], the same on every rank of (data, expert, model), as parameters of MeshExperts lie; or [E, D, F]."""
    assert mesh.mesh_dim_names is not None
    placements = (Shard(0), Shard(2))
    return distribute_tensor(whole, mesh[mesh.mesh_dim_names[1:]], placements, src_data_rank=None)  # nobody sends
