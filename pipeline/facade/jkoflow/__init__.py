"""Trained flows in Python: load, sample, encode, invert, edit, train and measure.

    >>> import jkoflow
    >>> model = jkoflow.load("zoo:mnist")
    >>> model.sample(4, seed=0).shape
    torch.Size([4, 1, 28, 28])

The functions share their code with the commands, so that both give the same images and metrics.
Mistakes of the caller raise `jkoflow.UserError`, a ValueError of one sentence. Names are imported
at their first use, so that `import jkoflow` takes no time.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.networks.base import Velocity as Velocity
    from flows.networks.config import VelocityConfig as VelocityConfig
    from jkoflow.measuring import evaluate as evaluate
    from jkoflow.measuring import fid as fid
    from jkoflow.model import LogProb as LogProb
    from jkoflow.model import Model as Model
    from jkoflow.model import load as load
    from jkoflow.plugins import register as register
    from jkoflow.training import fit as fit
    from pipeline.errors import JkoflowError as JkoflowError
    from pipeline.errors import UserError as UserError
    from pipeline.sampling.image_flow import interpolate as interpolate
    from pipeline.sampling.inversion import Inversion as Inversion

#: name → module that has it
_MODULES = {
    "Inversion": "pipeline.sampling.inversion",
    "JkoflowError": "pipeline.errors",
    "LogProb": "jkoflow.model",
    "Model": "jkoflow.model",
    "UserError": "pipeline.errors",
    "Velocity": "flows.networks.base",
    "VelocityConfig": "flows.networks.config",
    "evaluate": "jkoflow.measuring",
    "fid": "jkoflow.measuring",
    "fit": "jkoflow.training",
    "interpolate": "pipeline.sampling.image_flow",
    "load": "jkoflow.model",
    "register": "jkoflow.plugins",
}
__all__ = [
    "Inversion", "JkoflowError", "LogProb", "Model", "UserError", "Velocity", "VelocityConfig",
    "evaluate", "fid", "fit", "interpolate", "load", "register",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jkoflow' has no attribute {name!r}")
    _require_own_packages()
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _require_own_packages() -> None:
    """Check that no other module hides a package that jkoflow was installed with.

    Raises:
        ImportError: a file such as `eval.py` in the working directory hides one.
    """
    homes = set()
    for name in ("pipeline", "flows", "autoencoders", "eval"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ImportError(f"the package {name} of jkoflow is missing; install jkoflow again")
        homes.add(Path(spec.origin).resolve().parents[1])
        if len(homes) > 1 or not spec.origin.endswith("__init__.py"):
            raise ImportError(
                f"the module {name} at {spec.origin} is not the package that jkoflow was "
                "installed with; rename it, or start Python in another folder"
            )
