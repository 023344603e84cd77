"""Sharding: networks whose parameters are divided among the ranks, by accelerate's FSDP plugin.

The environment that `accelerate launch` sets decides. Every rank holds its part of each parameter,
and of what has its shape: gradient, moving average and state of the optimiser. A forward pass of
the network is a collective, which gathers the parameters of one unit after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn

from pipeline.errors import UserError

_SWITCH, _POLICY, _CLASSES = (
    "ACCELERATE_USE_FSDP",
    "FSDP_AUTO_WRAP_POLICY",
    "FSDP_TRANSFORMER_CLS_TO_WRAP",
)
_OFF = ("false", "0", "no")
#: settings of FSDP, their value where none is given, the values that are honoured, and what to do
_HONOURED: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("FSDP_VERSION", "1", ("2",), "set fsdp_version: 2"),
    ("FSDP_OFFLOAD_PARAMS", "", _OFF, "launch more processes"),
    ("FSDP_ACTIVATION_CHECKPOINTING", "", _OFF, "lower train.micro_batch"),
    (_POLICY, "", ("no_wrap", "transformer_based_wrap"), f"name parts of networks by {_CLASSES}"),
    ("FSDP_STATE_DICT_TYPE", "", ("full_state_dict",), "checkpoints hold whole networks"),
    ("FSDP_IGNORED_MODULES", "", (), "every parameter is sharded"),
    ("FSDP_SHARDING_STRATEGY", "", ("full_shard", "1"), "set fsdp_reshard_after_forward"),
    ("FSDP_BACKWARD_PREFETCH", "", ("no_prefetch",), "version 2 of FSDP has none"),
    ("FSDP_FORWARD_PREFETCH", "", _OFF, "version 2 of FSDP has none"),
)
#: warnings about accelerate's meshes, and about changes of a network's output; there are none
_NOT_OURS = ("Slicing a flattened dim", r"FSDP2-wrapped module \(.*\) returned a view")


def refuse_sharding_settings(environ: Mapping[str, str], shards: bool) -> None:
    """Refuse settings of FSDP that jkoflow does not honour, by name.

    Args:
        environ: the environment.
        shards: whether the command trains a network that it can shard.

    Raises:
        UserError: one is set.
    """
    switch = environ.get(_SWITCH, "").lower()
    if switch in ("", *_OFF):
        return
    if switch != "true" or not shards:
        raise UserError(
            f"{_SWITCH} is {switch}; expected false or none; launch without FSDP, which is for "
            "`jkoflow train` alone"
        )
    for name, default, honoured, advice in _HONOURED:
        value = environ.get(name, default).lower()
        if value and value not in honoured:
            expected = " or ".join([*honoured, "none"] if not default else honoured)
            raise UserError(f"{name} is {value}; expected {expected}; {advice}")
    if environ.get(_POLICY, "").lower() == "transformer_based_wrap" and not environ.get(_CLASSES):
        raise UserError(
            f"{_CLASSES} is empty under {_POLICY}=TRANSFORMER_BASED_WRAP; expected classes of the "
            "network's parts; set DitBlock for a dit or ResidualBlock for a unet"
        )


def enable_sharding(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """Give an accelerator of several ranks the FSDP plugin of the environment, if it names one.

    Accelerate itself makes the plugin on GPUs only. Without a mesh, PyTorch would take one of GPUs
    wherever there is one.
    """
    if accelerator.num_processes == 1 or environ.get(_SWITCH, "").lower() != "true":
        return
    for message in _NOT_OURS:
        warnings.filterwarnings("ignore", message=message)
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    plugin.cpu_ram_efficient_loading = False  # of pretrained models; all ranks have the weights
    accelerator.state.fsdp_plugin = plugin
    parallelism = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    accelerator.state.parallelism_config = parallelism
    accelerator.state.device_mesh = parallelism.get_device_mesh(accelerator.device.type)


def shards_networks(accelerator: Accelerator) -> bool:
    """Return whether the ranks of an accelerator share the parameters of a network."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and accelerator.num_processes > 1


def shard(accelerator: Accelerator, network: nn.Module) -> None:
    """Divide the parameters of a network among the ranks, in place (a collective).

    Raises:
        UserError: the network has no part of a class that the environment names.
    """
    try:
        fsdp2_prepare_model(accelerator, network)
    except ValueError as error:
        if "layer class" not in str(error):
            raise
        parts = {type(part).__name__ for part in network.modules() if any(part.children())}
        raise UserError(
            f"{_CLASSES} names a class that the network lacks; expected some of "
            f"{', '.join(sorted(parts))}; set them in the configuration of accelerate"
        ) from error


def gather(value: Any, keep: bool = True) -> Any:  # noqa: ANN401 - nested state
    """Return a nested state with whole tensors in place of sharded ones (a collective).

    Args:
        value: dicts and lists of tensors and other values, which stay.
        keep: whether this rank needs the whole tensors, which are on the CPU; others get None.
    """
    if _is_sharded(value):
        whole = value.detach().full_tensor()
        return whole.cpu() if keep else None
    if isinstance(value, dict):
        return {key: gather(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gather(item, keep) for item in value]
    return value


def scatter(whole: Any, like: Any) -> Any:  # noqa: ANN401 - nested state
    """Return a nested state with this rank's parts of the tensors that are sharded elsewhere.

    It inverts `gather`, for a state that is the same on every rank; the ranks do not communicate.

    Args:
        whole: dicts of tensors and other values.
        like: the same with sharded tensors; what it lacks stays as it is.
    """
    if isinstance(whole, dict) and isinstance(like, dict):
        return {key: scatter(item, like.get(key)) for key, item in whole.items()}
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements
    part = distribute_tensor(whole.to(like.device), mesh, placements, src_data_rank=None)
    return part.clone()  # of its own memory


def _is_sharded(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")
